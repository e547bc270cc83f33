"""The Triton launches behind fp8.py's `nf4_rows`, which has their reference and defines the
arithmetic: 4-bit weights straight to e4m3.

Along the rows of a weight all of a block share their scale, so that its sixteen levels have sixteen
codes: a thread makes them once for its words, and fetches four a time by byte permutes, as in
nf4_decode.py. Along its columns every weight has a scale of its own.
"""

# Kernels are written in Triton's language: they have no Python types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False

from __future__ import annotations

import functools
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


THREADS = 128  # a program along the rows has one group of words each


class Config(NamedTuple):
    """A program's tile along the columns: rows of the weight, runs of columns, warps."""

    rows: int
    runs: int
    num_warps: int


def unit_for(width: int, block: int) -> int:
    """Weights of a row that are sure to share their absmax, at most 64; width a multiple of 16."""
    unit = min(block, 64)
    while width % unit:
        unit //= 2
    return unit


def config_for(unit: int) -> Config:
    """32 rows x 128 columns, as both directions matter."""
    return Config(32, 128 // unit, 4)


def words_for(width: int) -> int:
    """Words of a thread, of one block and one row; width a multiple of 16."""
    return 4 if width % 32 == 0 else 2


@functools.cache
def table(kind: str) -> str:
    """PTX from a block's absmax ($4) and the reciprocal of its row's scale ($5) to the e4m3 codes
    of its sixteen levels ($0 to $3), each product rounded.
    """
    bits = codebook.levels_of(kind).float().view(torch.int32).tolist()
    lines = [".reg .f32 a, b;", ".reg .b16 c, d;"]
    for i in range(0, 16, 2):
        for register, level in (("a", bits[i]), ("b", bits[i + 1])):
            lines += [f"mul.rn.f32 {register}, $4, 0f{level & 0xFFFFFFFF:08X};"]
            lines += [f"mul.rn.f32 {register}, {register}, $5;"]
        lines += [f"cvt.rn.satfinite.e4m3x2.f32 {'d' if i % 4 else 'c'}, b, a;"]
        if i % 4:
            lines += [f"mov.b32 ${i // 4}, {{c, d}};"]
    return "{ " + " ".join(lines) + " }"


@jit
def _rows_kernel(
    p_packed,
    p_absmax,
    p_absmax_scale,
    p_offset,
    p_map,
    p_scale,
    p_out,
    count,
    width,
    LOOKUP: tl.constexpr,
    TABLE: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUPS: tl.constexpr,
    WORDS: tl.constexpr,
    DOUBLE: tl.constexpr,
):
    # A tile is GROUPS groups of WORDS words of eight codes, each within one block and one row; out
    # are words of four.
    o_group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    o_weight = o_group * (8 * WORDS)
    m = o_weight < count
    o_word = (o_group * WORDS)[:, None] + tl.arange(0, WORDS)[None, :]
    b_words = tl.load(p_packed + o_word, mask=m[:, None], other=0)
    o_block = o_weight // BLOCK
    b_absmax = _absmax(p_absmax, p_absmax_scale, p_offset, p_map, o_block, m, DOUBLE)
    b_scale = tl.load(p_scale + o_weight // width, mask=m, other=1.0)
    b_inverse = tl.div_rn(tl.full([GROUPS], 1.0, dtype=tl.float32), b_scale)
    b_0, b_1, b_2, b_3 = tl.inline_asm_elementwise(
        TABLE,
        "=&r,=&r,=&r,=&r,f,f",
        [b_absmax, b_inverse],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )
    b_first, b_second = tl.inline_asm_elementwise(
        LOOKUP,
        "=&r,=&r,r,r,r,r,r",
        [b_words, b_0[:, None], b_1[:, None], b_2[:, None], b_3[:, None]],
        dtype=(tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )
    b_out = tl.reshape(tl.join(b_first, b_second), (GROUPS * WORDS * 2,))
    o_out = tl.program_id(0).to(tl.int64) * (GROUPS * WORDS * 2)
    o_out += tl.arange(0, GROUPS * WORDS * 2)
    tl.store(p_out + o_out, b_out, mask=o_out * 4 < count)


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
    levels, _, dynamic, *_ = codebook.device_tables(packed.device, kind)
    maxima = (absmax, absmax_scale, absmax_offset)
    how = {"BLOCK": block, "DOUBLE": absmax_scale is not None, "enable_fp_fusion": False}
    if transposed:
        width, rows = out.shape
        unit = unit_for(width, block)
        config = config_for(unit)
        _columns_kernel(
            (ceil_div(rows, config.rows), ceil_div(width, config.runs * unit)),
            packed,
            *maxima,
            levels,
            dynamic,
            scale,
            out,
            rows,
            width,
            out.stride(0),
            UNIT=unit,
            ROWS=config.rows,
            RUNS=config.runs,
            num_warps=config.num_warps,
            **how,
        )
        return
    count, width = out.numel(), out.shape[1]
    whole = out.is_contiguous() and out.data_ptr() % 4 == 0
    into = out if whole else torch.empty_like(out, memory_format=torch.contiguous_format)
    words = packed if packed.data_ptr() % 4 == 0 else packed.clone()
    each = words_for(width)
    _rows_kernel(
        (ceil_div(count, 8 * each * THREADS),),
        words.view(torch.int32),
        *maxima,
        dynamic,
        scale,
        into.view(torch.int32),
        count,
        width,
        LOOKUP=LOOKUP,
        TABLE=table(kind),
        GROUPS=THREADS,
        WORDS=each,
        num_warps=THREADS // 32,
        **how,
    )
    if into is not out:
        out.copy_(into)
