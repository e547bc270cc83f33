"""Frozen products in fp8: y = x W^T forward and dx = dy W backward, both operands rounded to e4m3.

A leaf with `fp8_rows` and `fp8_columns` (`computing` adds them) is multiplied so. Each operand has
one scale a row, along which the product sums: the rows of x and of W forward, those of dy and of
W's transpose backward. The gradient is thus that of the dense weight, rounded as the forward
product is, not the derivative of the rounding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import KernelError
from ..kernels import fp8 as kernel
from ..kernels.fp8 import E4M3, Rows, scales_of
from ..kernels.launch import apply
from . import fp8, nf4
from .fp8 import Fp8
from .nf4 import NF4


def computing(leaf: Any) -> Any:
    """An NF4 or Fp8 leaf whose products are in fp8; others, and shapes that such products do not
    take (a side that is no multiple of 16), as they are.
    """
    if not isinstance(leaf, NF4 | Fp8) or not kernel.takes(leaf.shape):
        return leaf
    rows, columns = scales_of(_dense(leaf))
    return dataclasses.replace(leaf, fp8_rows=rows, fp8_columns=columns)


def computes(leaf: Any) -> bool:
    """Whether products with this leaf are in fp8."""
    return isinstance(leaf, NF4 | Fp8) and leaf.fp8_rows is not None


def products(
    x: Tensor, leaves: Sequence[NF4 | Fp8], rows: Rows | None = None
) -> tuple[Tensor, ...]:
    """x [..., in] times the transpose of each [out_i, in]: [..., out_i] in the dtype of x, which
    is rounded to e4m3 once for all, or was where it was made: `rows`.

    Differentiable in x, once, without `rows`. Raises KernelError for shapes that do not fit, and on
    a GPU without e4m3 or for x other than bfloat16 there.
    """
    for leaf in leaves:
        if x.shape[-1:] != leaf.shape[1:]:
            raise KernelError(
                f"input {list(x.shape)} and an fp8 product's weight {list(leaf.shape)}: "
                "expected [..., in] and [out, in]"
            )
    if rows is not None:
        made = _made(rows, leaves, x.dtype)
    else:
        flat, structure = pytree.tree_flatten(list(leaves))
        made = apply(_Products, structure, x.reshape(-1, x.shape[-1]), *flat)
    return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in made)


def pulled(dys: Sequence[Tensor], leaves: Sequence[NF4 | Fp8], rows: Rows | None = None) -> Tensor:
    """The backward of `products`: the sum of dys_i [m, out_i] times leaves_i [out_i, in], [m, in].

    As one product over all outputs, up to three at a time: the sums stay in fp32. `rows`: those of
    all dys, up to three, side by side, where what made them rounded them. It has no derivative:
    asked for one, raises KernelError.
    """
    if rows is not None:
        return _pulled(dys, leaves, rows)
    flat, structure = pytree.tree_flatten(list(leaves))
    if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        dx: Tensor = _Pulled.apply(structure, len(dys), *dys, *flat)  # type: ignore[no-untyped-call]
        return dx
    return _pulled(dys, leaves)


def _dense(leaf: NF4 | Fp8) -> Tensor:
    if isinstance(leaf, NF4):
        return nf4.dequantize(leaf, torch.float32)
    return fp8.dequantize(leaf, torch.float32)


def _forward_rows(leaf: NF4 | Fp8) -> Rows:
    """The weight's rows [out, in]: an Fp8 leaf's own where it has row scales."""
    assert leaf.fp8_rows is not None
    if isinstance(leaf, Fp8):
        if not leaf.blocks:
            return Rows(leaf.codes, leaf.scale)
        scale = leaf.fp8_rows
        return Rows((_dense(leaf) * scale.reciprocal()[:, None]).to(E4M3), scale)
    return Rows(_nf4_rows(leaf, leaf.fp8_rows), leaf.fp8_rows)


def _backward_rows(leaf: NF4 | Fp8, scale: Tensor, out: Tensor) -> None:
    """The rows of the weight's transpose [in, out] into `out`, with these scales [in]."""
    if isinstance(leaf, Fp8):
        out.copy_((_dense(leaf).mT * scale.reciprocal()[:, None]).to(E4M3))
    else:
        _nf4_rows(leaf, scale, out)


def _nf4_rows(leaf: NF4, scale: Tensor, out: Tensor | None = None) -> Tensor:
    """[out, in], or with `out` its transpose there."""
    parts = (leaf.packed, leaf.absmax, leaf.absmax_scale, leaf.absmax_offset)
    transposed = out is not None
    return kernel.nf4_rows(
        *parts, leaf.shape, leaf.block, scale, transposed=transposed, kind=leaf.kind, out=out
    )


def _made(rows: Rows, leaves: Sequence[NF4 | Fp8], dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(kernel.product(rows, _forward_rows(leaf), dtype) for leaf in leaves)


def _pulled(dys: Sequence[Tensor], leaves: Sequence[NF4 | Fp8], rows: Rows | None = None) -> Tensor:
    assert rows is None or len(dys) <= kernel.MOST_PARTS
    total: Tensor | None = None
    for at in range(0, len(dys), kernel.MOST_PARTS):
        some = leaves[at : at + kernel.MOST_PARTS]
        columns = [leaf.fp8_columns for leaf in some if leaf.fp8_columns is not None]
        scale = torch.stack(columns).amax(0) if len(columns) > 1 else columns[0]
        widths = [leaf.shape[0] for leaf in some]
        codes = torch.empty((len(scale), sum(widths)), dtype=E4M3, device=scale.device)
        at_column = 0
        for leaf, width in zip(some, widths, strict=True):
            _backward_rows(leaf, scale, codes[:, at_column : at_column + width])
            at_column += width
        parts = list(dys[at : at + kernel.MOST_PARTS])
        given = kernel.cast_rows(parts) if rows is None else rows
        dx = kernel.product(given, Rows(codes, scale), dys[at].dtype)
        total = dx if total is None else total + dx
    assert total is not None
    return total


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(structure: Any, x: Tensor, *flat: Tensor) -> tuple[Tensor, ...]:
        leaves = pytree.tree_unflatten(list(flat), structure)
        return _made(kernel.cast_rows(x), leaves, x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.structure, _, *flat = inputs
        ctx.save_for_backward(*flat)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> Any:
        flat = ctx.saved_tensors
        leaves = pytree.tree_unflatten(list(flat), ctx.structure)
        return (None, pulled(dys, leaves), *(None,) * len(flat))

    @staticmethod
    def vmap(info: Any, in_dims: Any, structure: Any, x: Tensor, *flat: Tensor) -> Any:
        _check_frozen(in_dims[2:])
        made = apply(_Products, structure, _folded(x, in_dims[1]), *flat)
        many = info.batch_size
        return tuple(y.view(many, -1, y.shape[-1]) for y in made), (0,) * len(made)


class _Pulled(torch.autograd.Function):
    @staticmethod
    def forward(structure: Any, count: int, *tensors: Tensor) -> Tensor:
        leaves = pytree.tree_unflatten(list(tensors[count:]), structure)
        return _pulled(tensors[:count], leaves)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise KernelError("a product in fp8 has first derivatives only; load without compute='fp8'")

    @staticmethod
    def vmap(info: Any, in_dims: Any, structure: Any, count: int, *tensors: Tensor) -> Any:
        _check_frozen(in_dims[2 + count :])
        many = info.batch_size
        dys = [
            _folded(dy if dim is not None else dy.expand(many, *dy.shape), dim or 0)
            for dy, dim in zip(tensors[:count], in_dims[2:], strict=False)
        ]
        dx: Tensor = _Pulled.apply(structure, count, *dys, *tensors[count:])  # type: ignore[no-untyped-call]
        return dx.view(many, -1, dx.shape[-1]), 0


def _folded(x: Tensor, dim: int) -> Tensor:
    """A batch of rows as more rows: each is rounded by itself."""
    moved = x.movedim(dim, 0)
    return moved.reshape(-1, moved.shape[-1])


def _check_frozen(dims: Sequence[int | None]) -> None:
    if any(dim is not None for dim in dims):
        raise KernelError("a weight in fp8 products is frozen and cannot be batched by vmap")
