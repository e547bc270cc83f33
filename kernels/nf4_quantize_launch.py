"""The Triton launches that quantize: weights to 4-bit codes, blocks' maxima to 8-bit ones.

nf4.py has their references and defines the format. A thread takes eight weights, one 32-bit word of
codes, so that nothing passes through shared memory; a program reads several tiles before it writes
the first. On an H100 that is 93% of a copy's rate (examples/measurements/kernels_h100.md).
"""

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
from .nf4_decode import WORD

TINY = 1e-38  # what an absmax below it counts as
BIN_MAGIC = 12582912.0  # 1.5 * 2^23: added to a small number, it leaves its integer in the low bits
ABSMAX_ROWS = 4  # groups that a program of the second quantization takes
SUMMED = 4096  # maxima that a program sums for their mean
PARTS = 256  # such sums that are read at a time


class Config(NamedTuple):
    """How a launch is cut: blocks of a tile, tiles of a program, warps."""

    rows: int
    turns: int
    num_warps: int


def quantize_config(block: int) -> Config:
    """Eight weights a thread and tile, 1024 or one block a tile."""
    return Config(max(1, 1024 // block), 4, max(4, block // 256))


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
    first row of `p_bins` (its bits); the second row is how many lie in the bins before. Bisection
    is bound by its selects, this by memory.
    """
    # The sum's lowest bits are the rounded product; any 5 bits index the table, so NaN may pass.
    b_bin = (b_x * 15.0 + BIN_MAGIC).to(tl.int32, bitcast=True) & 31
    b_below = tl.load(p_bins + 32 + b_bin)
    return b_below + (b_x > tl.load(p_bins + b_bin).to(tl.float32, bitcast=True)).to(tl.int32)


@jit
def _larger(b_a, b_b):
    return tl.maximum(b_a, b_b, propagate_nan=tl.PropagateNan.ALL)


@jit
def _quantize_kernel(
    p_w,
    p_packed,
    p_absmax,
    p_mid,
    p_order,
    p_bins,
    count,
    stored,
    blocks,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    TURNS: tl.constexpr,
):
    # `stored` words of codes, or bytes where they are no whole words.
    EIGHTS: tl.constexpr = ROWS * BLOCK // WORD
    i_first = tl.program_id(0).to(tl.int64) * (ROWS * TURNS)
    o_row = tl.arange(0, ROWS)
    b_tiles = ()
    for turn in tl.static_range(TURNS):
        o_w = (i_first + turn * ROWS + o_row)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        b_w = tl.load(p_w + o_w, mask=o_w < count, other=0.0)
        b_tiles += (b_w,)  # type: ignore[assignment]
    for turn in tl.static_range(TURNS):
        i_tile = i_first + turn * ROWS
        o_block = i_tile + o_row
        b_w = b_tiles[turn].to(tl.float32)
        b_absmax = tl.reduce(tl.abs(b_w), 1, _larger)
        # A tensor, as the literal, below the normal numbers, would be taken for float64.
        b_tiny = tl.full([ROWS], TINY, dtype=tl.float32)
        b_safe = tl.maximum(b_absmax, b_tiny)
        b_x = b_w * tl.div_rn(tl.full([ROWS], 1.0, dtype=tl.float32), b_safe)[:, None]
        # A short last block divides by the maximum that it stores, a whole one multiplies by the
        # reciprocal.
        if (i_tile + ROWS) * BLOCK > count:
            m_short = (o_block + 1) * BLOCK > count
            b_most = tl.broadcast_to(b_safe[:, None], (ROWS, BLOCK))
            b_x = tl.where(m_short[:, None], tl.div_rn(b_w, b_most), b_x)
            b_absmax = tl.where(m_short & (b_absmax < b_tiny), b_tiny, b_absmax)
        # A thread's eight are a row: the layout in which a table is read without moving them.
        b_x = tl.reshape(b_x, (EIGHTS, WORD))
        if p_order is not None:
            b_code = tl.load(p_order + _bisected_code(b_x, p_mid)).to(tl.int32)
        else:
            b_code = _binned_code(b_x, p_bins)
        if p_packed.dtype.element_ty == tl.int32:
            # Of two codes in a byte the first is the high nibble.
            o_shift = (tl.arange(0, WORD) ^ 1) * 4
            b_out = tl.sum(b_code << o_shift[None, :], axis=1)
        else:
            b_first, b_second = tl.split(tl.reshape(b_code, (EIGHTS, WORD // 2, 2)))
            b_out = tl.reshape((b_first << 4) | b_second, (EIGHTS * WORD // 2,)).to(tl.uint8)
        o_out = i_tile * BLOCK * b_out.shape[0] // (ROWS * BLOCK) + tl.arange(0, b_out.shape[0])
        tl.store(p_packed + o_out, b_out, mask=o_out < stored)
        tl.store(p_absmax + o_block, b_absmax, mask=o_block < blocks)


@jit
def _sums_kernel(p_absmax, p_sums, count, SUMMED: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * SUMMED + tl.arange(0, SUMMED)
    tl.store(p_sums + tl.program_id(0), tl.sum(tl.load(p_absmax + o, mask=o < count, other=0.0)))


@jit
def _quantize_absmax_kernel(
    p_absmax,
    p_sums,
    p_points,
    p_codes,
    p_scale,
    p_offset,
    count,
    groups,
    sums,
    ROWS: tl.constexpr,
):
    EIGHTS: tl.constexpr = ROWS * GROUP // 8
    o_part = tl.arange(0, PARTS)
    b_sum = tl.zeros([PARTS], dtype=tl.float32)
    for i in range(0, sums, PARTS):
        b_sum += tl.load(p_sums + i + o_part, mask=i + o_part < sums, other=0.0)
    # A count of 1 is a constant to Triton, without methods.
    b_offset = tl.div_rn(tl.sum(b_sum, axis=0), tl.cast(count, tl.float32))
    if tl.program_id(0) == 0:
        tl.store(p_offset, b_offset)
    i_group = tl.program_id(0).to(tl.int64) * ROWS
    o_group = i_group + tl.arange(0, ROWS)
    o = o_group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    mask = o < count
    b_a = tl.where(mask, tl.load(p_absmax + o, mask=mask, other=0.0) - b_offset, 0.0)
    b_scale = tl.max(tl.abs(b_a), axis=1)
    m_zero = b_scale == 0.0
    b_one = tl.full([ROWS], 1.0, dtype=tl.float32)
    b_x = b_a * tl.div_rn(b_one, tl.where(m_zero, 1.0, b_scale))[:, None]
    b_x = tl.minimum(tl.maximum(b_x, -1.0), 1.0)
    # The nearest of 65536 even points, and the map's code for that point.
    b_point = ((b_x + 1.0) * 0.5 * 65535.0 + 0.5).to(tl.int32) & 65535
    b_code = tl.load(p_points + tl.reshape(b_point, (EIGHTS, 8)))
    b_code = tl.where(m_zero[:, None], 0, tl.reshape(b_code, (ROWS, GROUP)))
    tl.store(p_codes + o, b_code, mask=mask)
    tl.store(p_scale + o_group, b_scale, mask=o_group < groups)


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
    codes = packed if count % WORD else packed.view(torch.int32)
    config = quantize_config(block)
    tables = codebook.device_tables(flat.device, kind)
    _quantize_kernel(
        (ceil_div(blocks, config.rows * config.turns),),
        flat.contiguous(),
        codes,
        absmax,
        tables.thresholds,
        None if kind == "nf4" else tables.order,
        tables.bins,
        count,
        codes.numel(),
        blocks,
        BLOCK=block,
        ROWS=config.rows,
        TURNS=config.turns,
        num_warps=config.num_warps,
        enable_fp_fusion=False,
    )
    return packed, absmax


@operator(
    "nf4_quantize_absmax(Tensor absmax) -> (Tensor, Tensor, Tensor)",
    fake=lambda absmax: (
        absmax.new_empty(absmax.shape, dtype=torch.uint8),
        absmax.new_empty((absmax.shape[0] + GROUP - 1) // GROUP),
        absmax.new_empty(()),
    ),
)
def _launch_quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    count = absmax.numel()
    groups, sums = ceil_div(count, GROUP), ceil_div(count, SUMMED)
    absmax = absmax.contiguous()
    codes = absmax.new_empty(count, dtype=torch.uint8)
    scale, offset, parts = absmax.new_empty(groups), absmax.new_empty(()), absmax.new_empty(sums)
    _sums_kernel((sums,), absmax, parts, count, SUMMED=SUMMED, num_warps=4)
    _quantize_absmax_kernel(
        (ceil_div(groups, ABSMAX_ROWS),),
        absmax,
        parts,
        codebook.device_tables(absmax.device).points,
        codes,
        scale,
        offset,
        count,
        groups,
        sums,
        ROWS=ABSMAX_ROWS,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return codes, scale, offset
