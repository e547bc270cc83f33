"""A low-rank term added where it belongs: y += low b, with y read and written once.

What LoRA (arXiv 2106.09685) adds to a product that cannot start from it. The sum is bound by the
memory that y takes; a library's product for it is made for arithmetic, and slower.
"""

# Kernels are written in Triton's language: they have no Python types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..errors import KernelError
from .launch import ceil_div, jit, on_gpu, operator, ops, power_of_two
from .launch import language as tl

ROWS, COLUMNS, WARPS = 64, 256, 8
MOST_RANK = 256
NARROW_RANK = 128  # of GPUs whose shared memory does not hold the tiles of more
FLOATS = (torch.bfloat16, torch.float16)


@functools.cache
def most_rank(device: torch.device) -> int:
    """The largest rank that the launch takes on `device`."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0):
        return NARROW_RANK
    return MOST_RANK


def add_low_rank(y: Tensor, low: Tensor, b: Tensor) -> Tensor:
    """y [m, n] + low [m, r] b [r, n], in the memory of y, which is returned; one dtype for all.

    The sum is fp32 and rounded once. On a GPU the launch takes 16 bits, r up to 256 (128
    before Hopper) and unit strides in the rows of y; what it does not take is torch's addmm. Raises
    KernelError.
    """
    m, n = y.shape if y.dim() == 2 else (0, 0)
    if low.dim() != 2 or y.dim() != 2 or (low.shape[0], b.shape) != (m, (low.shape[1], n)):
        raise KernelError(
            f"y {list(y.shape)}, low {list(low.shape)}, b {list(b.shape)}: expected [m, n], [m, r] "
            "and [r, n]"
        )
    if not y.dtype == low.dtype == b.dtype:
        raise KernelError(f"dtypes {y.dtype}, {low.dtype}, {b.dtype}: expected one")
    takes = y.dtype in FLOATS and y.stride(1) == 1 and 0 < low.shape[1] <= most_rank(y.device)
    if takes and on_gpu(y, low, b):
        ops.add_low_rank(y, low, b)
        return y
    return y.addmm_(low, b)


@jit
def _add_kernel(
    p_y,
    p_low,
    p_b,
    rows,
    columns,
    rank,
    stride_y,
    stride_low,
    stride_low_r,
    stride_b,
    stride_b_n,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # Neighbouring programs share their rows of `low`.
    o_row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_col = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    o_r = tl.arange(0, RANK)
    m_row, m_col, m_r = o_row < rows, o_col < columns, o_r < rank
    o_low = o_row[:, None] * stride_low + o_r[None, :] * stride_low_r
    b_low = tl.load(p_low + o_low, mask=m_row[:, None] & m_r[None, :], other=0.0)
    o_b = o_r[:, None] * stride_b + o_col[None, :].to(tl.int64) * stride_b_n
    b_b = tl.load(p_b + o_b, mask=m_r[:, None] & m_col[None, :], other=0.0)
    o = o_row[:, None] * stride_y + o_col[None, :]
    mask = m_row[:, None] & m_col[None, :]
    b_y = tl.load(p_y + o, mask=mask, other=0.0).to(tl.float32)
    b_y = tl.dot(b_low, b_b, b_y)
    tl.store(p_y + o, b_y.to(p_y.dtype.element_ty), mask=mask)


@operator(
    "add_low_rank(Tensor(a!) y, Tensor low, Tensor b) -> ()",
    fake=lambda *_: None,
    mutates=("y",),
)
def _launch(y: Tensor, low: Tensor, b: Tensor) -> None:
    m, n = y.shape
    _add_kernel(
        (ceil_div(n, COLUMNS), ceil_div(m, ROWS)),
        y,
        low,
        b,
        m,
        n,
        low.shape[1],
        y.stride(0),
        low.stride(0),
        low.stride(1),
        b.stride(0),
        b.stride(1),
        RANK=max(16, power_of_two(low.shape[1])),
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        num_warps=WARPS,
        enable_fp_fusion=True,
    )
