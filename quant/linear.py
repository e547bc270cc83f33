"""The one place that looks at a weight's kind: dense tensor, NF4, Int8 or Fp8."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import KernelError
from ..kernels import nf4 as kernel
from ..kernels import nf4_matvec, nf4_matvec_launch
from ..kernels.fp8 import Rows
from ..kernels.launch import apply, on_gpu
from . import fp8, fp8_product, int8
from .fp8 import Fp8
from .int8 import Int8
from .nf4 import NF4, dequantize
from .stack import Stack, unbind

# How many rows of x a GPU multiplies with the packed weight where no gradient is wanted, as was
# measured to be faster than dequantizing (examples/measurements/kernels_h100.md): in 16 bits so
# many, the more of them only with so many outputs. In fp32 one: with several the kernel's one chain
# of sums rounds more than the dense product.
PACKED_ROWS = 64
FEW_ROWS = 16
PACKED_OUTPUTS = 2048


Leaf = Tensor | NF4 | Int8 | Fp8


def weight_of(leaf: Leaf, dtype: torch.dtype) -> Tensor:
    """The weight as a dense tensor in `dtype`: a cast (or nothing) for a tensor, dequantized for
    NF4, Int8 and Fp8.
    """
    if isinstance(leaf, NF4):
        return dequantize(leaf, dtype)
    if isinstance(leaf, Int8):
        return int8.dequantize(leaf, dtype)
    if isinstance(leaf, Fp8):
        return fp8.dequantize(leaf, dtype)
    if isinstance(leaf, Tensor):
        return leaf.to(dtype)
    if isinstance(leaf, Stack):
        return torch.stack([weight_of(one, dtype) for one in unbind(leaf)])
    raise KernelError(
        f"a weight of type {type(leaf).__name__}: expected a torch.Tensor, NF4, Int8 or Fp8"
    )


def linear(x: Tensor, leaf: Leaf, bias: Tensor | None = None) -> Tensor:
    """x [..., in] times the transpose of the weight [out, in], plus bias [out]; in the dtype of
    `x`.

    A dense weight may be trained: its gradient comes in its own dtype. An NF4 or Fp8 weight is
    frozen: only what is stored is kept for the backward pass, which dequantizes once more. With
    gradients off and at most PACKED_ROWS rows, a GPU reads NF4 packed (kernels/nf4_matvec.py).
    Where the leaf says so the product is in fp8 (quant/fp8_product.py). An Int8 weight is frozen
    too and rounds the rows of x to 8 bits (quant/int8.py).
    """
    if isinstance(leaf, Int8):
        return _plus(int8.linear(x, leaf), bias)
    if not isinstance(leaf, NF4 | Fp8):
        return torch.nn.functional.linear(
            x, weight_of(leaf, x.dtype), bias if bias is None else bias.to(x.dtype)
        )
    if len(leaf.shape) != 2 or x.shape[-1:] != leaf.shape[1:]:
        raise KernelError(
            f"input {list(x.shape)} and {'an NF4' if isinstance(leaf, NF4) else 'an fp8'} weight "
            f"{list(leaf.shape)}: expected [..., in] and [out, in]"
        )
    if isinstance(leaf, NF4) and _stays_packed(x, leaf):
        parts = (leaf.packed, leaf.absmax, leaf.absmax_scale, leaf.absmax_offset)
        rows = nf4_matvec.matvec(
            x.reshape(-1, x.shape[-1]), *parts, leaf.shape[0], leaf.block, leaf.kind
        )
        return _plus(rows.view(*x.shape[:-1], leaf.shape[0]), bias)
    if fp8_product.computes(leaf):
        return _plus(fp8_product.products(x, [leaf])[0], bias)
    flat, structure = pytree.tree_flatten(leaf)
    return _plus(apply(_FrozenLinear, x, structure, *flat), bias)


def rounds(x: Tensor, leaf: Leaf) -> bool:
    """Whether `linear` rounds the rows of x to e4m3: what is as long and of its dtype may stand for
    x.
    """
    packed = isinstance(leaf, NF4) and _stays_packed(x, leaf)
    return fp8_product.computes(leaf) and not packed


def linears(
    x: Tensor,
    leaves: Sequence[Leaf],
    biases: Sequence[Tensor | None],
    rows: Rows | None = None,
) -> tuple[Tensor, ...]:
    """`linear` of one x through several weights; where all are in fp8 it is rounded once. `rows`:
    x in e4m3, where what made it did that and all of them round it.
    """
    if rows is None and (len(leaves) < 2 or not all(rounds(x, leaf) for leaf in leaves)):
        return tuple(linear(x, leaf, bias) for leaf, bias in zip(leaves, biases, strict=True))
    made = fp8_product.products(x, leaves, rows)  # type: ignore[arg-type]
    return tuple(_plus(y, bias) for y, bias in zip(made, biases, strict=True))


def _plus(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y + bias.to(y.dtype)


def _stays_packed(x: Tensor, leaf: NF4) -> bool:
    """Whether the product reads the packed weight rather than dequantizing it."""
    if torch.is_grad_enabled() or x.requires_grad or torch._C._are_functorch_transforms_active():
        return False
    rows = x.numel() // x.shape[-1]
    most = PACKED_ROWS if leaf.shape[0] >= PACKED_OUTPUTS else FEW_ROWS
    return (
        rows <= (1 if x.dtype == torch.float32 else most)
        and x.dtype in kernel.FLOATS
        and nf4_matvec_launch.takes(rows, leaf.shape, leaf.block)
        and on_gpu(x, leaf.packed)
    )


class _FrozenLinear(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, structure: Any, *flat: Tensor) -> Tensor:
        weight = weight_of(pytree.tree_unflatten(list(flat), structure), x.dtype)
        return torch.nn.functional.linear(x, weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, ctx.structure, *flat = inputs
        ctx.save_for_backward(*flat)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        flat = ctx.saved_tensors
        weight = weight_of(pytree.tree_unflatten(list(flat), ctx.structure), grad.dtype)
        return (grad @ weight, None, *(None,) * len(flat))
