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
from ..kernels.attention_reference import Keywords
from . import rope, tree
from .activation import activated, inputs
from .activation import pull as pull_activated
from .attention import prepared, terms
from .linear import Grads, Wanted, products, pull_input, pull_weights, seed_after
from .lora import LoRA
from .mlp import TILE_SEEDS
from .norm import add, add_backward, norm
from .offload import Offload
from .residuals import Policy
from .spec import LayerSpec, MLPSpec

# What o and down make, of which a layer with norms after its branches needs the values.
BRANCHES = ("attn_branch", "mlp_branch")

Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Lows = list[torch.Tensor]
Found = dict[tuple[str, str], Grads]


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
        # `decoder.uncovered` tells
        assert isinstance(spec.mlp, MLPSpec) and spec.attention is not None
        self.attention, self.mlp = spec.attention, spec.mlp
        self.stays = stays  # on the device, whatever the policy sends away

    def fate(self, name: str) -> str:
        if name == "lows":  # a few columns a projection, which spare a pass over its input
            return "keep"
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

    def _qkv(
        self, inner: torch.Tensor, p: tree.Tree, adapters: tree.Tree, lows: Lows | None = None
    ) -> tuple[Heads, Lows]:
        """The raw heads of normalised inner, before clipping, q/k norm and rotation."""
        a = self.attention
        (q, k, v), lows = products(
            inner, *_picked(p["attn"], adapters, "attn", "qkv"), self.seed, lows
        )
        b, s, _ = inner.shape
        heads = (
            q.view(b, s, a.heads, a.head_dim),
            k.view(b, s, a.kv_heads, a.head_dim),
            v.view(b, s, a.kv_heads, a.head_dim),
        )
        return heads, lows

    def _attend(self, heads: Heads, p: tree.Tree, table: rope.Table | None) -> Saved:
        q, k, v = prepared(*heads, p["attn"], self.attention, table)
        return attention_forward(q, k, v, **self._sight(p, k))

    def _sight(self, p: tree.Tree, k: torch.Tensor) -> Keywords:
        """What attention is told beside its tensors."""
        a = self.attention
        how = terms(a, p["attn"], k.shape[1], k.device)
        return {**how, "documents": self.documents, "window": a.window}

    def _gate_up(
        self,
        inner: torch.Tensor,
        p: tree.Tree,
        adapters: tree.Tree,
        seed: int | None,
        lows: Lows | None = None,
    ) -> tuple[list[torch.Tensor], Lows]:
        """What the activation reads, of the MLP's normalised input."""
        picked = _picked(p["mlp"], adapters, "mlp", inputs(self.mlp))
        return products(inner, *picked, seed_after(seed, 4), lows)

    def _tiles(self, tokens: int) -> list[tuple[slice, int | None]]:
        """Which tokens the MLP runs on at a time, and the seed of their dropout."""
        tile = self.policy.tile
        if tile is None or tile >= tokens:
            return [(slice(0, tokens), self.seed)]
        return [
            (slice(at, at + tile), seed_after(self.seed, TILE_SEEDS * (at // tile)))
            for at in range(0, tokens, tile)
        ]

    # The two directions.

    def forward(
        self, x: torch.Tensor, p: tree.Tree, adapters: tree.Tree, table: rope.Table | None
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """The output and the residuals by name, all that are not sure to be run again."""
        heads, low_qkv = self._qkv(self._attn_in(x, p), p, adapters)
        saved = self._attend(heads, p, table)
        residuals: dict[str, Any] = {"x": x, "out": saved}
        if self.fate("qkv") != "recompute":
            residuals["qkv"] = heads
        del heads
        out = saved.out.reshape(*x.shape[:2], -1)
        (o,), low_o = products(
            out, *_picked(p["attn"], adapters, "attn", "o"), seed_after(self.seed, 3)
        )
        mid = add(x, o, p.get("attn_post_norm"), self.spec)
        down, gate_up, low_mlp = self._mlp_forward(x if self.spec.parallel else mid, p, adapters)
        residuals["lows"] = {"qkv": low_qkv, "o": low_o, **low_mlp}
        if gate_up is not None:
            residuals["gate_up"] = gate_up
        if not self.spec.parallel:
            residuals["mid"] = mid
        if self.spec.post_norm:
            residuals.update(attn_branch=o, mlp_branch=down)
        return add(mid, down, p.get("mlp_post_norm"), self.spec), residuals

    def _mlp_forward(
        self, source: torch.Tensor, p: tree.Tree, adapters: tree.Tree
    ) -> tuple[torch.Tensor, list[torch.Tensor] | None, dict[str, Lows]]:
        """What down makes of the MLP's unnormalised input, and what to keep: nothing of tiles."""
        rows = source.reshape(-1, source.shape[-1])
        tiles, made = self._tiles(len(rows)), []
        for tile, seed in tiles:
            inner = self._mlp_in(rows[tile] if len(tiles) > 1 else source, p)
            gate_up, low_gate_up = self._gate_up(inner, p, adapters, seed)
            hidden = activated(gate_up, self.mlp, p["mlp"])
            kept = None if self.fate("gate_up") == "recompute" else gate_up
            del gate_up
            (down,), low_down = products(
                hidden, *_picked(p["mlp"], adapters, "mlp", ("down",)), seed_after(seed, 6)
            )
            del hidden
            made.append(down)
        if len(tiles) > 1:
            return torch.cat(made).view(source.shape), None, {}
        return down, kept, {"gate_up": low_gate_up, "down": low_down}

    def backward(
        self,
        dy: torch.Tensor,
        residuals: dict[str, Any],
        p: tree.Tree,
        adapters: tree.Tree,
        table: rope.Table | None,
        need_dx: bool = True,
    ) -> tuple[torch.Tensor | None, Found]:
        """dx (None if not needed: the first layer with adapters) and each adapter's gradients;
        residuals that are not there are computed again.
        """
        grads: Found = {}
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
        grads: Found,
    ) -> torch.Tensor:
        branch = residuals.pop("mlp_branch", None)
        dy = add_backward(dy, branch, p.get("mlp_post_norm"), self.spec)
        mid = residuals["x"] if self.spec.parallel else residuals.pop("mid")
        gate_up, lows = residuals.pop("gate_up", None), residuals["lows"]
        tiles = self._tiles(mid.numel() // mid.shape[-1])
        if len(tiles) == 1:
            return self._tile_backward(dy, mid, gate_up, lows, p, adapters, grads, self.seed)
        dys, mids = (t.reshape(-1, t.shape[-1]) for t in (dy, mid))
        made = torch.empty_like(mids)
        for tile, seed in tiles:
            found: Found = {}
            made[tile] = self._tile_backward(
                dys[tile], mids[tile], None, {}, p, adapters, found, seed
            )
            for key, grad in found.items():
                grads[key] = _summed(grads[key], grad) if key in grads else grad
        return made.view(mid.shape)

    def _tile_backward(
        self,
        dy: torch.Tensor,
        mid: torch.Tensor,
        gate_up: list[torch.Tensor] | None,
        lows: dict[str, Lows],
        p: tree.Tree,
        adapters: tree.Tree,
        grads: Found,
        seed: int | None,
    ) -> torch.Tensor:
        """The MLP's backward for some tokens: dy of its output to that of its input."""
        down = _Puller(p, adapters, "mlp", ("down",), seed_after(seed, 6), grads)
        wide = _Puller(p, adapters, "mlp", inputs(self.mlp), seed_after(seed, 4), grads)
        with torch.enable_grad():
            mid = mid.detach().requires_grad_()
            inner = self._mlp_in(mid, p)
        again = gate_up is None
        if gate_up is None:
            gate_up, _ = self._gate_up(inner.detach(), p, adapters, seed, lows.get("gate_up"))
        dhidden = down.input((dy,))
        hidden, dgate_up = pull_activated(dhidden, gate_up, self.mlp, p["mlp"], spend=again)
        del gate_up, dhidden
        down.weights(hidden, lows.get("down"))
        del hidden
        dinner = wide.input(tuple(dgate_up))
        wide.weights(inner.detach(), lows.get("gate_up"))
        dmid: torch.Tensor = torch.autograd.grad(inner, mid, dinner)[0]
        return dmid

    def _attention_backward(
        self,
        dmid: torch.Tensor,
        residuals: dict[str, Any],
        p: tree.Tree,
        adapters: tree.Tree,
        table: rope.Table | None,
        grads: Found,
        need_dx: bool,
    ) -> torch.Tensor | None:
        lows = residuals["lows"]
        o = _Puller(p, adapters, "attn", ("o",), seed_after(self.seed, 3), grads)
        qkv = _Puller(p, adapters, "attn", ("q", "k", "v"), self.seed, grads)
        branch = residuals.pop("attn_branch", None)
        dmid = add_backward(dmid, branch, p.get("attn_post_norm"), self.spec)
        with torch.enable_grad():
            x = residuals.pop("x").detach().requires_grad_()
            inner = self._attn_in(x, p)
        if "qkv" not in residuals:
            residuals["qkv"], _ = self._qkv(inner.detach(), p, adapters, lows["qkv"])
        with torch.enable_grad():
            raw = tuple(t.detach().requires_grad_() for t in residuals.pop("qkv"))
            raw_q, raw_k, raw_v = raw
            q, k, v = prepared(raw_q, raw_k, raw_v, p["attn"], self.attention, table)
        heads = (q.detach(), k.detach(), v.detach())
        sight = self._sight(p, k)
        saved = residuals.pop("out", None)
        if saved is None:
            saved = attention_forward(*heads, **sight)
        flat = saved.out.reshape(*x.shape[:2], -1)
        dout = o.input((dmid,)).view(saved.out.shape)
        o.weights(flat, lows["o"])
        dq, dk, dv = attention_backward(dout, *heads, saved, **sight)
        del saved, flat, dout, heads
        draw = torch.autograd.grad((q, k, v), raw, (dq, dk, dv))
        dys = tuple(t.reshape(*x.shape[:2], -1) for t in draw)
        dinner = qkv.input(dys, need_dx)
        qkv.weights(inner.detach(), lows["qkv"])
        if dinner is None:
            return None
        dx: torch.Tensor = torch.autograd.grad(inner, x, dinner)[0]
        return dx


def _summed(total: Grads, more: Grads) -> Grads:
    """Of tiles, added in fp32 or wider."""

    def plus(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
        if a is None or b is None:
            return None
        return a.to(torch.promote_types(a.dtype, torch.float32)) + b

    return Grads(a=plus(total.a, more.a), b=plus(total.b, more.b))


class _Puller:
    """Pulls a gradient through projections of one input, and notes those of their adapters."""

    def __init__(
        self,
        p: tree.Tree,
        adapters: tree.Tree,
        part: str,
        names: Any,
        seed: int | None,
        grads: Found,
    ) -> None:
        self.projections, self.adapters = _picked(p[part], adapters, part, names)
        self.keys = [(part, name) for name in names]
        self.seed, self.grads = seed, grads

    def input(self, dys: tuple[torch.Tensor, ...], need_x: bool = True) -> Any:
        """The gradient of the input, None where it is not needed."""
        self.dys = dys
        dx, self.dlows = pull_input(self.projections, self.adapters, self.seed, dys, need_x=need_x)
        return dx

    def weights(self, x: torch.Tensor, lows: Lows | None) -> None:
        """Note the adapters' gradients, given the input; after `input`."""
        wanted = [Wanted(a=f is not None, b=f is not None) for f in self.adapters]
        given = (self.projections, self.adapters, self.seed, self.dys, self.dlows, wanted)
        found = pull_weights(x, *given, lows=lows)
        self.grads.update(zip(self.keys, found, strict=True))


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
