"""A decoder layer with a hand-written backward over named residuals.

The arithmetic is `decoder.layer`'s, in two halves. What autograd would keep is
spelled out here, so that a `Policy` can keep, offload or recompute each residual, and so that no
output projection of a function written by hand runs twice. Frozen params only; what is trained
itself, and transforms, run through `decoder.layer` and autograd.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.utils import _pytree

from . import dora, rope, tree
from .attention import Heads, Visible
from .fast_attention import SHARED
from .fast_recurrent import MADE
from .half import Half, Residuals
from .halves import PARTS, by_hand, halves
from .lora import LoRA
from .norm import add, add_backward
from .offload import Offload
from .pulling import Found
from .residuals import Policy
from .spec import LayerSpec

# Of hidden states' size as the middle residual is, whose fate they share: what mixer and MLP make,
# and what experts and a shared MLP make, for norms or a gate after them.
LIKE_MID = ("attn_branch", "mlp_branch", "experts", "shared")


class Layer:
    """One layer's static side: its spec, what its tokens see and how its residuals are treated."""

    def __init__(
        self,
        index: int,
        spec: LayerSpec,
        seen: Visible,
        policy: Policy,
        offload: Offload | None,
        seed: int | None,
        stays: bool = False,
    ) -> None:
        self.index, self.spec, self.seen = index, spec, seen
        self.policy, self.offload, self.seed = policy, offload, seed
        self.stays = stays  # on the device, whatever the policy sends away

    def fate(self, name: str) -> str:
        # Others are kept: places of rows, and narrow products, which spare a pass over an input.
        like = "mid" if name in LIKE_MID else "qkv" if name == MADE else name
        fate: str = getattr(self.policy, like, "keep")
        return "keep" if fate == "offload" and self.stays else fate

    def run(
        self,
        x: torch.Tensor,
        p: tree.Tree,
        adapters: tree.Tree,
        table: rope.Table | None,
        starts: torch.Tensor | None = None,
        heads: Heads | None = None,
    ) -> torch.Tensor:
        """x [b, s, e] -> [b, s, e], differentiable in x, the adapters and `heads`, which are keys
        and values to take in place of the layer's own.
        """
        bound = self.bound(x.dtype, p, adapters, table, starts, heads)
        trained = [t for own in bound.leaves.values() for t in _pytree.tree_leaves(own)]
        trained += heads or ()
        if not (x.requires_grad or any(t.requires_grad for t in trained)):
            return bound.forward(x)[0]
        out: torch.Tensor = _Run.apply(bound, x, *trained)  # type: ignore[no-untyped-call]
        return out

    def bound(
        self,
        dtype: torch.dtype,
        p: tree.Tree,
        adapters: tree.Tree,
        table: rope.Table | None,
        starts: torch.Tensor | None = None,
        heads: Heads | None = None,
    ) -> "Bound":
        """The layer with its tensors, for hidden states of `dtype`."""
        if heads is not None:
            heads = (heads[0].detach(), heads[1].detach())
        given = table, self.seen, starts, self.policy, self.seed, heads
        mixer, mlp = halves(self.spec, p, adapters, *given)
        cast = {part for half in (mixer, mlp) for part in half.functions if by_hand(half, part)}
        adapters = {part: own for part, own in (adapters or {}).items() if part in PARTS}
        if heads is not None and adapters.get("attn"):  # of keys and values: where they are made
            own = {name: f for name, f in adapters["attn"].items() if name not in ("k", "v")}
            adapters = {**adapters, "attn": own}
        leaves = dict(tree.items(adapters))
        return Bound(self, mixer, mlp, p, _cast(p, adapters, cast, dtype), leaves)


class Bound(NamedTuple):
    """A layer with its tensors; `adapters` as its functions read them, `leaves` as they are
    trained.
    """

    layer: Layer
    mixer: Half
    mlp: Half
    p: tree.Tree
    adapters: tree.Tree
    leaves: dict[str, LoRA]

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, Residuals]:
        """The output and the residuals by name, all that are not sure to be run again."""
        spec, p = self.layer.spec, self.p
        branch, residuals = self.mixer.forward(x, p, self.adapters)
        residuals["x"] = x
        mid = add(x, branch, p.get("attn_post_norm"), spec)
        if spec.post_norm:
            residuals["attn_branch"] = branch
        del branch
        branch, more = self.mlp.forward(x if spec.parallel else mid, p, self.adapters)
        residuals.update(more)
        if not spec.parallel:
            residuals["mid"] = mid
        if spec.post_norm:
            residuals["mlp_branch"] = branch
        return add(mid, branch, p.get("mlp_post_norm"), spec), residuals

    def backward(
        self, dy: torch.Tensor, residuals: Residuals, need_dx: bool = True
    ) -> tuple[torch.Tensor | None, Found]:
        """dx (None if not needed: the first layer with adapters) and each adapter's gradients;
        residuals that are not there are computed again.
        """
        spec, p = self.layer.spec, self.p
        source = residuals["x"] if spec.parallel else residuals.pop("mid")
        branch = residuals.pop("mlp_branch", None)
        dbranch = add_backward(dy, branch, p.get("mlp_post_norm"), spec)
        del branch
        need_mid = need_dx or not spec.parallel
        given = (dbranch, source, residuals, p, self.adapters)
        dmid, found = self.mlp.backward(*given, onto=dy, need_x=need_mid)
        del source, dbranch, given
        dmid = dy if dmid is None else dmid
        branch = residuals.pop("attn_branch", None)
        dbranch = dy if spec.parallel else dmid
        dbranch = add_backward(dbranch, branch, p.get("attn_post_norm"), spec)
        del branch
        x = residuals.pop("x")
        given = (dbranch, x, residuals, p, self.adapters)
        dx, more = self.mixer.backward(*given, onto=dmid, need_x=need_dx)
        return dx, {**found, **more}


def _cast(p: tree.Tree, adapters: tree.Tree, parts: set[str], dtype: torch.dtype) -> tree.Tree:
    """The adapters of these parts as products read them, once a pass, not once a product; the
    others as they are.
    """
    if not adapters:
        return adapters
    with torch.no_grad():
        own = {part: adapters[part] for part in parts if part in adapters}

        def scaled(path: str, leaf: LoRA) -> LoRA:
            if leaf.magnitude is not None:
                return dora.folded(tree.at(p, path)["weight"], leaf, dtype)
            return leaf if leaf.scale == 1.0 else replace(leaf, b=leaf.b * leaf.scale, scale=1.0)

        own = tree.map_with_path(scaled, own)
        cast = iter(_to([t for leaf in tree.leaves(own) for t in (leaf.a, leaf.b)], dtype))
        made = tree.map(lambda leaf: replace(leaf, a=next(cast), b=next(cast)), own)
        return {**adapters, **made}


def _to(tensors: list[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """Each in `dtype`: on a GPU one launch for all of them, where there would be one for each."""
    others = [t for t in tensors if t.dtype != dtype]
    if not others:
        return tensors
    made = [torch.empty(t.shape, dtype=dtype, device=t.device) for t in others]
    torch._foreach_copy_(made, others)
    fresh = iter(made)
    return [t if t.dtype == dtype else next(fresh) for t in tensors]


class _Run(torch.autograd.Function):
    """Ties a `Bound` into autograd; kept residuals go through save_for_backward."""

    @staticmethod
    def forward(ctx: Any, bound: Bound, x: torch.Tensor, *trained: torch.Tensor) -> torch.Tensor:
        layer = bound.layer
        y, residuals = bound.forward(x)
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
        layer = ctx.bound.layer
        saved = iter(ctx.saved_tensors[: ctx.num_kept])
        pairs = zip(ctx.is_tensor, ctx.static, strict=True)
        leaves = [next(saved) if is_tensor else static for is_tensor, static in pairs]
        residuals = _pytree.tree_unflatten(leaves, ctx.structure)
        if layer.offload is not None:
            residuals.update(layer.offload.fetch(layer.index) or {})
        del saved, leaves
        try:
            dx, found = ctx.bound.backward(grads[0], residuals, ctx.needs_input_grad[1])
        except torch.OutOfMemoryError as problem:
            problem.add_note(
                f"in the backward of layer {layer.index}, whose residuals have {layer.policy}: use "
                "a policy that keeps less, a lower memory budget, or fewer or shorter rows"
            )
            raise
        shared = found.pop(f"attn.{SHARED}", ())
        return None, dx, *_of_trained(ctx.bound, found), *shared


def _of_trained(bound: Bound, found: Found) -> list[torch.Tensor]:
    """The gradients of what is trained, from those of what the functions read."""
    out: list[torch.Tensor] = []
    for path, leaf in bound.leaves.items():
        a, b, *rest = found[path]
        used = tree.at(bound.adapters, path)
        # What was cast has the scale in b, and what was folded the factor of its rows.
        scale = leaf.scale / used.scale
        b = b if scale == 1.0 else b * scale
        if leaf.magnitude is not None and used is not leaf:
            b = b * used.magnitude[:, None].to(b.dtype)
            rest = [rest[0] / dora.never_0(leaf)]
        out += [a, b, *rest]
    # Autograd checks dtypes against what is trained; adapters have one dtype, nearly always.
    trained = [t for leaf in bound.leaves.values() for t in _pytree.tree_leaves(leaf)]
    if trained:
        out = _to(out, trained[0].dtype)
    return [grad.to(t.dtype) for grad, t in zip(out, trained, strict=True)]
