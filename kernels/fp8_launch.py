"""The Triton launch behind fp8.py's `cast_rows`, which has its reference and defines the
arithmetic.
"""

# Kernels are written in Triton's language: they have no Python types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .launch import ceil_div, jit, operator, power_of_two
from .launch import language as tl

LARGEST = 448.0  # of e4m3
TINY = 1e-30  # what a row's largest magnitude counts as, if it is less
WHOLE = 32768  # values of a row that a program holds in registers
CHUNK = 4096  # of a wider row it takes so much at a time


class CastConfig(NamedTuple):
    """How a program casts one row: the columns of each part that it holds at once, or 0 for all
    in turns of CHUNK; warps.
    """

    blocks: tuple[int, int, int]
    num_warps: int


def cast_config(widths: Sequence[int]) -> CastConfig:
    """32 values a thread."""
    x, y, z = ((*map(power_of_two, widths), 0, 0))[:3]
    total = x + y + z
    if total > WHOLE:
        return CastConfig((0, 0, 0), 8)
    return CastConfig((x, y, z), power_of_two(ceil_div(total, 1024)))


@jit
def _most(p_row, width, b_most, CHUNK: tl.constexpr):
    """The running maximum of magnitudes' bits, over a row: so NaN is the largest of all."""
    for start in range(0, width, CHUNK):
        o = start + tl.arange(0, CHUNK)
        b_x = tl.load(p_row + o, mask=o < width, other=0.0).to(tl.float32)
        b_most = tl.maximum(b_most, tl.max(b_x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=0))
    return b_most


@jit
def _put(p_row, p_out, width, b_inverse, CHUNK: tl.constexpr):
    for start in range(0, width, CHUNK):
        o = start + tl.arange(0, CHUNK)
        b_x = tl.load(p_row + o, mask=o < width, other=0.0).to(tl.float32)
        tl.store(p_out + o, (b_x * b_inverse).to(p_out.dtype.element_ty), mask=o < width)


@jit
def _scale(b_bits):
    """The scale of a row whose largest magnitude has these bits, and its reciprocal."""
    # Tensors, as a literal below the normal numbers would be taken for float64.
    b_tiny = tl.full([1], TINY, dtype=tl.float32)
    b_most = tl.zeros([1], dtype=tl.int32) | b_bits
    b_most = b_most.to(tl.float32, bitcast=True)
    b_most = tl.where(b_most < b_tiny, b_tiny, b_most)
    b_scale = tl.div_rn(b_most, tl.full([1], LARGEST, dtype=tl.float32))
    return b_scale, tl.div_rn(tl.full([1], 1.0, dtype=tl.float32), b_scale)


@jit
def _held(p_row, width, BLOCK: tl.constexpr):
    """A whole part of a row, and the bits of its largest magnitude."""
    o = tl.arange(0, BLOCK)
    b_x = tl.load(p_row + o, mask=o < width, other=0.0)
    return b_x, tl.max(b_x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=0)


@jit
def _put_held(b_x, p_out, width, b_inverse, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    b_codes = (b_x.to(tl.float32) * b_inverse).to(p_out.dtype.element_ty)
    tl.store(p_out + o, b_codes, mask=o < width)


@jit
def _cast_kernel(
    p_x,
    p_y,
    p_z,
    p_out,
    p_scale,
    width_x,
    width_y,
    width_z,
    stride_x,
    stride_y,
    stride_z,
    stride_out,
    X: tl.constexpr,
    Y: tl.constexpr,
    Z: tl.constexpr,
    CHUNK: tl.constexpr,
):
    # X, Y, Z: the columns of each part held in registers; X is 0 where the row is read twice.
    i_row = tl.program_id(0).to(tl.int64)
    p_out += i_row * stride_out
    p_x += i_row * stride_x
    if p_y is not None:
        p_y += i_row * stride_y
    if p_z is not None:
        p_z += i_row * stride_z
    if X > 0:
        b_x, b_most = _held(p_x, width_x, X)
        if p_y is not None:
            b_y, b_more = _held(p_y, width_y, Y)
            b_most = tl.maximum(b_most, b_more)
        if p_z is not None:
            b_z, b_more = _held(p_z, width_z, Z)
            b_most = tl.maximum(b_most, b_more)
        b_scale, b_inverse = _scale(b_most)
        _put_held(b_x, p_out, width_x, b_inverse, X)
        if p_y is not None:
            _put_held(b_y, p_out + width_x, width_y, b_inverse, Y)
        if p_z is not None:
            _put_held(b_z, p_out + width_x + width_y, width_z, b_inverse, Z)
    else:
        b_most = _most(p_x, width_x, tl.zeros([1], dtype=tl.int32), CHUNK)
        if p_y is not None:
            b_most = _most(p_y, width_y, b_most, CHUNK)
        if p_z is not None:
            b_most = _most(p_z, width_z, b_most, CHUNK)
        b_scale, b_inverse = _scale(b_most)
        _put(p_x, p_out, width_x, b_inverse, CHUNK)
        if p_y is not None:
            _put(p_y, p_out + width_x, width_y, b_inverse, CHUNK)
        if p_z is not None:
            _put(p_z, p_out + width_x + width_y, width_z, b_inverse, CHUNK)
    tl.store(p_scale + i_row + tl.arange(0, 1), b_scale)


def _new_rows(x: Tensor, *others: Tensor | None) -> tuple[Tensor, Tensor]:
    width = x.shape[1] + sum(t.shape[1] for t in others if t is not None)
    codes = x.new_empty((x.shape[0], width), dtype=torch.float8_e4m3fn)
    return codes, x.new_empty(x.shape[0], dtype=torch.float32)


@operator(
    "fp8_cast_rows(Tensor x, Tensor? y, Tensor? z) -> (Tensor, Tensor)",
    fake=_new_rows,
)
def _launch_cast(x: Tensor, y: Tensor | None, z: Tensor | None) -> tuple[Tensor, Tensor]:
    codes, scale = _new_rows(x, y, z)
    parts = [p for p in (x, y, z) if p is not None]
    given = [p if p.stride(1) == 1 else p.contiguous() for p in parts]
    widths = [p.shape[1] for p in given]
    config = cast_config(widths)
    none = 3 - len(given)
    _cast_kernel(
        (x.shape[0],),
        *given,
        *(None,) * none,
        codes,
        scale,
        *widths,
        *(0,) * none,
        *(p.stride(0) for p in given),
        *(0,) * none,
        codes.stride(0),
        X=config.blocks[0],
        Y=config.blocks[1],
        Z=config.blocks[2],
        CHUNK=CHUNK,
        num_warps=config.num_warps,
        enable_fp_fusion=False,
    )
    return codes, scale
