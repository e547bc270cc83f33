"""The Triton launches behind nf4.py, which has their references and defines the format."""

# Kernels are written in Triton's language: they have no Python types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import codebook
from .codebook import GROUP
from .launch import ceil_div, jit, operator
from .launch import language as tl
from .nf4_decode import _absmax

TINY = 1e-38  # what an absmax below it counts as
UNIT = 64  # weights of one row of a dequantizing tile; they share their absmax
BIN_MAGIC = 12582912.0  # 1.5 * 2^23: added to a small number, it leaves its integer in the low bits
ABSMAX_ROWS = 4  # groups that a program of the second quantization takes


class Config(NamedTuple):
    """How a launch is cut: rows of a tile, tiles a program does one after the other, warps."""

    rows: int
    turns: int
    num_warps: int


def quantize_config(block: int) -> Config:
    """Tiles of 4096 weights or one block: 32 weights a thread."""
    return Config(max(1, 4096 // block), 1, 4)


def dequantize_config(block: int) -> Config:
    """Tiles of 4096 weights, one a program."""
    return Config(4096 // min(block, UNIT), 1, 4)


@jit
def _threshold(p_mid, i: tl.constexpr):
    return tl.load(p_mid + i)


@jit
def _bisected_code(b_x, p_mid):
    """The number of thresholds below each value, by bisection: four comparisons."""
    m_8 = b_x > _threshold(p_mid, 7)
    m_4 = b_x > tl.where(m_8, _threshold(p_mid, 11), _threshold(p_mid, 3))
    b_low = tl.where(m_4, _threshold(p_mid, 5), _threshold(p_mid, 1))
    b_high = tl.where(m_4, _threshold(p_mid, 13), _threshold(p_mid, 9))
    m_2 = b_x > tl.where(m_8, b_high, b_low)
    b_0 = tl.where(m_2, _threshold(p_mid, 2), _threshold(p_mid, 0))
    b_4 = tl.where(m_2, _threshold(p_mid, 6), _threshold(p_mid, 4))
    b_8 = tl.where(m_2, _threshold(p_mid, 10), _threshold(p_mid, 8))
    b_12 = tl.where(m_2, _threshold(p_mid, 14), _threshold(p_mid, 12))
    b_low = tl.where(m_4, b_4, b_0)
    b_high = tl.where(m_4, b_12, b_8)
    m_1 = b_x > tl.where(m_8, b_high, b_low)
    b_code = tl.where(m_8, 8, 0) + tl.where(m_4, 4, 0)
    return b_code + tl.where(m_2, 2, 0) + tl.where(m_1, 1, 0)


@jit
def _binned_code(b_x, p_bins):
    """The same through a table: of the 31 bins round(15 x) each holds at most one threshold, the
    first row of `p_bins`; the second row is how many lie in the bins before. Bisection is bound by
    its selects, this by memory.
    """
    # The sum's lowest bits are the rounded product; any 5 bits index the table, so NaN may pass.
    b_bin = (b_x * 15.0 + BIN_MAGIC).to(tl.int32, bitcast=True) & 31
    b_code = tl.load(p_bins + 32 + b_bin).to(tl.int32)
    return tl.where(b_x > tl.load(p_bins + b_bin), b_code + 1, b_code)


@jit
def _quantize_kernel(
    p_w,
    p_packed,
    p_absmax,
    p_mid,
    p_order,
    p_bins,
    count,
    blocks,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    o_block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_w = o_block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    b_w = tl.load(p_w + o_w, mask=o_w < count, other=0.0).to(tl.float32)
    # The largest magnitude by its bits: for numbers the same order, and NaN comes out on top.
    b_bits = b_w.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    b_top = tl.max(b_bits, axis=1)
    b_absmax = b_top.to(tl.float32, bitcast=True)
    # A tensor, as the literal, below the normal numbers, would be taken for float64.
    b_tiny = tl.full([ROWS], TINY, dtype=tl.float32)
    b_safe = tl.maximum(b_absmax, b_tiny)
    # A short last block divides by the maximum that it stores, a whole one multiplies by the
    # reciprocal.
    m_short = (o_block + 1) * BLOCK > count
    b_whole = tl.div_rn(tl.full([ROWS], 1.0, dtype=tl.float32), b_safe)
    b_x = b_w * b_whole[:, None]
    if (tl.program_id(0) + 1).to(tl.int64) * ROWS * BLOCK > count:
        b_most = tl.broadcast_to(b_safe[:, None], (ROWS, BLOCK))
        b_x = tl.where(m_short[:, None], tl.div_rn(b_w, b_most), b_x)
        b_absmax = tl.where(m_short & (b_absmax < b_tiny), b_tiny, b_absmax)
    if p_order is not None:
        b_code = tl.load(p_order + _bisected_code(b_x, p_mid))
    else:
        b_code = _binned_code(b_x, p_bins)
    b_code = b_code.to(tl.uint8)
    b_first, b_second = tl.split(tl.reshape(b_code, (ROWS, BLOCK // 2, 2)))
    o_byte = o_block[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    m_byte = o_byte < (count + 1) // 2
    tl.store(p_packed + o_byte, (b_first << 4) | b_second, mask=m_byte)
    tl.store(p_absmax + o_block, b_absmax, mask=o_block < blocks)


@jit
def _quantize_absmax_kernel(
    p_absmax, p_offset, p_mid, p_codes, p_scale, count, groups, ROWS: tl.constexpr
):
    o_group = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o = o_group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    mask = o < count
    b_a = tl.load(p_absmax + o, mask=mask, other=0.0) - tl.load(p_offset)
    b_a = tl.where(mask, b_a, 0.0)
    b_scale = tl.max(tl.abs(b_a), axis=1)
    m_zero = b_scale == 0.0
    b_one = tl.full([ROWS], 1.0, dtype=tl.float32)
    b_x = b_a * tl.div_rn(b_one, tl.where(m_zero, 1.0, b_scale))[:, None]
    b_x = tl.minimum(tl.maximum(b_x, -1.0), 1.0)
    # The nearest of 65536 even points, and the map's code for that point.
    b_point = ((b_x + 1.0) * 0.5 * 65535.0 + 0.5).to(tl.int32)
    b_65535 = tl.full([ROWS, GROUP], 65535.0, dtype=tl.float32)
    b_x = tl.div_rn(2.0 * b_point.to(tl.float32), b_65535) - 1.0
    b_code = tl.zeros([ROWS, GROUP], dtype=tl.int32)
    for i in tl.static_range(8):
        b_try = b_code + (128 >> i)
        b_code = tl.where(b_x > tl.load(p_mid + b_try - 1), b_try, b_code)
    b_code = tl.where(m_zero[:, None], 0, b_code)
    tl.store(p_codes + o, b_code.to(tl.uint8), mask=mask)
    tl.store(p_scale + o_group, b_scale, mask=o_group < groups)


@jit
def _dequantize_kernel(
    p_packed,
    p_absmax,
    p_scale,
    p_offset,
    p_levels,
    p_map,
    p_out,
    count,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    TURNS: tl.constexpr,
    DOUBLE: tl.constexpr,
):
    # A tile is ROWS runs of WIDTH weights, each within one block.
    for i_turn in tl.static_range(TURNS):
        i_tile = tl.program_id(0).to(tl.int64) * TURNS + i_turn
        o_row = i_tile * ROWS + tl.arange(0, ROWS)
        m_row = o_row * WIDTH < count
        o_block = o_row * WIDTH // BLOCK
        b_absmax = _absmax(p_absmax, p_scale, p_offset, p_map, o_block, m_row, DOUBLE)
        o_byte = o_row[:, None] * (WIDTH // 2) + tl.arange(0, WIDTH // 2)[None, :]
        b_packed = tl.load(p_packed + o_byte, mask=o_byte < (count + 1) // 2, other=0).to(tl.int32)
        b_first = tl.load(p_levels + (b_packed >> 4)) * b_absmax[:, None]
        b_second = tl.load(p_levels + (b_packed & 15)) * b_absmax[:, None]
        b_out = tl.reshape(tl.join(b_first, b_second), (ROWS, WIDTH))
        o = o_row[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        tl.store(p_out + o, b_out.to(p_out.dtype.element_ty), mask=o < count)


@operator(
    'nf4_quantize(Tensor flat, int block, str kind="nf4") -> (Tensor, Tensor)',
    fake=lambda flat, block, kind="nf4": (
        flat.new_empty((flat.shape[0] + 1) // 2, dtype=torch.uint8),
        flat.new_empty((flat.shape[0] + block - 1) // block, dtype=torch.float32),
    ),
)
def _launch_quantize(flat: Tensor, block: int, kind: str = "nf4") -> tuple[Tensor, Tensor]:
    count = flat.numel()
    blocks = ceil_div(count, block)
    packed = flat.new_empty(ceil_div(count, 2), dtype=torch.uint8)
    absmax = flat.new_empty(blocks, dtype=torch.float32)
    config = quantize_config(block)
    tables = codebook.device_tables(flat.device, kind)
    _quantize_kernel(
        (ceil_div(blocks, config.rows),),
        flat.contiguous(),
        packed,
        absmax,
        tables[1],
        None if kind == "nf4" else tables[4],
        tables[5],
        count,
        blocks,
        BLOCK=block,
        ROWS=config.rows,
        num_warps=config.num_warps,
        enable_fp_fusion=False,
    )
    return packed, absmax


@operator(
    "nf4_quantize_absmax(Tensor absmax, Tensor offset) -> (Tensor, Tensor)",
    fake=lambda absmax, offset: (
        absmax.new_empty(absmax.shape, dtype=torch.uint8),
        absmax.new_empty((absmax.shape[0] + GROUP - 1) // GROUP),
    ),
)
def _launch_quantize_absmax(absmax: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    count = absmax.numel()
    groups = ceil_div(count, GROUP)
    codes = absmax.new_empty(count, dtype=torch.uint8)
    scale = absmax.new_empty(groups)
    _quantize_absmax_kernel(
        (ceil_div(groups, ABSMAX_ROWS),),
        absmax.contiguous(),
        offset,
        codebook.device_tables(absmax.device)[3],
        codes,
        scale,
        count,
        groups,
        ROWS=ABSMAX_ROWS,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return codes, scale


def _fill(
    packed: Tensor,
    absmax: Tensor,
    absmax_scale: Tensor | None,
    absmax_offset: Tensor | None,
    out: Tensor,
    block: int,
    kind: str,
) -> None:
    levels, _, dynamic, *_ = codebook.device_tables(packed.device, kind)
    config = dequantize_config(block)
    width = min(block, UNIT)
    _dequantize_kernel(
        (ceil_div(out.numel(), width * config.rows * config.turns),),
        packed,
        absmax,
        absmax_scale,
        absmax_offset,
        levels,
        dynamic,
        out,
        out.numel(),
        BLOCK=block,
        WIDTH=width,
        ROWS=config.rows,
        TURNS=config.turns,
        DOUBLE=absmax_scale is not None,
        num_warps=config.num_warps,
        enable_fp_fusion=False,
    )


@operator(
    "nf4_dequantize(Tensor packed, Tensor absmax, Tensor? absmax_scale, Tensor? absmax_offset,"
    ' int count, int block, ScalarType dtype, str kind="nf4") -> Tensor',
    fake=lambda packed, absmax, scale, offset, count, block, dtype, kind="nf4": packed.new_empty(
        count, dtype=dtype
    ),
)
def _launch_dequantize(
    packed: Tensor,
    absmax: Tensor,
    absmax_scale: Tensor | None,
    absmax_offset: Tensor | None,
    count: int,
    block: int,
    dtype: torch.dtype,
    kind: str = "nf4",
) -> Tensor:
    out = packed.new_empty(count, dtype=dtype)
    _fill(packed, absmax, absmax_scale, absmax_offset, out, block, kind)
    return out


@operator(
    "nf4_dequantize_into(Tensor packed, Tensor absmax, Tensor? absmax_scale,"
    ' Tensor? absmax_offset, Tensor(a!) out, int block, str kind="nf4") -> ()',
    fake=lambda *_: None,
    mutates=("out",),
)
def _launch_dequantize_into(
    packed: Tensor,
    absmax: Tensor,
    absmax_scale: Tensor | None,
    absmax_offset: Tensor | None,
    out: Tensor,
    block: int,
    kind: str = "nf4",
) -> None:
    _fill(packed, absmax, absmax_scale, absmax_offset, out, block, kind)
