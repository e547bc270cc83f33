"""Products of several projections of one input with their adapters, and their gradients, without a
graph: what `linear.project` is made of, and layers that write their own backward.

Input gradients accumulate in place and the low-rank terms ride on the large products' outputs. A
4-bit weight is dequantized where it is used, in forward and again in backward, and never kept.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ..kernels.dropout import dropped
from ..kernels.fp8 import Rows
from ..kernels.low_rank import add_low_rank
from ..quant.fp8_product import computes, pulled
from ..quant.linear import PACKED_ROWS, linear, linears, weight_of
from ..quant.nf4 import NF4
from . import dora
from .lora import LoRA

Projection = dict[str, Any]


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


def products(
    x: torch.Tensor,
    projections: Sequence[Projection],
    adapters: Sequence[LoRA | None],
    seed: int | None = None,
    lows: Sequence[torch.Tensor] | None = None,
    rows: Rows | None = None,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """x [..., in] -> one [..., out_i] per projection, and x A^T [t, r] of each adapted one, which
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
        return linear(x2, weight, bias)
    b = scaled_b(adapter, x2.dtype).mT
    if x2.shape[0] <= PACKED_ROWS or not isinstance(weight, torch.Tensor | NF4):
        if _folded(adapter):
            return _rows_scaled(linear(x2, weight), bias, adapter).addmm_(low, b)
        return linear(x2, weight, bias).addmm_(low, b)
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
        return [drop(x2, adapter, seed, i) @ adapter.a.to(x2.dtype).mT for i, adapter in found]
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


def drop(x: torch.Tensor, adapter: LoRA, seed: int | None, index: int) -> torch.Tensor:
    """x [..., in] as the adapter of the projection of this index reads it, features dropped."""
    if seed is None or adapter.dropout == 0.0:
        return x
    return dropped(x, adapter.dropout, seed + index)


def scaled_b(adapter: LoRA, dtype: torch.dtype) -> torch.Tensor:
    """scale * b [out, r] in `dtype`."""
    b = adapter.b if adapter.scale == 1.0 else adapter.b * adapter.scale
    return b.to(dtype)


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
    """The backward of `products`: its input and the outputs' gradients -> (dx, gradients).

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
            part = drop(dlow @ adapter.a.to(dtype), adapter, seed, i)
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
            dlow.mT @ drop(x2, adapter, seed, i)
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


def _plus(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """total + a @ b, in the memory of `total` where nothing transforms it."""
    if torch._C._are_functorch_transforms_active():  # vmap has no rule for the in-place form
        return total + a @ b
    return total.addmm_(a, b)
