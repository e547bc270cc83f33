"""A decoder layer with a hand-written backward over named residuals.

The arithmetic is `decoder.layer`'s. What autograd would keep is spelled out here, so that a
`Policy` can keep, offload or recompute each residual, and so that no output projection runs twice.
Frozen params only; what this does not cover runs through `decoder.layer` and autograd.
"""

from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.utils import _pytree

from ..kernels.attention import Documents, Saved, attention_backward, attention_forward
from . import rope, tree
from .activation import activated, inputs
from .attention import prepared
from .linear import Grads, Wanted, linear, project, pull, seed_after
from .lora import LoRA
from .norm import add, add_backward, norm
from .offload import Offload
from .residuals import Policy
from .spec import AttentionSpec, LayerSpec, MLPSpec

# What o and down make, of which a layer with norms after its branches needs the values.
BRANCHES = ("attn_branch", "mlp_branch")

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
        assert isinstance(spec.mlp, MLPSpec)  # `decoder.uncovered` tells
        self.mlp = spec.mlp
        self.stays = stays  # on the device, whatever the policy sends away

    def fate(self, name: str) -> str:
        fate: str = getattr(self.policy, "mid" if name in BRANCHES else name)
        return "keep" if fate == "offload" and self.stays else fate

    def run(
        self, x: torch.Tensor, p: tree.Tree, adapters: tree.Tree, table: rope.Table | None
    ) -> torch.Tensor:
        """x [b, s, e] -> [b, s, e], differentiable in x and the adapters."""
        bound = _Bound(self, p, _cast(adapters, x.dtype), table, dict(tree.items(adapters)))
        trained = [t for leaf in bound.leaves.values() for t in (leaf.a, leaf.b)]
        if not (x.requires_grad or any(t.requires_grad for t in trained)):
            return self.forward(x, p, bound.adapters, table)[0]
        out: torch.Tensor = _Run.apply(bound, x, *trained)  # type: ignore[no-untyped-call]
        return out

    # The pieces, each a function of what it reads.

    def _attn_in(self, x: torch.Tensor, p: tree.Tree) -> torch.Tensor:
        return norm(x, p.get("attn_norm"), self.spec.norm) if self.spec.pre_norm else x

    def _mlp_in(self, mid: torch.Tensor, p: tree.Tree) -> torch.Tensor:
        if self.spec.parallel and not self.spec.own_norms:
            return self._attn_in(mid, p)
        return norm(mid, p.get("mlp_norm"), self.spec.norm) if self.spec.pre_norm else mid

    def _qkv(self, x: torch.Tensor, p: tree.Tree, adapters: tree.Tree) -> Heads:
        """The raw heads of layer input x, before clipping, q/k norm and rotation."""
        a: AttentionSpec = self.spec.attention
        inner = self._attn_in(x, p)
        q, k, v = project(inner, *_picked(p["attn"], adapters, "attn", "qkv"), self.seed)
        b, s, _ = x.shape
        return (
            q.view(b, s, a.heads, a.head_dim),
            k.view(b, s, a.kv_heads, a.head_dim),
            v.view(b, s, a.kv_heads, a.head_dim),
        )

    def _attend(self, heads: Heads, p: tree.Tree, table: rope.Table | None) -> Saved:
        q, k, v = prepared(*heads, p["attn"], self.spec.attention, table)
        return attention_forward(q, k, v, **self._sight())

    def _sight(self) -> dict[str, Any]:
        """What attention is told beside its tensors."""
        a = self.spec.attention
        return {"scale": a.scale, "documents": self.documents, "window": a.window}

    def _gate_up(self, mid: torch.Tensor, p: tree.Tree, adapters: tree.Tree) -> list[torch.Tensor]:
        inner = self._mlp_in(mid, p)
        picked = _picked(p["mlp"], adapters, "mlp", inputs(self.mlp))
        return list(project(inner, *picked, seed_after(self.seed, 4)))

    # The two directions.

    def forward(
        self, x: torch.Tensor, p: tree.Tree, adapters: tree.Tree, table: rope.Table | None
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """The output and every residual by name."""
        heads = self._qkv(x, p, adapters)
        saved = self._attend(heads, p, table)
        out = saved.out.reshape(*x.shape[:2], -1)
        o = linear(out, p["attn"]["o"], tree.get(adapters, "attn", "o"), seed_after(self.seed, 3))
        mid = add(x, o, p.get("attn_post_norm"), self.spec)
        gate_up = self._gate_up(x if self.spec.parallel else mid, p, adapters)
        hidden = activated(gate_up, self.mlp, p["mlp"])
        down = linear(
            hidden, p["mlp"]["down"], tree.get(adapters, "mlp", "down"), seed_after(self.seed, 6)
        )
        residuals = {"x": x, "qkv": heads, "out": saved, "gate_up": gate_up}
        if not self.spec.parallel:
            residuals["mid"] = mid
        if self.spec.post_norm:
            residuals.update(attn_branch=o, mlp_branch=down)
        return add(mid, down, p.get("mlp_post_norm"), self.spec), residuals

    def backward(
        self,
        dy: torch.Tensor,
        residuals: dict[str, Any],
        p: tree.Tree,
        adapters: tree.Tree,
        table: rope.Table | None,
        need_dx: bool = True,
    ) -> tuple[torch.Tensor | None, dict[tuple[str, str], Grads]]:
        """dx (None if not needed: the first layer with adapters) and each adapter's gradients;
        residuals that are not there are computed again.
        """
        grads: dict[tuple[str, str], Grads] = {}
        dmid = dy + self._mlp_backward(dy, residuals, p, adapters, grads)
        dbranch = dy if self.spec.parallel else dmid
        dx = self._attention_backward(dbranch, residuals, p, adapters, table, grads, need_dx)
        return None if dx is None else dmid + dx, grads

    def _mlp_backward(
        self,
        dy: torch.Tensor,
        residuals: dict[str, Any],
        p: tree.Tree,
        adapters: tree.Tree,
        grads: dict[tuple[str, str], Grads],
    ) -> torch.Tensor:
        pulled, names = _Puller(p, adapters, grads, self.seed), inputs(self.mlp)
        branch = residuals.pop("mlp_branch", None)
        dy = add_backward(dy, branch, p.get("mlp_post_norm"), self.spec)
        with torch.enable_grad():
            mid = residuals["x"] if self.spec.parallel else residuals.pop("mid")
            mid = mid.detach().requires_grad_()
            inner = self._mlp_in(mid, p)
        if "gate_up" not in residuals:
            picked = _picked(p["mlp"], adapters, "mlp", names)
            residuals["gate_up"] = project(inner.detach(), *picked, seed_after(self.seed, 4))
        with torch.enable_grad():
            gate_up = [t.detach().requires_grad_() for t in residuals.pop("gate_up")]
            hidden = activated(gate_up, self.mlp, p["mlp"])
        dhidden = pulled("mlp", ("down",), hidden.detach(), (dy,), 6)
        dgate_up = torch.autograd.grad(hidden, gate_up, dhidden)
        del hidden, gate_up, dhidden
        dinner = pulled("mlp", names, inner.detach(), dgate_up, 4)
        del dgate_up
        dmid: torch.Tensor = torch.autograd.grad(inner, mid, dinner)[0]
        return dmid

    def _attention_backward(
        self,
        dmid: torch.Tensor,
        residuals: dict[str, Any],
        p: tree.Tree,
        adapters: tree.Tree,
        table: rope.Table | None,
        grads: dict[tuple[str, str], Grads],
        need_dx: bool,
    ) -> torch.Tensor | None:
        pulled = _Puller(p, adapters, grads, self.seed)
        branch = residuals.pop("attn_branch", None)
        dmid = add_backward(dmid, branch, p.get("attn_post_norm"), self.spec)
        with torch.enable_grad():
            x = residuals.pop("x").detach().requires_grad_()
            inner = self._attn_in(x, p)
        if "qkv" not in residuals:
            residuals["qkv"] = self._qkv(x.detach(), p, adapters)
        with torch.enable_grad():
            raw = tuple(t.detach().requires_grad_() for t in residuals.pop("qkv"))
            raw_q, raw_k, raw_v = raw
            q, k, v = prepared(raw_q, raw_k, raw_v, p["attn"], self.spec.attention, table)
        heads = (q.detach(), k.detach(), v.detach())
        saved = residuals.pop("out", None)
        if saved is None:
            saved = attention_forward(*heads, **self._sight())
        flat = saved.out.reshape(*x.shape[:2], -1)
        dout = pulled("attn", ("o",), flat, (dmid,), 3).view(saved.out.shape)
        dq, dk, dv = attention_backward(dout, *heads, saved, **self._sight())
        del saved, flat, dout, heads
        draw = torch.autograd.grad((q, k, v), raw, (dq, dk, dv))
        dys = tuple(t.reshape(*x.shape[:2], -1) for t in draw)
        dinner = pulled("attn", ("q", "k", "v"), inner.detach(), dys, 0, need_dx)
        if dinner is None:
            return None
        dx: torch.Tensor = torch.autograd.grad(inner, x, dinner)[0]
        return dx


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
        self,
        part: str,
        names: Any,
        x: torch.Tensor,
        dys: tuple[torch.Tensor, ...],
        step: int,
        need_x: bool = True,
    ) -> Any:
        projections, found = _picked(self.p[part], self.adapters, part, names)
        wanted = [Wanted(a=f is not None, b=f is not None) for f in found]
        seed = seed_after(self.seed, step)
        dx, grads = pull(x, projections, found, seed, dys, wanted, need_x=need_x)
        self.grads.update({(part, n): g for n, g in zip(names, grads, strict=True)})
        return dx


class _Bound(NamedTuple):
    """A layer with its tensors; `adapters` in the computing dtype, `leaves` as they are trained."""

    layer: Layer
    p: tree.Tree
    adapters: tree.Tree
    table: rope.Table | None
    leaves: dict[str, LoRA]


def _cast(adapters: tree.Tree, dtype: torch.dtype) -> tree.Tree:
    """The adapters as the products read them: once a pass, not once a product."""
    with torch.no_grad():
        leaves = tree.leaves(adapters)
        bs = [leaf.b if leaf.scale == 1.0 else leaf.b * leaf.scale for leaf in leaves]
        cast = iter(
            _to([t for leaf, b in zip(leaves, bs, strict=True) for t in (leaf.a, b)], dtype)
        )
        return tree.map(lambda leaf: LoRA(next(cast), next(cast), 1.0, leaf.dropout), adapters)


def _to(tensors: list[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """Each in `dtype`: on a GPU one launch for all of them, where there would be one for each."""
    others = [t for t in tensors if t.dtype != dtype]
    if not others:
        return tensors
    made = [torch.empty(t.shape, dtype=dtype, device=t.device) for t in others]
    torch._foreach_copy_(made, others)
    fresh = iter(made)
    return [t if t.dtype == dtype else next(fresh) for t in tensors]


def _picked(p: tree.Tree, adapters: tree.Tree, part: str, names: Any) -> tuple[Any, Any]:
    return [p[n] for n in names], [tree.get(adapters, part, n) for n in names]


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
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        layer, p, adapters, table, trained = ctx.bound
        saved = iter(ctx.saved_tensors[: ctx.num_kept])
        pairs = zip(ctx.is_tensor, ctx.static, strict=True)
        leaves = [next(saved) if is_tensor else static for is_tensor, static in pairs]
        residuals = _pytree.tree_unflatten(leaves, ctx.structure)
        if layer.offload is not None:
            residuals.update(layer.offload.fetch(layer.index) or {})
        del saved, leaves
        need_dx = ctx.needs_input_grad[1]
        try:
            dx, found = layer.backward(grads[0], residuals, p, adapters, table, need_dx)
        except torch.OutOfMemoryError as problem:
            problem.add_note(
                f"in the backward of layer {layer.index}, whose residuals have {layer.policy}: use "
                "a policy that keeps less, a lower memory budget, or fewer or shorter rows"
            )
            raise
        raw: list[torch.Tensor] = []
        for path in trained:
            part, _, name = path.partition(".")
            grad = found[part, name]
            assert grad.a is not None and grad.b is not None
            raw += [grad.a, grad.b]
        leaves = list(trained.values())
        # Autograd checks dtypes against what is trained; adapters have one dtype, nearly always.
        out = _to(raw, leaves[0].a.dtype) if leaves else []
        for i, leaf in enumerate(leaves):
            if leaf.scale != 1.0:
                out[2 * i + 1] = out[2 * i + 1] * leaf.scale
            out[2 * i] = out[2 * i].to(leaf.a.dtype)
            out[2 * i + 1] = out[2 * i + 1].to(leaf.b.dtype)
        return None, dx, *out
