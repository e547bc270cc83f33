"""Rows sorted by group, each times its own group's weight and adapter, as one differentiable step.

No part of it waits for the device: where a group's rows begin is a tensor there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..errors import KernelError
from ..kernels import grouped as kernel
from ..kernels.grouped_nf4_launch import takes
from .nf4 import NF4
from .stack import Stack


def covers(leaf: Any) -> bool:
    """Whether `linear` has a product for this stack of weights: dense ones, and 4-bit ones."""
    if isinstance(leaf, Tensor):
        return leaf.dim() == 3
    return (
        isinstance(leaf, Stack)
        and isinstance(leaf.inner, NF4)
        and leaf.inner.fp8_rows is None
        and takes(tuple(leaf.shape[1:]), leaf.inner.block)
    )


def linear(
    x: Tensor,
    leaf: Any,
    offsets: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """x [m, in] -> [m, out]: rows offsets[i] to offsets[i + 1] times the transpose of weight i of
    `leaf`, plus scale (x a_i^T) b_i^T.

    leaf: a tensor [x, out, in] or a `Stack` of NF4; offsets int32 [x + 1]; a [x, r, in], b [x, out,
    r]. Differentiable in x, a, b and a dense leaf; gradients have the dtype of what they are of.
    Raises KernelError for other weights.
    """
    dense, static, parts = _taken(leaf)
    y: Tensor = _Grouped.apply(x, offsets, dense, a, b, scale, static, *parts)[0]  # type: ignore[no-untyped-call]
    return y


def product(
    x: Tensor,
    leaf: Any,
    offsets: Tensor,
    low: Tensor | None = None,
    b: Tensor | None = None,
    *,
    turned: bool = False,
) -> Tensor:
    """`linear` without a graph, and with the narrow product low [m, r] given, of which low b_i^T is
    added. turned: x [m, out] times the weights themselves, b [x, in, r]. Raises KernelError.
    """
    return _product(x, offsets, _taken(leaf), low, b, turned)


def _taken(leaf: Any) -> Any:
    """(a dense stack or None, what is not a tensor of a 4-bit one, its four tensors)."""
    if not covers(leaf):
        raise KernelError(
            f"a stack of {type(getattr(leaf, 'inner', leaf)).__name__}: grouped products take "
            "dense weights [x, out, in] and NF4 ones"
        )
    if isinstance(leaf, Tensor):
        return leaf, None, (None,) * 4
    one = leaf.inner
    parts = (one.packed, one.absmax, one.absmax_scale, one.absmax_offset)
    return None, (tuple(leaf.shape[1:]), one.block, one.kind), parts


def _product(x: Tensor, offsets: Tensor, weight: Any, low: Any, b: Any, turned: bool) -> Tensor:
    dense, static, parts = weight
    if dense is None:
        shape, block, kind = static
        four = (parts[0], parts[1], parts[2], parts[3])
        return kernel.matmul_nf4(x, *four, offsets, shape, block, kind, low, b, turned=turned)
    dense = dense.to(x.dtype)
    return kernel.matmul(x, dense.mT if turned else dense, offsets, low, b)


class _Grouped(torch.autograd.Function):
    """The product, and x a^T, which its backward needs."""

    @staticmethod
    def forward(
        x: Tensor,
        offsets: Tensor,
        dense: Tensor | None,
        a: Tensor | None,
        b: Tensor | None,
        scale: float,
        static: Any,
        *parts: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        low = term = None
        if a is not None and b is not None:
            low, term = kernel.matmul(x, a.to(x.dtype), offsets), (b * scale).to(x.dtype)
        return _product(x, offsets, (dense, static, parts), low, term, False), low

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, offsets, dense, a, b, ctx.scale, ctx.static, *parts = inputs
        _, low = output
        if low is not None:
            ctx.mark_non_differentiable(low)
        ctx.save_for_backward(x, offsets, low, dense, a, b, *parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, _: Any) -> Any:
        x, offsets, low, dense, a, b, *parts = ctx.saved_tensors
        need_x, _, need_w, need_a, need_b = ctx.needs_input_grad[:5]
        dx = dw = da = db = dlow = turned = None
        if low is not None and (need_x or need_a):
            dlow = kernel.matmul(dy, (b * ctx.scale).to(dy.dtype).mT, offsets)
            turned = a.to(dy.dtype).mT
        if need_x:
            dx = _product(dy, offsets, (dense, ctx.static, parts), dlow, turned, True)
        if need_w:
            dw = kernel.outer(dy, x, offsets, dense.dtype)
        if need_a and dlow is not None:
            da = kernel.outer(dlow, x, offsets, a.dtype)
        if need_b and low is not None:
            db = kernel.outer(dy, low, offsets, b.dtype) * ctx.scale
        return (dx, None, dw, da, db, None, None, *[None] * len(parts))
