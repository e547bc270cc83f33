"""A decoder layer with a hand-written backward over named residuals.

The arithmetic is `decoder.layer`'s. What autograd would keep is spelled out here, so that a
`Policy` can keep, offload or recompute each residual, and so that no output projection runs twice.
Frozen params only; what this does not cover runs through `decoder.layer` and autograd.
"""

from typing import Any, NamedTuple

import torch
from torch.utils import _pytree

from ..kernels.attention import Documents, Saved, attention_backward, attention_forward
from ..kernels.gated import gated
from ..kernels.rms_norm import rms_norm
from ..kernels.rope import rope_qk
from . import rope, tree
from .linear import Grads, Wanted, linear, project, pull
from .lora import LoRA
from .offload import Offload
from .residuals import Policy
from .spec import AttentionSpec, LayerSpec, NormSpec

Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Layer:
    """One layer's static side: its spec, its tensors and how its residuals are treated."""

    def __init__(
        self,
        index: int,
        spec: LayerSpec,
        documents: Documents | None,
        policy: Policy,
        offload: Offload | None,
        seed: int | None,
        stays: bool = False,
    ) -> None:
        self.index, self.spec, self.documents = index, spec, documents
        self.policy, self.offload, self.seed = policy, offload, seed
        self.stays = stays  # on the device, whatever the policy sends away

    def fate(self, name: str) -> str:
        fate: str = getattr(self.policy, name)
        return "keep" if fate == "offload" and self.stays else fate

    def run(
        self, x: torch.Tensor, p: tree.Tree, adapters: tree.Tree, table: rope.Table
    ) -> torch.Tensor:
        """x [b, s, e] -> [b, s, e], differentiable in x and the adapters."""
        bound = _Bound(self, p, _cast(adapters, x.dtype), table, dict(tree.items(adapters)))
        trained = [t for leaf in bound.leaves.values() for t in (leaf.a, leaf.b)]
        out: torch.Tensor = _Run.apply(bound, x, *trained)  # type: ignore[no-untyped-call]
        return out

    # The pieces, each a function of what it reads.

    def _norm(
        self, x: torch.Tensor, p: dict[str, torch.Tensor], spec: NormSpec | None = None
    ) -> torch.Tensor:
        spec = spec or self.spec.norm
        return rms_norm(x, p["weight"], spec.eps, offset=spec.offset, cast_first=spec.cast_first)

    def _qkv(self, x: torch.Tensor, p: tree.Tree, adapters: tree.Tree) -> Heads:
        """The raw heads of layer input x, before q/k norm and rotation."""
        a: AttentionSpec = self.spec.attention
        inner = self._norm(x, p["attn_norm"])
        q, k, v = project(inner, *_picked(p["attn"], adapters, "attn", "qkv"), self.seed)
        b, s, _ = x.shape
        return (
            q.view(b, s, a.heads, a.head_dim),
            k.view(b, s, a.kv_heads, a.head_dim),
            v.view(b, s, a.kv_heads, a.head_dim),
        )

    def _rotated(
        self, q: torch.Tensor, k: torch.Tensor, p: tree.Tree, table: rope.Table
    ) -> tuple[torch.Tensor, torch.Tensor]:
        qk_norm = self.spec.attention.qk_norm
        if qk_norm is not None:
            q = self._norm(q, p["attn"]["q_norm"], qk_norm)
            k = self._norm(k, p["attn"]["k_norm"], qk_norm)
        rotated: tuple[torch.Tensor, torch.Tensor] = rope_qk(q, k, *table)
        return rotated

    def _attend(self, heads: Heads, p: tree.Tree, table: rope.Table) -> Saved:
        q, k, v = heads
        q, k = self._rotated(q, k, p, table)
        scale = self.spec.attention.scale
        return attention_forward(q, k, v, scale=scale, documents=self.documents)

    def _gate_up(self, mid: torch.Tensor, p: tree.Tree, adapters: tree.Tree) -> list[torch.Tensor]:
        inner = self._norm(mid, p["mlp_norm"])
        picked = _picked(p["mlp"], adapters, "mlp", ("gate", "up"))
        return list(project(inner, *picked, _plus(self.seed, 4)))

    # The two directions.

    def forward(
        self, x: torch.Tensor, p: tree.Tree, adapters: tree.Tree, table: rope.Table
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """The output and every residual by name."""
        heads = self._qkv(x, p, adapters)
        saved = self._attend(heads, p, table)
        out = saved.out.reshape(*x.shape[:2], -1)
        mid = x + linear(out, p["attn"]["o"], tree.get(adapters, "attn", "o"), _plus(self.seed, 3))
        gate, up = self._gate_up(mid, p, adapters)
        hidden = gated(gate, up, self.spec.mlp.activation)
        down = linear(
            hidden, p["mlp"]["down"], tree.get(adapters, "mlp", "down"), _plus(self.seed, 6)
        )
        residuals = {"x": x, "qkv": heads, "out": saved, "mid": mid, "gate_up": [gate, up]}
        return mid + down, residuals

    def backward(
        self,
        dy: torch.Tensor,
        residuals: dict[str, Any],
        p: tree.Tree,
        adapters: tree.Tree,
        table: rope.Table,
    ) -> tuple[torch.Tensor, dict[tuple[str, str], Grads]]:
        """dx and each adapter's gradients; residuals that are not there are computed again."""
        grads: dict[tuple[str, str], Grads] = {}
        dmid = self._mlp_backward(dy, residuals, p, adapters, grads)
        dx = self._attention_backward(dmid, residuals, p, adapters, table, grads)
        return dx, grads

    def _mlp_backward(
        self,
        dy: torch.Tensor,
        residuals: dict[str, Any],
        p: tree.Tree,
        adapters: tree.Tree,
        grads: dict[tuple[str, str], Grads],
    ) -> torch.Tensor:
        pulled = _Puller(p, adapters, grads, self.seed)
        with torch.enable_grad():
            mid = residuals.pop("mid").detach().requires_grad_()
            inner = self._norm(mid, p["mlp_norm"])
        if "gate_up" not in residuals:
            picked = _picked(p["mlp"], adapters, "mlp", ("gate", "up"))
            residuals["gate_up"] = project(inner.detach(), *picked, _plus(self.seed, 4))
        with torch.enable_grad():
            gate, up = (t.detach().requires_grad_() for t in residuals.pop("gate_up"))
            hidden = gated(gate, up, self.spec.mlp.activation)
        dhidden = pulled("mlp", ("down",), hidden.detach(), (dy,), 6)
        dgate, dup = torch.autograd.grad(hidden, (gate, up), dhidden)
        del hidden, gate, up, dhidden
        dinner = pulled("mlp", ("gate", "up"), inner.detach(), (dgate, dup), 4)
        del dgate, dup
        dmid: torch.Tensor = torch.autograd.grad(inner, mid, dinner)[0]
        return dy + dmid

    def _attention_backward(
        self,
        dmid: torch.Tensor,
        residuals: dict[str, Any],
        p: tree.Tree,
        adapters: tree.Tree,
        table: rope.Table,
        grads: dict[tuple[str, str], Grads],
    ) -> torch.Tensor:
        pulled = _Puller(p, adapters, grads, self.seed)
        with torch.enable_grad():
            x = residuals.pop("x").detach().requires_grad_()
            inner = self._norm(x, p["attn_norm"])
        if "qkv" not in residuals:
            residuals["qkv"] = self._qkv(x.detach(), p, adapters)
        with torch.enable_grad():
            raw_q, raw_k, v = (t.detach().requires_grad_() for t in residuals.pop("qkv"))
            q, k = self._rotated(raw_q, raw_k, p, table)
        scale = self.spec.attention.scale
        heads = (q.detach(), k.detach(), v.detach())
        saved = residuals.pop("out", None)
        if saved is None:
            saved = attention_forward(*heads, scale=scale, documents=self.documents)
        flat = saved.out.reshape(*x.shape[:2], -1)
        dout = pulled("attn", ("o",), flat, (dmid,), 3).view(saved.out.shape)
        dq, dk, dv = attention_backward(dout, *heads, saved, scale=scale, documents=self.documents)
        del saved, flat, dout, heads
        draw_q, draw_k = torch.autograd.grad((q, k), (raw_q, raw_k), (dq, dk))
        dys = tuple(t.reshape(*x.shape[:2], -1) for t in (draw_q, draw_k, dv))
        dinner = pulled("attn", ("q", "k", "v"), inner.detach(), dys, 0)
        dx: torch.Tensor = torch.autograd.grad(inner, x, dinner)[0]
        return dmid + dx


class _Puller:
    """Pulls gradients through named projections and notes those of their adapters."""

    def __init__(
        self,
        p: tree.Tree,
        adapters: tree.Tree,
        grads: dict[tuple[str, str], Grads],
        seed: int | None,
    ) -> None:
        self.p, self.adapters, self.grads, self.seed = p, adapters, grads, seed

    def __call__(
        self, part: str, names: Any, x: torch.Tensor, dys: tuple[torch.Tensor, ...], step: int
    ) -> torch.Tensor:
        projections, found = _picked(self.p[part], self.adapters, part, names)
        wanted = [Wanted(a=f is not None, b=f is not None) for f in found]
        dx, grads = pull(x, projections, found, _plus(self.seed, step), dys, wanted)
        self.grads.update({(part, n): g for n, g in zip(names, grads, strict=True)})
        assert dx is not None
        return dx


class _Bound(NamedTuple):
    """A layer with its tensors; `adapters` in the computing dtype, `leaves` as they are trained."""

    layer: Layer
    p: tree.Tree
    adapters: tree.Tree
    table: rope.Table
    leaves: dict[str, LoRA]


def _cast(adapters: tree.Tree, dtype: torch.dtype) -> tree.Tree:
    """The adapters as the products read them: once a pass, not once a product."""

    def cast(leaf: LoRA) -> LoRA:
        b = leaf.b if leaf.scale == 1.0 else leaf.b * leaf.scale
        return LoRA(leaf.a.to(dtype), b.to(dtype), 1.0, leaf.dropout)

    with torch.no_grad():
        return tree.map(cast, adapters)


def _picked(p: tree.Tree, adapters: tree.Tree, part: str, names: Any) -> tuple[Any, Any]:
    return [p[n] for n in names], [tree.get(adapters, part, n) for n in names]


def _plus(seed: int | None, step: int) -> int | None:
    return None if seed is None else seed + step


class _Run(torch.autograd.Function):
    """Ties a `Layer` into autograd; kept residuals go through save_for_backward."""

    @staticmethod
    def forward(ctx: Any, bound: _Bound, x: torch.Tensor, *trained: torch.Tensor) -> torch.Tensor:
        layer, p, adapters, table, _ = bound
        y, residuals = layer.forward(x, p, adapters, table)
        kept = {name: r for name, r in residuals.items() if layer.fate(name) == "keep"}
        parked = {name: r for name, r in residuals.items() if layer.fate(name) == "offload"}
        if parked and layer.offload is not None:
            layer.offload.park(layer.index, parked)
        leaves, ctx.structure = _pytree.tree_flatten(kept)
        ctx.bound = bound
        # Attention backends keep tensors, numbers and None.
        ctx.is_tensor = [isinstance(leaf, torch.Tensor) for leaf in leaves]
        ctx.static = [None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        # What is trained is saved for autograd's check that nobody changed it in between.
        kept_tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        ctx.num_kept = len(kept_tensors)
        ctx.save_for_backward(*kept_tensors, *trained)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        layer, p, adapters, table, trained = ctx.bound
        saved = iter(ctx.saved_tensors[: ctx.num_kept])
        pairs = zip(ctx.is_tensor, ctx.static, strict=True)
        leaves = [next(saved) if is_tensor else static for is_tensor, static in pairs]
        residuals = _pytree.tree_unflatten(leaves, ctx.structure)
        if layer.offload is not None:
            residuals.update(layer.offload.fetch(layer.index) or {})
        del saved, leaves
        dx, found = layer.backward(grads[0], residuals, p, adapters, table)
        out: list[torch.Tensor | None] = []
        for path, leaf in trained.items():
            part, _, name = path.partition(".")
            grad = found[part, name]
            a, b = grad.a, grad.b
            assert a is not None and b is not None
            b = b.to(leaf.b.dtype)
            out += [a.to(leaf.a.dtype), b if leaf.scale == 1.0 else b * leaf.scale]
        return None, dx, *out
