"""Products in fp8: rows of e4m3 (four exponent bits, three of mantissa, Micikevicius et al., "FP8
Formats for Deep Learning", arXiv 2209.05433), each with one fp32 scale.

A row's scale is its largest magnitude / 448, the largest e4m3 number, so that nothing overflows; a
product contracts rows with rows and multiplies both scales in at the end. Forward, y = x W^T, needs
the rows of W [n, k]; backward, dx = dy W, those of its transpose: the same weight is rounded in
another direction, with scales of its own. e4m3 is a floating format: a scale too large costs range
at the small end, not precision.

The references here define the arithmetic, and emulate it where there is no such hardware; the
Triton launches are in fp8_launch.py and fp8_nf4_launch.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import KernelError
from . import fp8_nf4_launch as fp8_nf4_launch  # which defines its launch
from . import nf4
from .fp8_launch import LARGEST, TINY
from .launch import on_gpu, ops
from .nf4 import FLOATS

E4M3 = torch.float8_e4m3fn
MULTIPLE = 16  # what both sides of a weight must be a multiple of, for the tensor cores
MOST_PARTS = 3


class Rows(NamedTuple):
    """codes e4m3 [m, k] and scale fp32 [m]: a value is its code times the scale of its row."""

    codes: Tensor
    scale: Tensor


def takes(shape: Sequence[int]) -> bool:
    """Whether a weight of this shape [out, in] can be in such a product."""
    return len(shape) == 2 and all(n > 0 and n % MULTIPLE == 0 for n in shape)


def lacks(device: torch.device) -> bool:
    """Whether `device` is a GPU without e4m3 (compute capability below 8.9)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9)


def check_device(device: torch.device) -> None:
    """Raise KernelError on a GPU that has no e4m3 products."""
    if lacks(device):
        major, minor = torch.cuda.get_device_capability(device)
        raise KernelError(
            f"fp8 products on {device}, of compute capability {major}.{minor}: they need 8.9 (Ada, "
            "Hopper) or above; leave compute='fp8' out"
        )


def scale_of(amax: Tensor) -> Tensor:
    """The fp32 scales of rows whose largest magnitudes are `amax`; never zero."""
    most = amax.float().clamp(min=TINY)
    # By a tensor: a GPU divides by a number as it multiplies with the reciprocal.
    return most / torch.full_like(most, LARGEST)


def scales_of(w: Tensor) -> tuple[Tensor, Tensor]:
    """The fp32 scales of the dense weight w [n, k]: of its rows [n], and of its transpose's [k]."""
    size = w.abs()
    return scale_of(size.amax(1)), scale_of(size.amax(0))


def cast_rows(x: Tensor | Sequence[Tensor]) -> Rows:
    """The rows of x [m, k] (bf16, fp16 or fp32) in e4m3.

    Up to three tensors [m, k_i] are taken for one, side by side, with one scale a row. A row of
    zeros has zero codes; one with a NaN or an infinity gives NaN. Raises KernelError.
    """
    parts = [x] if isinstance(x, Tensor) else list(x)
    if not 1 <= len(parts) <= MOST_PARTS:
        raise KernelError(f"{len(parts)} tensors side by side: expected 1 to {MOST_PARTS}")
    for part in parts:
        if part.dim() != 2 or part.dtype not in FLOATS or part.dtype != parts[0].dtype:
            raise KernelError(
                f"rows of {part.dtype} {list(part.shape)}: fp8 takes bfloat16, float16 or float32 "
                "[m, k], side by side of one dtype"
            )
        if part.shape[0] != parts[0].shape[0] or part.shape[1] == 0:
            raise KernelError(
                f"shapes {', '.join(str(list(p.shape)) for p in parts)} side by side: expected as "
                "many rows in each, and columns in all"
            )
    if on_gpu(*parts):
        check_device(parts[0].device)
        codes, scale = ops.fp8_cast_rows(*parts, *(None,) * (MOST_PARTS - len(parts)))
        return Rows(codes, scale)
    return cast_rows_reference(parts)


def cast_rows_reference(parts: Sequence[Tensor]) -> Rows:
    """Plain torch for `cast_rows`."""
    wide = torch.cat([part.float() for part in parts], 1)
    scale = scale_of(wide.abs().amax(1))
    return Rows((wide * scale.reciprocal()[:, None]).to(E4M3), scale)


def nf4_rows(
    packed: Tensor,
    absmax: Tensor,
    absmax_scale: Tensor | None,
    absmax_offset: Tensor | None,
    shape: Sequence[int],
    block: int,
    scale: Tensor,
    *,
    transposed: bool = False,
    kind: str = "nf4",
    out: Tensor | None = None,
) -> Tensor:
    """A weight [n, k] in NF4 (parts as in nf4.py) as e4m3 codes [n, k], or [k, n] if transposed.

    scale fp32: that of each row of what is made, [n] or [k]; from `scale_of` its largest
    magnitude or more. out: receives it, e4m3 of that shape with unit stride in a row. Raises
    KernelError, also for a side that is no multiple of 16.
    """
    nf4.check_block(block)
    nf4.check_kind(kind)
    if not takes(shape):
        raise KernelError(
            f"a weight of shape {list(shape)}: fp8 takes [n, k], both multiples of {MULTIPLE}"
        )
    n, k = shape
    nf4._check_parts(packed, absmax, absmax_scale, absmax_offset, n * k, block)
    made = (k, n) if transposed else (n, k)
    if scale.dtype != torch.float32 or scale.shape != made[:1] or not scale.is_contiguous():
        raise KernelError(
            f"scale is {scale.dtype} {list(scale.shape)}: expected float32 {[made[0]]}"
        )
    if out is None:
        out = packed.new_empty(made, dtype=E4M3)
    if out.dtype != E4M3 or out.shape != made or out.stride(1) != 1:
        raise KernelError(
            f"out is {out.dtype} {list(out.shape)}, strides {out.stride()}: expected {E4M3} "
            f"{list(made)} with unit stride in a row"
        )
    parts = (packed, absmax, absmax_scale, absmax_offset)
    if on_gpu(*parts, scale, out):
        check_device(packed.device)
        ops.fp8_nf4_rows(*parts, scale, out, block, transposed, kind)
        return out
    dense = nf4.dequantize_reference(*parts, n * k, block, torch.float32, kind).view(n, k)
    out.copy_(((dense.mT if transposed else dense) * scale.reciprocal()[:, None]).to(E4M3))
    return out


def product(a: Rows, b: Rows, dtype: torch.dtype) -> Tensor:
    """a [m, k] times the transpose of b [n, k], [m, n] in `dtype`.

    Emulated in fp32 on a CPU. On a GPU `torch._scaled_mm`, whose sums the tensor cores keep in
    their own registers (use_fast_accum), and bfloat16 alone. Raises KernelError.
    """
    device = a.codes.device
    if device.type != "cuda":
        y = a.codes.float() @ b.codes.float().mT
        return (y * a.scale[:, None] * b.scale).to(dtype)
    check_device(device)
    if dtype != torch.bfloat16:
        raise KernelError(f"an fp8 product in {dtype}: a GPU gives bfloat16; load in that dtype")
    if a.codes.shape[0] == 0:
        return a.scale.new_empty(0, b.codes.shape[0], dtype=dtype)
    y = torch._scaled_mm(
        a.codes,
        b.codes.mT,
        scale_a=a.scale[:, None],
        scale_b=b.scale[None],
        out_dtype=dtype,
        use_fast_accum=True,
    )
    return y
