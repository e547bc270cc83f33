"""A few rows times a 4-bit weight, read packed: decoding's matrix-vector product. Forward only.

The dense path writes the weight out in 16 bits and reads it again, five times the bytes of its
4-bit form; with few rows the product waits for those bytes. In 16 bits it is a product of
nf4_products.py, on tensor cores. In fp32 a program takes some outputs (rows of the weight), walks
along them in runs of at most 64 weights, each within one block, and looks the levels up; where the
outputs are too few to fill a GPU, several programs share one and their sums are added after. A
low-rank term is added at the end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import KernelError
from . import nf4
from .launch import on_gpu, ops
from .nf4_launch import UNIT
from .nf4_matvec_launch import takes
from .nf4_products import MOST_ROWS


def matvec(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    absmax_scale: Tensor | None,
    absmax_offset: Tensor | None,
    outputs: int,
    block: int,
    kind: str = "nf4",
    low: Tensor | None = None,
    b: Tensor | None = None,
) -> Tensor:
    """x [m, in] times the transpose of a 4-bit weight [outputs, in], plus low [m, r] times the
    transpose of b [outputs, r]; [m, outputs] in the dtype of x, summed in fp32.

    The weight's parts are those of `nf4.dequantize`. Forward only. Raises KernelError when x needs
    a gradient, for more than 64 rows, and for an `in` that is not whole runs of min(block, 64).
    """
    if x.dim() != 2 or x.dtype not in (*nf4.FLOATS, torch.float64):
        raise KernelError(f"x is {x.dtype} {list(x.shape)}: expected floating point [rows, in]")
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, low, b)):
        raise KernelError("x, low or b needs a gradient: this product has none, use quant.linear")
    rows, width = x.shape
    nf4.check_block(block)
    nf4.check_kind(kind)
    nf4._check_parts(packed, absmax, absmax_scale, absmax_offset, outputs * width, block)
    if not takes(rows, (outputs, width), block):
        raise KernelError(
            f"x {list(x.shape)} in blocks of {block}: expected 1 to {MOST_ROWS} rows of a multiple "
            f"of {min(block, UNIT)} values; dequantize and multiply instead"
        )
    if (low is None) != (b is None):
        raise KernelError("low and b: give both or neither")
    if low is not None and b is not None:
        if low.shape[:-1] != (rows,) or b.shape != (outputs, low.shape[-1]) or not b.shape[1]:
            raise KernelError(
                f"low {list(low.shape)} and b {list(b.shape)}: expected [{rows}, r] and "
                f"[{outputs}, r]"
            )
    parts = (packed, absmax, absmax_scale, absmax_offset)
    if on_gpu(x, *parts, low, b):
        y: Tensor = ops.nf4_matvec(x, *parts, low, b, outputs, block, kind)
        return y
    return matvec_reference(x, *parts, outputs, block, kind, low, b)


def matvec_reference(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    absmax_scale: Tensor | None,
    absmax_offset: Tensor | None,
    outputs: int,
    block: int,
    kind: str = "nf4",
    low: Tensor | None = None,
    b: Tensor | None = None,
) -> Tensor:
    """Plain torch for `matvec`: the product in fp32 (fp64 for fp64), rounded once."""
    wide = torch.promote_types(x.dtype, torch.float32)
    count = outputs * x.shape[1]
    parts = (packed, absmax, absmax_scale, absmax_offset)
    weight = nf4.dequantize_reference(*parts, count, block, wide, kind).view(outputs, -1)
    y = x.to(wide) @ weight.mT
    if low is not None and b is not None:
        y = y + low.to(wide) @ b.to(wide).mT
    return y.to(x.dtype)
