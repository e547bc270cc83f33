"""Latent attention with a hand-written backward.

The narrow latents of queries and of keys and values are kept whatever the policy: the wide heads
are run again from them, not from the layer's input.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ..kernels.attention import Documents, attention_backward, attention_forward
from ..kernels.attention_reference import Keywords
from ..kernels.fp8 import Rows
from . import rope, tree
from .attention import terms
from .half import Residuals
from .latent import SEED_STEP, firsts, joined, split, turn
from .linear import seed_after
from .norm import norm
from .products import products
from .pulling import Found, Puller, picked
from .residuals import Policy
from .spec import AttentionSpec, LatentSpec

Q_B, KV_B = ("q_b",), ("kv_b",)
Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True)
class FastLatent:
    """A `half.Function`: what `latent.latent_attention` is without a mask, for frozen params."""

    spec: AttentionSpec
    table: rope.Table
    documents: Documents | None
    policy: Policy

    def reads(self, p: tree.Tree, residuals: Residuals | None = None) -> list[Any]:
        return []

    def forward(
        self,
        inner: torch.Tensor,
        p: tree.Tree,
        adapters: tree.Tree,
        seed: int | None,
        rounded: Rows | None = None,
    ) -> tuple[torch.Tensor, Residuals]:
        residuals = Residuals()
        (first, kv_a), residuals["low_first"] = products(
            inner, *picked(p, adapters, firsts(self._latent)), seed
        )
        q_in, latent, key = self._normed(first, kv_a, p)
        wide = self._wide(q_in, latent, p, adapters, seed, residuals)
        residuals["low_narrow"] = (kv_a,) if self._latent.q_rank is None else (kv_a, first)
        if self.policy.qkv != "recompute":
            residuals["qkv"] = wide
        q, k, v = self._heads(*wide, key)
        residuals["out"] = saved = attention_forward(q, k, v, **self._sight(k))
        del wide, q, k, v
        flat = saved.out[..., : self.spec.value_dim].flatten(-2)
        (o,), residuals["low_o"] = products(flat, *picked(p, adapters, ("o",)), seed_after(seed, 3))
        return o, residuals

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
        found, ranked = Found(), self._latent.q_rank is not None
        o = Puller(p, adapters, ("o",), seed_after(seed, 3), found)
        kv_b = Puller(p, adapters, KV_B, seed_after(seed, SEED_STEP), found)
        q_b = Puller(p, adapters, Q_B, seed_after(seed, 2), found) if ranked else None
        begin = Puller(p, adapters, firsts(self._latent), seed, found)
        low_first = residuals.pop("low_first")
        with torch.enable_grad():
            narrow = [t.detach().requires_grad_() for t in residuals.pop("low_narrow")]
            first = narrow[1] if ranked else None
            q_in, latent, key = self._normed(first, narrow[0], p)
        if "qkv" not in residuals:
            if not ranked:  # q itself, of the input
                own = picked(p, adapters, ("q",))
                (q_in,), _ = products(inner, *own, seed, low_first[: own[1][0] is not None])
            kept = q_in.detach(), latent.detach()
            residuals["qkv"] = self._wide(*kept, p, adapters, seed, residuals)
        with torch.enable_grad():
            raw = [t.detach().requires_grad_() for t in (*residuals.pop("qkv"), key)]
            q, k, v = self._heads(*raw)
        heads = (q.detach(), k.detach(), v.detach())
        sight = self._sight(k)
        saved = residuals.pop("out", None)
        if saved is None:
            saved = attention_forward(*heads, **sight)
        dflat = o.input((dout,))
        assert dflat is not None
        value_dim = self.spec.value_dim
        o.weights(saved.out[..., :value_dim].flatten(-2), residuals.pop("low_o"))
        dattended = dflat.view(*saved.out.shape[:-1], value_dim)
        dattended = F.pad(dattended, (0, saved.out.shape[-1] - value_dim))
        pulled = attention_backward(dattended, *heads, saved, **sight)
        del saved, dflat, dattended, heads
        dq, dmade, dkey = torch.autograd.grad((q, k, v), raw, pulled)
        del q, k, v, raw, pulled
        dlatent = kv_b.input((dmade,))
        kv_b.weights(latent.detach(), residuals.pop("low_kv_b"))
        ends, grads = [latent, key], [dlatent, dkey]
        if q_b is not None:
            grads.append(q_b.input((dq,)))
            q_b.weights(q_in.detach(), residuals.pop("low_q_b"))
            ends.append(q_in)
        dnarrow = torch.autograd.grad(ends, narrow, grads)
        dinner = begin.input((dnarrow[1] if ranked else dq, dnarrow[0]), need_inner)
        begin.weights(inner, low_first)
        return dinner, found

    @property
    def _latent(self) -> LatentSpec:
        assert self.spec.latent is not None
        return self.spec.latent

    def _normed(self, first: Any, kv_a: torch.Tensor, p: tree.Tree) -> Any:
        """What q_b reads, or q itself as it is; the normalised latent; the key of all heads."""
        if self._latent.q_rank is not None:
            first = norm(first, p["q_a_norm"], self._latent.norm)
        return first, *split(kv_a, p, self._latent)

    def _wide(
        self,
        q_in: torch.Tensor,
        latent: torch.Tensor,
        p: tree.Tree,
        adapters: tree.Tree,
        seed: int | None,
        residuals: Residuals,
    ) -> Pair:
        """q, and what kv_b makes; their adapters' narrow products are put into the residuals, or
        read from there.
        """
        if self._latent.q_rank is not None:
            given = *picked(p, adapters, Q_B), seed_after(seed, 2), residuals.get("low_q_b")
            (q_in,), residuals["low_q_b"] = products(q_in, *given)
        given = *picked(p, adapters, KV_B), seed_after(seed, SEED_STEP), residuals.get("low_kv_b")
        (made,), residuals["low_kv_b"] = products(latent, *given)
        return q_in, made

    def _heads(self, q: torch.Tensor, made: torch.Tensor, key: torch.Tensor) -> Any:
        """q, k and v as attention takes them."""
        heads = q.view(*q.shape[:2], self.spec.heads, -1)
        return joined(*turn(heads, key, self.spec, self.table), made, self.spec)

    def _sight(self, k: torch.Tensor) -> Keywords:
        how = terms(self.spec, {}, k.shape[1], k.device)
        return {**how, "documents": self.documents, "window": self.spec.window}
