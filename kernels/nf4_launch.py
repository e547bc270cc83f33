"""The Triton launches that dequantize; nf4.py has their references and defines the format."""

# Kernels are written in Triton's language: they have no Python types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False

from __future__ import annotations

import torch
from torch import Tensor

from . import codebook
from .launch import ceil_div, jit, operator
from .launch import language as tl
from .nf4_decode import WORD, _absmax

UNIT = 64  # weights that a product takes at a time; they share their absmax
TURNS = 2  # tiles of a program, all read before the first is written
WARPS = 4


@jit
def _words(p_packed, o_word, stored):
    """Eight codes each, from words, or from bytes where these are no whole or no aligned words."""
    if p_packed.dtype.element_ty == tl.int32:
        b_word = tl.load(p_packed + o_word, mask=o_word < stored, other=0)
    else:
        o_byte = o_word[:, None] * 4 + tl.arange(0, 4)[None, :]
        b_byte = tl.load(p_packed + o_byte, mask=o_byte < stored, other=0).to(tl.int32)
        b_word = tl.sum(b_byte << (tl.arange(0, 4) * 8)[None, :], axis=1)
    return b_word


@jit
def _dequantize_kernel(
    p_packed,
    p_absmax,
    p_scale,
    p_offset,
    p_levels,
    p_map,
    p_out,
    stored,
    count,
    BLOCK: tl.constexpr,
    WORDS: tl.constexpr,
    TURNS: tl.constexpr,
    DOUBLE: tl.constexpr,
):
    # A tile is WORDS words, one a thread: what it writes of one is contiguous, and nothing passes
    # through shared memory.
    i_first = tl.program_id(0).to(tl.int64) * (WORDS * TURNS)
    o = tl.arange(0, WORDS)
    o_shift = (tl.arange(0, WORD) ^ 1) * 4  # of two codes in a byte the first is the high nibble
    b_tiles = ()
    for turn in tl.static_range(TURNS):
        b_word = _words(p_packed, i_first + turn * WORDS + o, stored)
        b_tiles += (b_word,)  # type: ignore[assignment]
    for turn in tl.static_range(TURNS):
        o_word = i_first + turn * WORDS + o
        o_block = o_word * WORD // BLOCK
        m_word = o_word * WORD < count
        b_absmax = _absmax(p_absmax, p_scale, p_offset, p_map, o_block, m_word, DOUBLE)
        b_code = (b_tiles[turn][:, None] >> o_shift[None, :]) & 15
        b_out = tl.load(p_levels + b_code) * b_absmax[:, None]
        o_out = (i_first + turn * WORDS) * WORD + tl.arange(0, WORDS * WORD)
        b_out = tl.reshape(b_out.to(p_out.dtype.element_ty), (WORDS * WORD,))
        tl.store(p_out + o_out, b_out, mask=o_out < count)


def _fill(
    packed: Tensor,
    absmax: Tensor,
    absmax_scale: Tensor | None,
    absmax_offset: Tensor | None,
    out: Tensor,
    block: int,
    kind: str,
) -> None:
    tables = codebook.device_tables(packed.device, kind)
    count = out.numel()
    if not (count % WORD or packed.data_ptr() % 4 or packed.storage_offset() % 4):
        packed = packed.view(torch.int32)
    words = 32 * WARPS
    _dequantize_kernel(
        (ceil_div(count, words * WORD * TURNS),),
        packed,
        absmax,
        absmax_scale,
        absmax_offset,
        tables.levels,
        tables.dynamic,
        out,
        packed.numel(),
        count,
        BLOCK=block,
        WORDS=words,
        TURNS=TURNS,
        DOUBLE=absmax_scale is not None,
        num_warps=WARPS,
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
