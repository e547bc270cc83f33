"""The Triton launches behind fp8.py's `nf4_rows`, which has their reference and defines the
arithmetic: 4-bit weights straight to e4m3.

Along the rows of a weight all of a block share their scale, so that its sixteen levels have sixteen
codes: they are made once, and four a time fetched by byte permutes, as in nf4_decode.py. Along its
columns every weight has a scale of its own.
"""

# Kernels are written in Triton's language: they have no Python types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import codebook
from .launch import ceil_div, jit, operator
from .launch import language as tl
from .nf4_decode import _absmax

# PTX from a word ($2) of eight 4-bit codes and the table of sixteen bytes ($3 to $6) to the codes'
# bytes in order ($0, $1). Of two codes in a byte the first is the high nibble.
LOOKUP = (
    "{ .reg .b32 s, m, a, b; "
    "and.b32 s, $2, 0x77777777; shr.u32 m, $2, 1; and.b32 m, m, 0x44444444; "
    "or.b32 m, m, 0x32103210; "
    "prmt.b32 a, $3, $4, s; prmt.b32 b, $5, $6, s; prmt.b32 a, a, b, m; "
    "prmt.b32 $0, a, a, 0x2301; "
    "shr.u32 s, s, 16; shr.u32 m, m, 16; "
    "prmt.b32 a, $3, $4, s; prmt.b32 b, $5, $6, s; prmt.b32 a, a, b, m; "
    "prmt.b32 $1, a, a, 0x2301; }"
)


class Config(NamedTuple):
    """A program's tile: rows of the weight, runs of columns, warps."""

    rows: int
    runs: int
    num_warps: int


def unit_for(width: int, block: int) -> int:
    """Weights of a row that are sure to share their absmax, at most 64; width a multiple of 16."""
    unit = min(block, 64)
    while width % unit:
        unit //= 2
    return unit


def config_for(unit: int, transposed: bool) -> Config:
    """32 rows x 128 columns where both directions matter, else long runs of a few rows."""
    return Config(32, 128 // unit, 4) if transposed else Config(4, 1024 // unit, 2)


@jit
def _four(p_levels, b_absmax, b_inverse, FIRST: tl.constexpr):
    """The e4m3 codes of four levels in a word."""
    code: tl.constexpr = tl.float8e4nv
    b_words = tl.zeros(b_absmax.shape, dtype=tl.int32)
    for i in tl.static_range(4):
        b_w = tl.load(p_levels + FIRST + i) * b_absmax
        b_code = (b_w * b_inverse).to(code).to(tl.uint8, bitcast=True)
        b_words |= b_code.to(tl.int32) << (8 * i)
    return b_words


@jit
def _rows_kernel(
    p_packed,
    p_absmax,
    p_absmax_scale,
    p_offset,
    p_levels,
    p_map,
    p_scale,
    p_out,
    rows,
    width,
    stride_out,
    LOOKUP: tl.constexpr,
    BLOCK: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    RUNS: tl.constexpr,
    DOUBLE: tl.constexpr,
):
    # A tile is ROWS rows of RUNS runs of UNIT weights, each run within one block; packed are words
    # of eight codes, and out, whose stride counts them too, words of four.
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_run = tl.program_id(1) * RUNS + tl.arange(0, RUNS)
    m_row = o_row < rows
    mask = m_row[:, None] & (o_run * UNIT < width)[None, :]
    o_first = o_row[:, None] * width + o_run[None, :] * UNIT
    o_block = o_first // BLOCK
    b_absmax = _absmax(p_absmax, p_absmax_scale, p_offset, p_map, o_block, mask, DOUBLE)
    b_scale = tl.load(p_scale + o_row, mask=m_row, other=1.0)
    b_inverse = tl.div_rn(tl.full([ROWS], 1.0, dtype=tl.float32), b_scale)
    b_inverse = tl.broadcast_to(b_inverse[:, None], (ROWS, RUNS))
    words: tl.constexpr = UNIT // 8
    shape: tl.constexpr = (ROWS, RUNS, words)
    b_0 = tl.broadcast_to(_four(p_levels, b_absmax, b_inverse, 0)[:, :, None], shape)
    b_1 = tl.broadcast_to(_four(p_levels, b_absmax, b_inverse, 4)[:, :, None], shape)
    b_2 = tl.broadcast_to(_four(p_levels, b_absmax, b_inverse, 8)[:, :, None], shape)
    b_3 = tl.broadcast_to(_four(p_levels, b_absmax, b_inverse, 12)[:, :, None], shape)
    o_word = (o_first // 8)[:, :, None] + tl.arange(0, words)[None, None, :]
    b_words = tl.load(p_packed + o_word, mask=mask[:, :, None], other=0)
    b_first, b_second = tl.inline_asm_elementwise(
        LOOKUP,
        "=&r,=&r,r,r,r,r,r",
        [b_words, b_0, b_1, b_2, b_3],
        dtype=(tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )
    b_out = tl.reshape(tl.join(b_first, b_second), (ROWS, RUNS * words * 2))
    o_col = tl.program_id(1) * RUNS * words * 2 + tl.arange(0, RUNS * words * 2)
    o = o_row[:, None] * stride_out + o_col[None, :]
    tl.store(p_out + o, b_out, mask=m_row[:, None] & (o_col * 4 < width)[None, :])


@jit
def _columns_kernel(
    p_packed,
    p_absmax,
    p_absmax_scale,
    p_offset,
    p_levels,
    p_map,
    p_scale,
    p_out,
    rows,
    width,
    stride_out,
    BLOCK: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    RUNS: tl.constexpr,
    DOUBLE: tl.constexpr,
):
    # A tile is ROWS rows of RUNS runs of UNIT weights, each run within one block.
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_run = tl.program_id(1) * RUNS + tl.arange(0, RUNS)
    mask = (o_row < rows)[:, None] & (o_run * UNIT < width)[None, :]
    o_first = o_row[:, None] * width + o_run[None, :] * UNIT
    o_block = o_first // BLOCK
    b_absmax = _absmax(p_absmax, p_absmax_scale, p_offset, p_map, o_block, mask, DOUBLE)
    o_byte = (o_first // 2)[:, :, None] + tl.arange(0, UNIT // 2)[None, None, :]
    b_packed = tl.load(p_packed + o_byte, mask=mask[:, :, None], other=0).to(tl.int32)
    b_first = tl.load(p_levels + (b_packed >> 4)) * b_absmax[:, :, None]
    b_second = tl.load(p_levels + (b_packed & 15)) * b_absmax[:, :, None]
    b_w = tl.reshape(tl.join(b_first, b_second), (ROWS, RUNS * UNIT))
    o_col = tl.program_id(1) * RUNS * UNIT + tl.arange(0, RUNS * UNIT)
    m_row, m_col = o_row < rows, o_col < width
    b_scale = tl.load(p_scale + o_col, mask=m_col, other=1.0)
    b_one = tl.full([RUNS * UNIT], 1.0, dtype=tl.float32)
    b_codes = (b_w * tl.div_rn(b_one, b_scale)[None, :]).to(p_out.dtype.element_ty)
    o = o_col[:, None].to(tl.int64) * stride_out + o_row[None, :]
    tl.store(p_out + o, tl.trans(b_codes), mask=m_col[:, None] & m_row[None, :])


@operator(
    "fp8_nf4_rows(Tensor packed, Tensor absmax, Tensor? absmax_scale, Tensor? absmax_offset,"
    ' Tensor scale, Tensor(a!) out, int block, bool transposed, str kind="nf4") -> ()',
    fake=lambda *_: None,
    mutates=("out",),
)
def _launch(
    packed: Tensor,
    absmax: Tensor,
    absmax_scale: Tensor | None,
    absmax_offset: Tensor | None,
    scale: Tensor,
    out: Tensor,
    block: int,
    transposed: bool,
    kind: str = "nf4",
) -> None:
    rows, width = out.shape[::-1] if transposed else out.shape
    levels, _, dynamic, *_ = codebook.device_tables(packed.device, kind)
    unit = unit_for(width, block)
    config = config_for(unit, transposed)
    grid = (ceil_div(rows, config.rows), ceil_div(width, config.runs * unit))
    maxima = (absmax, absmax_scale, absmax_offset)
    how = {
        "BLOCK": block,
        "UNIT": unit,
        "ROWS": config.rows,
        "RUNS": config.runs,
        "DOUBLE": absmax_scale is not None,
        "num_warps": config.num_warps,
        "enable_fp_fusion": False,
    }
    tables = (levels, dynamic, scale)
    if transposed:
        _columns_kernel(grid, packed, *maxima, *tables, out, rows, width, out.stride(0), **how)
        return
    whole = out.stride(0) % 4 == 0 and out.data_ptr() % 4 == 0
    into = out if whole else torch.empty_like(out, memory_format=torch.contiguous_format)
    words = packed if packed.data_ptr() % 4 == 0 else packed.clone()
    _rows_kernel(
        grid,
        words.view(torch.int32),
        *maxima,
        *tables,
        into.view(torch.int32),
        rows,
        width,
        into.stride(0) // 4,
        LOOKUP=LOOKUP,
        **how,
    )
    if into is not out:
        out.copy_(into)
