"""Projections of rows sorted by expert, without a graph, and their gradients: what `products` has,
for stacks of weights and of adapters.
"""

from collections.abc import Sequence

import torch

from ..kernels.grouped import matmul, outer
from ..quant.grouped import product
from .dispatch import Places
from .lora import LoRA
from .products import Projection, scaled_b

Adapters = Sequence[LoRA | None]


def products(
    rows: torch.Tensor,
    where: Places,
    projections: Sequence[Projection],
    adapters: Adapters,
    lows: Sequence[torch.Tensor] | None = None,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """rows [m, in] -> one [m, out] a projection, and rows A^T [m, r] of each adapted one, which a
    later call with the same rows can be given as `lows`.
    """
    lows = list(_low_ranks(rows, where, adapters) if lows is None else lows)
    remaining, made = iter(lows), []
    for p, adapter in zip(projections, adapters, strict=True):
        term = () if adapter is None else (next(remaining), scaled_b(adapter, rows.dtype))
        y = product(rows, p["weight"], where.offsets, *term)
        if "bias" in p:
            y += p["bias"].to(y.dtype).index_select(0, where.ids)
        made.append(y)
    return made, lows


def _low_ranks(rows: torch.Tensor, where: Places, adapters: Adapters) -> list[torch.Tensor]:
    """In one read of the rows; projections that share A share what it makes."""
    distinct = {id(f.a): f.a for f in adapters if f is not None}
    if not distinct:
        return []
    every = matmul(rows, torch.cat(list(distinct.values()), 1).to(rows.dtype), where.offsets)
    split = every.split_with_sizes([a.shape[1] for a in distinct.values()], 1)
    by_a = dict(zip(distinct, split, strict=True))
    return [by_a[id(f.a)] for f in adapters if f is not None]


def pull_lows(dys: Sequence[torch.Tensor], where: Places, adapters: Adapters) -> list[torch.Tensor]:
    """dy B [m, r] of each adapted projection, which the other gradients need."""
    return [
        matmul(dy, scaled_b(adapter, dy.dtype).mT, where.offsets)
        for dy, adapter in zip(dys, adapters, strict=True)
        if adapter is not None
    ]


def pull_rows(
    dys: list[torch.Tensor],
    where: Places,
    projections: Sequence[Projection],
    adapters: Adapters,
    dlows: Sequence[torch.Tensor],
) -> torch.Tensor:
    """The rows' gradient [m, in]; takes each dy out of its list, to be freed in time."""
    remaining = iter(dlows)
    dys.reverse()
    total: torch.Tensor | None = None
    for p, adapter in zip(projections, adapters, strict=True):
        dy = dys.pop()
        term = () if adapter is None else (next(remaining), adapter.a.to(dy.dtype).mT)
        made = product(dy, p["weight"], where.offsets, *term, turned=True)
        total = made if total is None else total.add_(made)
    assert total is not None
    return total


def pull_weights(
    rows: torch.Tensor,
    where: Places,
    adapters: Adapters,
    dys: Sequence[torch.Tensor],
    dlows: Sequence[torch.Tensor],
    lows: Sequence[torch.Tensor],
    weights: torch.Tensor | None,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The gradients of each adapted projection's a [x, r, in] and b [x, out, r], in fp32 or wider.

    weights [m, 1]: what dys and dlows are still to be multiplied with, row by row, which costs
    least on the narrow side of each product; None: nothing.
    """
    if not dlows:
        return []
    dtype = torch.promote_types(rows.dtype, torch.float32)

    def weighed(narrow: torch.Tensor) -> torch.Tensor:
        return narrow if weights is None else (narrow * weights).to(narrow.dtype)

    every = weighed(dlows[0] if len(dlows) == 1 else torch.cat(list(dlows), 1))
    das = outer(every, rows, where.offsets, dtype).split_with_sizes([d.shape[1] for d in dlows], 1)
    adapted = [(dy, f) for dy, f in zip(dys, adapters, strict=True) if f is not None]
    found = []
    for (dy, adapter), low, da in zip(adapted, lows, das, strict=True):
        db = outer(dy, weighed(low), where.offsets, dtype)
        found.append((da, db if adapter.scale == 1.0 else db * adapter.scale))
    return found
