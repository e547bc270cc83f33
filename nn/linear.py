"""Projections with adapters: y = x W^T + bias + scale (dropped x A^T) B^T.

`project` runs several projections of one input as one differentiable step, so that their input
gradients accumulate in place and the low-rank terms ride on the large products' outputs. A 4-bit
weight is dequantized where it is used, in forward and again in backward, and never kept.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree

from ..kernels.dropout import dropped
from ..kernels.fp8 import Rows
from ..kernels.launch import apply
from ..kernels.low_rank import add_low_rank
from ..quant.fake import Fake
from ..quant.fp8_product import computes, pulled
from ..quant.linear import PACKED_ROWS, linears, weight_of
from ..quant.linear import linear as base_linear
from ..quant.nf4 import NF4
from . import dora, qat
from .lora import LoRA

Projection = dict[str, Any]


def linear(
    x: torch.Tensor, p: Projection, adapter: LoRA | None = None, seed: int | None = None
) -> torch.Tensor:
    """x [..., in] -> [..., out] through {"weight", "bias"?} and an adapter; see `project`."""
    return project(x, [p], [adapter], seed)[0]


def project(
    x: torch.Tensor,
    projections: Sequence[Projection],
    adapters: Sequence[LoRA | None],
    seed: int | None = None,
) -> tuple[torch.Tensor, ...]:
    """x [..., in] -> one [..., out_i] per projection.

    `seed` drives the adapters' dropout (None: no dropout): the same seed drops the same features,
    so a recomputed layer repeats itself. Differentiable in x, dense weights, biases and
    adapters; with DoRA among these in plain operations, without this file's fusions.
    """
    if any(isinstance(p["weight"], Fake) for p in projections):
        return qat.project(x, projections, adapters, seed)
    if any(a is not None and a.magnitude is not None for a in adapters):
        return project_reference(x, projections, adapters, seed)
    if not torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active():
        return tuple(products(x, projections, adapters, seed)[0])
    flat, structure = _pytree.tree_flatten((list(projections), list(adapters)))
    outputs = apply(_Project, structure, seed, x, *flat)
    return tuple(outputs[: len(projections)])


def seed_after(seed: int | None, step: int) -> int | None:
    """The dropout seed of the `step`-th projection after the one that `seed` drives."""
    return None if seed is None else seed + step


def scaled(x: torch.Tensor, scale: float) -> torch.Tensor:
    """scale * x, for which 1 takes no pass."""
    return x if scale == 1.0 else x * scale


def project_reference(
    x: torch.Tensor,
    projections: Sequence[Projection],
    adapters: Sequence[LoRA | None],
    seed: int | None = None,
) -> tuple[torch.Tensor, ...]:
    """What `project` computes, in plain differentiable operations."""
    return tuple(_reference(x, projections, adapters, seed)[: len(projections)])


def _reference(
    x: torch.Tensor,
    projections: Sequence[Projection],
    adapters: Sequence[LoRA | None],
    seed: int | None,
) -> list[torch.Tensor]:
    outputs, lows = [], []
    for i, (p, adapter) in enumerate(zip(projections, adapters, strict=True)):
        if adapter is None:
            outputs.append(base_linear(x, p["weight"], p.get("bias")))
            continue
        dropped = _drop(x, adapter, seed, i)
        low = dropped @ adapter.a.to(x.dtype).mT
        lows.append(low)
        if adapter.magnitude is not None:
            outputs.append(dora.adapted(x, p["weight"], p.get("bias"), adapter, dropped, low))
            continue
        y = base_linear(x, p["weight"], p.get("bias"))
        outputs.append(y + low @ scaled_b(adapter, x.dtype).mT)
    return outputs + lows


def _drop(x: torch.Tensor, adapter: LoRA, seed: int | None, index: int) -> torch.Tensor:
    if seed is None or adapter.dropout == 0.0:
        return x
    return dropped(x, adapter.dropout, seed + index)


def scaled_b(adapter: LoRA, dtype: torch.dtype) -> torch.Tensor:
    """scale * b [out, r] in `dtype`."""
    b = adapter.b if adapter.scale == 1.0 else adapter.b * adapter.scale
    return b.to(dtype)


def _plus(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """total + a @ b, in the memory of `total` where nothing transforms it."""
    if torch._C._are_functorch_transforms_active():  # vmap has no rule for the in-place form
        return total + a @ b
    return total.addmm_(a, b)


def products(
    x: torch.Tensor,
    projections: Sequence[Projection],
    adapters: Sequence[LoRA | None],
    seed: int | None = None,
    lows: Sequence[torch.Tensor] | None = None,
    rows: Rows | None = None,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """`project` without a graph: the outputs, and x A^T [t, r] of each adapted projection, which
    `pull` and a later call with the same x can be given as `lows`. rows: x in e4m3, where all the
    projections round it so (`quant.linear.rounds`) and what made it did. DoRA's adapters are given
    as `dora.folded` makes them, here and in what pulls gradients.
    """
    x2 = x.reshape(-1, x.shape[-1])
    lows = list(_low_ranks(x2, adapters, seed) if lows is None else lows)
    remaining, outputs = iter(lows), []
    if any(computes(p["weight"]) for p in projections):
        pairs = list(zip(projections, adapters, strict=True))
        biases = [None if _folded(adapter) else p.get("bias") for p, adapter in pairs]
        ys = linears(x2, [p["weight"] for p in projections], biases, rows)
        for y, (p, adapter) in zip(ys, pairs, strict=True):
            if _folded(adapter):
                y = _rows_scaled(y, p.get("bias"), adapter)
            if adapter is not None:
                add_low_rank(y, next(remaining), scaled_b(adapter, x2.dtype).mT)
            outputs.append(y.view(*x.shape[:-1], y.shape[-1]))
        return outputs, lows
    for p, adapter in zip(projections, adapters, strict=True):
        low = None if adapter is None else next(remaining)
        y = _product(x2, p, adapter, low)
        outputs.append(y.view(*x.shape[:-1], y.shape[-1]))
    return outputs, lows


def _product(
    x2: torch.Tensor, p: Projection, adapter: LoRA | None, low: torch.Tensor | None
) -> torch.Tensor:
    weight, bias = p["weight"], p.get("bias")
    if adapter is None or low is None:
        return base_linear(x2, weight, bias)
    b = scaled_b(adapter, x2.dtype).mT
    if x2.shape[0] <= PACKED_ROWS or not isinstance(weight, torch.Tensor | NF4):
        if _folded(adapter):
            return _rows_scaled(base_linear(x2, weight), bias, adapter).addmm_(low, b)
        return base_linear(x2, weight, bias).addmm_(low, b)
    # The thin product first: the large one, bound by arithmetic, adds to it on its way out, where
    # a thin one that came second would read and write all of y for little arithmetic.
    y = low @ b if bias is None else torch.addmm(bias.to(x2.dtype), low, b)
    return y.addmm_(x2, dora.scaled_rows(weight_of(weight, x2.dtype), adapter).mT)


def _folded(adapter: LoRA | None) -> bool:
    return adapter is not None and adapter.magnitude is not None


def _rows_scaled(y: torch.Tensor, bias: torch.Tensor | None, adapter: Any) -> torch.Tensor:
    """A base weight's product as DoRA has it, with the bias."""
    y = y * adapter.magnitude
    return y if bias is None else y + bias.to(y.dtype)


def _to_rows(dy: torch.Tensor, adapter: LoRA | None) -> torch.Tensor:
    """The gradient of a base weight's product, of that of what is made of it."""
    return dy if adapter is None or adapter.magnitude is None else dy * adapter.magnitude


def _low_ranks(
    x2: torch.Tensor, adapters: Sequence[LoRA | None], seed: int | None
) -> list[torch.Tensor]:
    """x A^T [t, r] of every adapted projection; one read of x for all where none drops."""
    found = [(i, adapter) for i, adapter in enumerate(adapters) if adapter is not None]
    if not found or _drops(adapters, seed):
        return [_drop(x2, adapter, seed, i) @ adapter.a.to(x2.dtype).mT for i, adapter in found]
    every = x2 @ stacked_a(adapters, x2.dtype).mT
    return list(every.split_with_sizes([adapter.rank for _, adapter in found], dim=1))


def _drops(adapters: Sequence[LoRA | None], seed: int | None) -> bool:
    return seed is not None and any(a is not None and a.dropout > 0.0 for a in adapters)


def stacked_a(adapters: Sequence[LoRA | None], dtype: torch.dtype) -> torch.Tensor:
    """The A of all adapters, one below the other: [sum of r, in]."""
    found = [adapter.a.to(dtype) for adapter in adapters if adapter is not None]
    return found[0] if len(found) == 1 else torch.cat(found)


def _sum_rows(dy: torch.Tensor) -> torch.Tensor:
    """The sum over all but the last axis, in fp32 or wider."""
    return dy.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32))


class Wanted(NamedTuple):
    """Which of a projection's tensors need a gradient."""

    weight: bool = False
    bias: bool = False
    a: bool = False
    b: bool = False


class Grads(NamedTuple):
    """Gradients of one projection, each in its tensor's dtype; None where not wanted."""

    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    a: torch.Tensor | None = None
    b: torch.Tensor | None = None


def pull(
    x: torch.Tensor,
    projections: Sequence[Projection],
    adapters: Sequence[LoRA | None],
    seed: int | None,
    dys: Sequence[torch.Tensor],
    wanted: Sequence[Wanted],
    *,
    need_x: bool = True,
    lows: Sequence[torch.Tensor] | None = None,
) -> tuple[torch.Tensor | None, list[Grads]]:
    """The backward of `project`: its input and the outputs' gradients -> (dx, gradients).

    lows: the low-rank activations of the adapted projections, computed again where not given.
    """
    dx, dlows = pull_input(projections, adapters, seed, dys, need_x=need_x)
    found = pull_weights(x, projections, adapters, seed, dys, dlows, wanted, lows=lows)
    return None if dx is None else dx.view(x.shape), found


def pull_input(
    projections: Sequence[Projection],
    adapters: Sequence[LoRA | None],
    seed: int | None,
    dys: Sequence[torch.Tensor],
    *,
    need_x: bool = True,
    rows: Rows | None = None,
) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
    """The part of `pull` that needs no input: dx [..., in], and dy B [t, r] of each adapted
    projection for `pull_weights`. rows: all dys side by side in e4m3, where all the projections'
    products are in fp8 and what made the dys rounded them.
    """
    flat = [dy.reshape(-1, dy.shape[-1]) for dy in dys]
    dtype = flat[0].dtype
    adapted = [(i, adapter) for i, adapter in enumerate(adapters) if adapter is not None]
    dlows = [flat[i] @ scaled_b(adapter, dtype) for i, adapter in adapted]
    if not need_x:
        return None, dlows
    # As in `products` the thin products come first, and the large ones add to them; those in fp8
    # cannot add.
    eight = [i for i, p in enumerate(projections) if computes(p["weight"])]
    dx: torch.Tensor | None = None
    if eight:
        dx = pulled(
            [_to_rows(flat[i], adapters[i]) for i in eight],
            [projections[i]["weight"] for i in eight],
            rows,
        )
    if _drops(adapters, seed):
        for (i, adapter), dlow in zip(adapted, dlows, strict=True):
            part = _drop(dlow @ adapter.a.to(dtype), adapter, seed, i)
            dx = part if dx is None else dx + part
    elif adapted:
        thin = _side_by_side(dlows), stacked_a(adapters, dtype)
        if dx is None:
            dx = thin[0] @ thin[1]
        elif torch._C._are_functorch_transforms_active():
            dx = dx + thin[0] @ thin[1]
        else:
            dx = add_low_rank(dx, *thin)
    for i, (p, dy) in enumerate(zip(projections, flat, strict=True)):
        if i in eight:
            continue
        weight = dora.scaled_rows(weight_of(p["weight"], dtype), adapters[i])
        dx = dy @ weight if dx is None else _plus(dx, dy, weight)
        del weight
    assert dx is not None
    return dx.view(*dys[0].shape[:-1], dx.shape[-1]), dlows


def pull_weights(
    x: torch.Tensor,
    projections: Sequence[Projection],
    adapters: Sequence[LoRA | None],
    seed: int | None,
    dys: Sequence[torch.Tensor],
    dlows: Sequence[torch.Tensor],
    wanted: Sequence[Wanted],
    *,
    lows: Sequence[torch.Tensor] | None = None,
) -> list[Grads]:
    """The gradients of `pull` beside dx; `dlows` as `pull_input` gives them."""
    x2 = x.reshape(-1, x.shape[-1])
    flat = [dy.reshape(-1, dy.shape[-1]) for dy in dys]
    found = [
        Grads(
            weight=(dy.mT @ x2).to(p["weight"].dtype) if want.weight else None,
            bias=_sum_rows(dy).to(p["bias"].dtype) if want.bias else None,
        )
        for p, dy, want in zip(projections, flat, wanted, strict=True)
    ]
    adapted = [(i, adapter) for i, adapter in enumerate(adapters) if adapter is not None]
    if lows is None and any(wanted[i].b for i, _ in adapted):
        lows = _low_ranks(x2, adapters, seed)
    das: Sequence[torch.Tensor] = ()
    if _drops(adapters, seed):
        das = [
            dlow.mT @ _drop(x2, adapter, seed, i)
            for (i, adapter), dlow in zip(adapted, dlows, strict=True)
        ]
    elif adapted:
        # One product for all of them: these matrices are thin, and each pass over x counts.
        every = _side_by_side(dlows).mT @ x2
        das = every.split_with_sizes([adapter.rank for _, adapter in adapted])
    for at, (i, adapter) in enumerate(adapted):
        if wanted[i].a:
            found[i] = found[i]._replace(a=das[at].to(adapter.a.dtype))
        if wanted[i].b:
            assert lows is not None
            db = (flat[i].mT @ lows[at]).to(adapter.b.dtype)
            found[i] = found[i]._replace(b=db if adapter.scale == 1.0 else db * adapter.scale)
    return found


def _side_by_side(dlows: Sequence[torch.Tensor]) -> torch.Tensor:
    return dlows[0] if len(dlows) == 1 else torch.cat(list(dlows), dim=1)


class _Project(torch.autograd.Function):
    """The outputs, then the low-rank activations x A^T of the adapted ones (not differentiable)."""

    @staticmethod
    def forward(structure: Any, seed: int | None, x: torch.Tensor, *flat: Any) -> Any:
        projections, adapters = _pytree.tree_unflatten(list(flat), structure)
        outputs, lows = products(x, projections, adapters, seed)
        return (*outputs, *lows)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        structure, seed, x, *flat = inputs
        _, adapters = _pytree.tree_unflatten(list(flat), structure)
        lows = output[len(adapters) :]
        ctx.structure, ctx.seed = structure, seed
        is_tensor = [isinstance(leaf, torch.Tensor) for leaf in flat]
        ctx.static = [None if t else leaf for t, leaf in zip(is_tensor, flat, strict=True)]
        ctx.is_tensor, ctx.lows = is_tensor, len(lows)
        ctx.mark_non_differentiable(*lows)
        kept = [leaf for t, leaf in zip(is_tensor, flat, strict=True) if t]
        ctx.save_for_backward(x, *lows, *kept)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, *saved = ctx.saved_tensors
        lows, kept = saved[: ctx.lows], iter(saved[ctx.lows :])
        flat = [
            next(kept) if t else leaf for t, leaf in zip(ctx.is_tensor, ctx.static, strict=True)
        ]
        projections, adapters = _pytree.tree_unflatten(flat, ctx.structure)
        # The same tree with each leaf's place among `flat`, to put its gradient there.
        places = _pytree.tree_unflatten(list(range(len(flat))), ctx.structure)
        needed = ctx.needs_input_grad[3:]
        wanted = [
            Wanted(
                weight=isinstance(p["weight"], torch.Tensor) and needed[p_at["weight"]],
                bias=p.get("bias") is not None and needed[p_at["bias"]],
                a=adapter is not None and needed[a_at.a],
                b=adapter is not None and needed[a_at.b],
            )
            for p, adapter, p_at, a_at in zip(projections, adapters, *places, strict=True)
        ]
        dys = grads[: len(projections)]
        dx, found = pull(
            x,
            projections,
            adapters,
            ctx.seed,
            dys,
            wanted,
            need_x=ctx.needs_input_grad[2],
            # What is kept carries no graph: where this backward is differentiated, made again.
            lows=None if torch.is_grad_enabled() else lows,
        )
        out: list[torch.Tensor | None] = [None] * len(flat)
        for p_at, a_at, want, grad in zip(*places, wanted, found, strict=True):
            if want.weight:
                out[p_at["weight"]] = grad.weight
            if want.bias:
                out[p_at["bias"]] = grad.bias
            if want.a:
                out[a_at.a] = grad.a
            if want.b:
                out[a_at.b] = grad.b
        return None, None, dx, *out

    @staticmethod
    def vmap(info: Any, in_dims: Any, structure: Any, seed: int | None, x: Any, *flat: Any) -> Any:
        # In-place sums into unbatched outputs cannot be batched; the plain operations can. Dropout
        # follows from the seed alone, so every member of the batch drops the same features.
        def reference(x: torch.Tensor, *flat: Any) -> tuple[torch.Tensor, ...]:
            projections, adapters = _pytree.tree_unflatten(list(flat), structure)
            outputs = _reference(x, projections, adapters, seed)
            lows = [low.reshape(-1, low.shape[-1]) for low in outputs[len(projections) :]]
            return tuple(outputs[: len(projections)] + lows)

        outputs = torch.vmap(reference, in_dims=in_dims[2:], randomness="same")(x, *flat)
        return outputs, (0,) * len(outputs)
