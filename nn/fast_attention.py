"""Attention with a hand-written backward, over raw heads and the attention's own residuals."""

from dataclasses import dataclass
from typing import Any

import torch

from ..kernels.attention import Documents, attention_backward, attention_forward
from ..kernels.attention_reference import Keywords
from ..kernels.fp8 import Rows
from . import rope, tree
from .attention import Heads, gated, gates, prepared, queries, terms
from .half import Residuals
from .linear import scaled, seed_after
from .products import products
from .pulling import Found, Lows, Puller, picked
from .residuals import Policy
from .spec import AttentionSpec

SHARED = "shared"
Raw = tuple[torch.Tensor, ...]


@dataclass(frozen=True, slots=True)
class FastAttention:
    """A `half.Function`: what `mixer.attention` is without a mask, for frozen params. shared: keys
    and values to take in place of its own, whose gradients are found as SHARED.
    """

    spec: AttentionSpec
    table: rope.Table | None
    documents: Documents | None
    policy: Policy
    shared: Heads | None = None

    def reads(self, p: tree.Tree, residuals: Residuals | None = None) -> list[Any]:
        made = residuals is not None and "qkv" in residuals
        if made or self.spec.in_scale != 1.0:
            return []
        return [p[name]["weight"] for name in self._names]

    def forward(
        self,
        inner: torch.Tensor,
        p: tree.Tree,
        adapters: tree.Tree,
        seed: int | None,
        rounded: Rows | None = None,
    ) -> tuple[torch.Tensor, Residuals]:
        inner = scaled(inner, self.spec.in_scale)
        heads, low_qkv = self._qkv(inner, p, adapters, seed, rounded)
        q, k, v, gate = self._prepared(heads, p)
        saved = attention_forward(q, k, v, **self._sight(p, k))
        residuals: Residuals = {"out": saved, "low_qkv": low_qkv}
        if self.policy.qkv != "recompute":
            residuals["qkv"] = heads
        del heads, q, k, v
        flat = gated(saved.out, gate).flatten(-2)
        (o,), residuals["low_o"] = products(flat, *picked(p, adapters, ("o",)), seed_after(seed, 3))
        return scaled(o, self.spec.out_scale), residuals

    def backward(
        self,
        dout: torch.Tensor,
        inner: torch.Tensor,
        residuals: Residuals,
        p: tree.Tree,
        adapters: tree.Tree,
        seed: int | None,
        need_inner: bool,
        rounded: Rows | None = None,
    ) -> tuple[torch.Tensor | None, Found]:
        found = Found()
        o = Puller(p, adapters, ("o",), seed_after(seed, 3), found)
        qkv = Puller(p, adapters, self._names, seed, found)
        low_qkv = residuals.pop("low_qkv")
        inner = scaled(inner, self.spec.in_scale)
        if "qkv" not in residuals:
            residuals["qkv"], _ = self._qkv(inner, p, adapters, seed, rounded, low_qkv)
        with torch.enable_grad():
            raw = tuple(t.detach().requires_grad_() for t in residuals.pop("qkv"))
            q, k, v, gate = self._prepared(raw, p)
        heads = (q.detach(), k.detach(), v.detach())
        sight = self._sight(p, k)
        saved = residuals.pop("out", None)
        if saved is None:
            saved = attention_forward(*heads, **sight)
        dflat = o.input((scaled(dout, self.spec.out_scale),))
        assert dflat is not None
        dgates: list[torch.Tensor] = []
        if gate is None:
            flat, dattended = saved.out, dflat.view(saved.out.shape)
        else:
            flat, dattended, *dgates = _pull_gate(saved.out, gate, dflat)
        o.weights(flat.flatten(-2), residuals.pop("low_o"))
        del flat, dflat
        dq, *dothers = attention_backward(dattended, *heads, saved, **sight)
        del saved, dattended, heads
        made = [q] if self.shared is not None else [q, k, v]
        if self.shared is not None:
            found[SHARED], dothers = tuple(dothers), []
        ends = [*made, *([] if gate is None else [gate])]
        draw = torch.autograd.grad(ends, raw, [dq, *dothers, *dgates])
        if self.spec.keys_as_values and self.shared is None:
            draw = (draw[0], draw[1] + draw[2])
        dinner = qkv.input([t.flatten(-2) for t in draw], need_inner)
        qkv.weights(inner, low_qkv, [t.detach().flatten(-2) for t in raw] if qkv.folded else None)
        return None if dinner is None else scaled(dinner, self.spec.in_scale), found

    @property
    def _names(self) -> tuple[str, ...]:
        return ("q",) if self.shared is not None else self.spec.projections

    def _qkv(
        self,
        inner: torch.Tensor,
        p: tree.Tree,
        adapters: tree.Tree,
        seed: int | None,
        rounded: Rows | None,
        lows: Lows | None = None,
    ) -> tuple[Raw, Lows]:
        """The raw heads, before clipping, q/k norm and rotation: of q alone, or of all three."""
        a, (b, s, _) = self.spec, inner.shape
        own = picked(p, adapters, self._names)
        (q, *made), lows = products(inner, *own, seed, lows, rounded)
        others = (made[0], made[-1]) if made else ()
        kv = [y.view(b, s, a.kv_heads, a.head_dim) for y in others]
        return (q.view(b, s, a.heads, -1), *kv), lows

    def _prepared(
        self, raw: Raw, p: tree.Tree
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """What attention reads, and the gates."""
        q, gate = gates(raw[0], self.spec)
        if self.shared is not None:
            return queries(q, p, self.spec, self.table), *self.shared, gate
        return *prepared(q, raw[1], raw[2], p, self.spec, self.table), gate

    def _sight(self, p: tree.Tree, k: torch.Tensor) -> Keywords:
        """What attention is told beside its tensors."""
        how = terms(self.spec, p, k.shape[1], k.device)
        return {**how, "documents": self.documents, "window": self.spec.window}


def _pull_gate(
    out: torch.Tensor, gate: torch.Tensor, dflat: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of `gated(out, gate)`: itself, and the gradients of both, each [b, s, h, d]."""
    with torch.enable_grad():
        out, gate = (t.detach().requires_grad_() for t in (out, gate))
        made = gated(out, gate)
    dout, dgate = torch.autograd.grad(made, (out, gate), dflat.view(made.shape))
    return made.detach(), dout, dgate
