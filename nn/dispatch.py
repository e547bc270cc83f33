"""Tokens to the rows that their experts read, sorted by expert, and back.

All is on the device: how many rows each expert has is never asked for.
"""

from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from ..kernels.grouped import offsets_of
from ..kernels.weighted_rows import weighted_sum

# Rows whose gradients are in fp32 at a time.
CHUNK = 1 << 14


class Places(NamedTuple):
    """order [m]: which choice (token * active + place) each sorted row is of; back [m]: the sorted
    row of each choice; ids [m]: each sorted row's expert; offsets int32 [x + 1]: where each
    expert's rows begin.
    """

    order: torch.Tensor
    back: torch.Tensor
    ids: torch.Tensor
    offsets: torch.Tensor


def places(chosen: torch.Tensor, experts: int) -> Places:
    """chosen [t, active] -> where the m = t * active choices lie when sorted by expert."""
    ids, order = chosen.flatten().sort(stable=True)
    rows = torch.arange(len(order), device=order.device)
    back = torch.empty_like(order).scatter_(0, order, rows)
    return Places(order, back, ids, offsets_of(ids, experts))


def spread(x: torch.Tensor, where: Places, active: int) -> torch.Tensor:
    """x [t, e] -> the rows [m, e] of every choice, sorted by expert; differentiable."""
    rows: torch.Tensor = _Spread.apply(x, where.order, where.back, active)  # type: ignore[no-untyped-call]
    return rows


def combine(rows: torch.Tensor, weights: torch.Tensor, where: Places) -> torch.Tensor:
    """rows [m, e] of the choices, sorted by expert -> each token's weighed sum [t, e], summed in
    the dtype of weights [t, active] and rounded once; differentiable in both.
    """
    y: torch.Tensor = _Combine.apply(rows, weights, where.order, where.back)  # type: ignore[no-untyped-call]
    return y


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(
        x: torch.Tensor, order: torch.Tensor, back: torch.Tensor, active: int
    ) -> torch.Tensor:
        return x.index_select(0, order // active)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, _, back, ctx.active = inputs
        ctx.save_for_backward(back)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        (back,) = ctx.saved_tensors
        return weighted_sum(grad, back.view(-1, ctx.active)), None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(
        rows: torch.Tensor, weights: torch.Tensor, order: torch.Tensor, back: torch.Tensor
    ) -> torch.Tensor:
        return weighted_sum(rows, back.view(weights.shape), weights)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        rows, weights, order, back = ctx.saved_tensors
        drows = dweights = None
        if ctx.needs_input_grad[0]:
            active = weights.shape[1]
            weight = weights.flatten().index_select(0, order)[:, None]
            drows = torch.empty_like(rows)
            for i in range(0, len(rows), CHUNK):
                own = slice(i, i + CHUNK)
                drows[own] = grad.index_select(0, order[own] // active) * weight[own]
        if ctx.needs_input_grad[1]:
            found = [
                (_rows(rows, own).to(weights.dtype) * dy[:, None]).sum(-1)
                for own, dy in _chunks(back.view(weights.shape), grad)
            ]
            dweights = torch.cat(found)
        return drows, dweights, None, None


def _rows(rows: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """The rows [c, active, e] of the choices own [c, active]."""
    return rows.index_select(0, own.flatten()).view(*own.shape, -1)


def _chunks(back: torch.Tensor, other: torch.Tensor) -> Any:
    step = max(1, CHUNK // back.shape[1])
    return zip(torch.split(back, step), torch.split(other, step), strict=True)
