"""The one place that looks at a weight's kind: dense tensor, NF4 or Int8."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import KernelError
from ..kernels import nf4 as kernel
from ..kernels import nf4_matvec, nf4_matvec_launch
from ..kernels.launch import apply, on_gpu
from . import int8
from .int8 import Int8
from .nf4 import NF4, dequantize

# Up to this many rows of x a GPU multiplies with the packed weight where no gradient is wanted:
# one row at any shape; more in 16 bits alone (in fp32 the kernel's one chain of sums rounds more
# than the dense product) and with so many outputs that it was measured to be faster than
# dequantizing (examples/measurements/kernels_h100.md).
PACKED_ROWS = 16
PACKED_OUTPUTS = 2048


def weight_of(leaf: Tensor | NF4 | Int8, dtype: torch.dtype) -> Tensor:
    """The weight as a dense tensor in `dtype`: a cast (or nothing) for a tensor, dequantized for
    NF4 and Int8.
    """
    if isinstance(leaf, NF4):
        return dequantize(leaf, dtype)
    if isinstance(leaf, Int8):
        return int8.dequantize(leaf, dtype)
    if isinstance(leaf, Tensor):
        return leaf.to(dtype)
    raise KernelError(
        f"a weight of type {type(leaf).__name__}: expected a torch.Tensor, NF4 or Int8"
    )


def linear(x: Tensor, leaf: Tensor | NF4 | Int8, bias: Tensor | None = None) -> Tensor:
    """x [..., in] times the transpose of the weight [out, in], plus bias [out]; in the dtype of
    `x`.

    A dense weight may be trained: its gradient comes in its own dtype. An NF4 weight is frozen:
    only its 4-bit form is kept for the backward pass, which dequantizes once more. With gradients
    off and at most PACKED_ROWS rows, a GPU reads it packed (kernels/nf4_matvec.py). An Int8 weight
    is frozen too and rounds the rows of x to 8 bits (quant/int8.py).
    """
    if isinstance(leaf, Int8):
        return _plus(int8.linear(x, leaf), bias)
    if not isinstance(leaf, NF4):
        return torch.nn.functional.linear(
            x, weight_of(leaf, x.dtype), bias if bias is None else bias.to(x.dtype)
        )
    if len(leaf.shape) != 2 or x.shape[-1:] != leaf.shape[1:]:
        raise KernelError(
            f"input {list(x.shape)} and an NF4 weight {list(leaf.shape)}: "
            "expected [..., in] and [out, in]"
        )
    parts = (leaf.packed, leaf.absmax, leaf.absmax_scale, leaf.absmax_offset)
    if _stays_packed(x, leaf):
        rows = nf4_matvec.matvec(
            x.reshape(-1, x.shape[-1]), *parts, leaf.shape[0], leaf.block, leaf.kind
        )
        return _plus(rows.view(*x.shape[:-1], leaf.shape[0]), bias)
    return _plus(apply(_FrozenLinear, x, *parts, tuple(leaf.shape), leaf.block, leaf.kind), bias)


def _plus(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y + bias.to(y.dtype)


def _stays_packed(x: Tensor, leaf: NF4) -> bool:
    """Whether the product reads the packed weight rather than dequantizing it."""
    if torch.is_grad_enabled() or x.requires_grad or torch._C._are_functorch_transforms_active():
        return False
    rows = x.numel() // x.shape[-1]
    many = x.dtype != torch.float32 and leaf.shape[0] >= PACKED_OUTPUTS
    return (
        rows <= (PACKED_ROWS if many else 1)
        and x.dtype in kernel.FLOATS
        and nf4_matvec_launch.takes(rows, leaf.shape, leaf.block)
        and on_gpu(x, leaf.packed)
    )


def _dense(
    parts: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    shape: tuple[int, int],
    block: int,
    kind: str,
    dtype: torch.dtype,
) -> Tensor:
    return kernel.dequantize(*parts, shape[0] * shape[1], block, dtype, kind=kind).view(shape)


class _FrozenLinear(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        packed: Tensor,
        absmax: Tensor,
        absmax_scale: Tensor | None,
        absmax_offset: Tensor | None,
        shape: tuple[int, int],
        block: int,
        kind: str,
    ) -> Tensor:
        weight = _dense((packed, absmax, absmax_scale, absmax_offset), shape, block, kind, x.dtype)
        return torch.nn.functional.linear(x, weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, packed, absmax, absmax_scale, absmax_offset, ctx.shape, ctx.block, ctx.kind = inputs
        ctx.save_for_backward(packed, absmax, absmax_scale, absmax_offset)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        packed, absmax, absmax_scale, absmax_offset = ctx.saved_tensors
        weight = _dense(
            (packed, absmax, absmax_scale, absmax_offset),
            ctx.shape,
            ctx.block,
            ctx.kind,
            grad.dtype,
        )
        return (grad @ weight, None, None, None, None, None, None, None)
