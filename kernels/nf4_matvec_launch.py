"""The Triton launches behind nf4_matvec.py for x in fp32; in 16 bits nf4_products.py has it."""

# Kernels are written in Triton's language: they have no Python types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import codebook
from .launch import ceil_div, jit, operator, power_of_two
from .launch import language as tl
from .nf4_decode import WORD, _absmax, _codes, _weights
from .nf4_launch import UNIT
from .nf4_products import MOST_ROWS, Weight, _aligned, products

# Programs that fill a GPU of 132 multiprocessors.
FULL = 132


class Config(NamedTuple):
    """How a launch is cut: outputs of a program, runs of one step, programs that share an output,
    warps.
    """

    outputs: int
    runs: int
    split: int
    num_warps: int


def config_for(rows: int, outputs: int, width: int, block: int) -> Config:
    """The cut for `rows` of x [rows, width] in fp32 and a weight [outputs, width], from what
    examples/measurements/kernels_h100.md measured.
    """
    unit = min(block, UNIT)
    runs = width // unit
    if rows == 1:
        tile = 8
        weights, warps = (1024, 2) if outputs >= 6144 else (2048, 4)
        # A second program for an output costs the launch of a sum: only where a GPU is half empty.
        split = FULL // ceil_div(outputs, tile)
    else:
        warps, weights = 4, 64
        if rows <= 16 and width < 4096:
            tile, split = 32 if outputs >= 8192 else 16, 1
        else:
            tile = 64
            split = 1 if rows > 32 and outputs >= 8192 else min(ceil_div(width, 1024), 8)
    step = min(weights // unit, power_of_two(runs))
    return Config(tile, max(step, 1), max(1, min(split, ceil_div(runs, step))), warps)


def takes(rows: int, shape: tuple[int, ...], block: int) -> bool:
    """Whether there is a launch for `rows` of x and a weight of `shape` [out, in]."""
    return 1 <= rows <= MOST_ROWS and len(shape) == 2 and shape[1] % min(block, UNIT) == 0


@jit
def _vector_kernel(
    p_x,
    p_words,
    p_absmax,
    p_scale,
    p_offset,
    p_levels,
    p_map,
    p_low,
    p_b,
    p_out,
    outputs,
    runs,
    share,
    rank,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    OUTPUTS: tl.constexpr,
    RUNS: tl.constexpr,
    RANK: tl.constexpr,
    DOUBLE: tl.constexpr,
):
    # Runs [begin, end) of OUTPUTS outputs; RUNS of them a step.
    o_n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    m_n = o_n < outputs
    begin = tl.program_id(1) * share
    end = tl.minimum(begin + share, runs)
    o_first = o_n.to(tl.int64) * runs
    WORDS: tl.constexpr = WIDTH // WORD
    b_sum = tl.zeros([OUTPUTS, RUNS], dtype=tl.float32)
    for i in range(begin, end, RUNS):
        o_word = i * WORDS + tl.arange(0, RUNS * WORDS)[None, :]
        m_word = o_word < end * WORDS
        mask = m_n[:, None] & m_word
        o_w = o_first[:, None] * WORDS + o_word
        p_word = p_x + o_word * 8
        b_x0 = tl.load(p_word, mask=m_word, other=0.0)
        b_x1 = tl.load(p_word + 1, mask=m_word, other=0.0)
        b_x2 = tl.load(p_word + 2, mask=m_word, other=0.0)
        b_x3 = tl.load(p_word + 3, mask=m_word, other=0.0)
        b_x4 = tl.load(p_word + 4, mask=m_word, other=0.0)
        b_x5 = tl.load(p_word + 5, mask=m_word, other=0.0)
        b_x6 = tl.load(p_word + 6, mask=m_word, other=0.0)
        b_x7 = tl.load(p_word + 7, mask=m_word, other=0.0)
        b_words = tl.load(p_words + o_w, mask=mask, other=0)
        b_0, b_1, b_2, b_3, b_4, b_5, b_6, b_7 = _codes(b_words, p_levels)
        b_part = b_0 * b_x0 + b_1 * b_x1 + b_2 * b_x2 + b_3 * b_x3
        b_part = b_part + b_4 * b_x4 + b_5 * b_x5 + b_6 * b_x6 + b_7 * b_x7
        b_part = tl.sum(tl.reshape(b_part, (OUTPUTS, RUNS, WORDS)), axis=2)
        o_run = i + tl.arange(0, RUNS)
        o = o_first[:, None] + o_run[None, :]
        mask = m_n[:, None] & (o_run < end)[None, :]
        o_block = o // (BLOCK // WIDTH)
        b_absmax = _absmax(p_absmax, p_scale, p_offset, p_map, o_block, mask, DOUBLE)
        b_sum += b_part * b_absmax
    b_y = tl.sum(b_sum, axis=1)
    if RANK > 0:
        if tl.program_id(1) == 0:
            o_r = tl.arange(0, RANK)
            m_r = o_r < rank
            b_low = tl.load(p_low + o_r, mask=m_r, other=0.0).to(tl.float32)
            o_b = o_n[:, None] * rank + o_r[None, :]
            b_b = tl.load(p_b + o_b, mask=m_n[:, None] & m_r[None, :], other=0.0).to(tl.float32)
            b_y += tl.sum(b_b * b_low[None, :], axis=1)
    o_y = tl.program_id(1) * outputs + o_n
    tl.store(p_out + o_y, b_y.to(p_out.dtype.element_ty), mask=m_n)


@jit
def _rows_kernel(
    p_x,
    p_words,
    p_absmax,
    p_scale,
    p_offset,
    p_levels,
    p_map,
    p_low,
    p_b,
    p_out,
    rows,
    outputs,
    runs,
    share,
    rank,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    RUNS: tl.constexpr,
    RANK: tl.constexpr,
    DOUBLE: tl.constexpr,
):
    # As in _vector_kernel, for ROWS rows of x at once.
    o_n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    m_n = o_n < outputs
    o_m = tl.arange(0, ROWS)
    m_m = o_m < rows
    begin = tl.program_id(1) * share
    end = tl.minimum(begin + share, runs)
    o_first = o_n.to(tl.int64) * runs
    dtype: tl.constexpr = p_x.dtype.element_ty
    b_y = tl.zeros([OUTPUTS, ROWS], dtype=tl.float32)
    for i in range(begin, end, RUNS):
        o_run = i + tl.arange(0, RUNS)
        m_run = o_run < end
        o_k = i * WIDTH + tl.arange(0, RUNS * WIDTH)
        o_x = o_m[:, None] * (runs * WIDTH) + o_k[None, :]
        m_x = m_m[:, None] & (o_k < end * WIDTH)[None, :]
        b_x = tl.load(p_x + o_x, mask=m_x, other=0.0)
        o = o_first[:, None] + o_run[None, :]
        mask = m_n[:, None] & m_run[None, :]
        b_w = _weights(
            p_words, p_absmax, p_scale, p_offset, p_levels, p_map, o, mask, BLOCK, WIDTH, OUTPUTS,
            RUNS * WIDTH, DOUBLE, None, 1.0, dtype,
        )  # fmt: skip
        b_y = tl.dot(b_w, tl.trans(b_x), b_y, input_precision="ieee")
    if RANK > 0:
        if tl.program_id(1) == 0:
            o_r = tl.arange(0, RANK)
            m_r = (o_r < rank)[None, :]
            o_b = o_n[:, None] * rank + o_r[None, :]
            b_b = tl.load(p_b + o_b, mask=m_n[:, None] & m_r, other=0.0)
            o_low = o_m[:, None] * rank + o_r[None, :]
            b_low = tl.load(p_low + o_low, mask=m_m[:, None] & m_r, other=0.0)
            b_y = tl.dot(b_b, tl.trans(b_low), b_y, input_precision="ieee")
    o_y = tl.program_id(1) * rows * outputs + o_m[None, :] * outputs + o_n[:, None]
    m_y = m_m[None, :] & m_n[:, None]
    tl.store(p_out + o_y, b_y.to(p_out.dtype.element_ty), mask=m_y)


@operator(
    "nf4_matvec(Tensor x, Tensor packed, Tensor absmax, Tensor? absmax_scale,"
    " Tensor? absmax_offset, Tensor? low, Tensor? b, int outputs, int block, str kind) -> Tensor",
    fake=lambda x, packed, absmax, scale, offset, low, b, outputs, block, kind: x.new_empty(
        (x.shape[0], outputs)
    ),
)
def _launch_matvec(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    absmax_scale: Tensor | None,
    absmax_offset: Tensor | None,
    low: Tensor | None,
    b: Tensor | None,
    outputs: int,
    block: int,
    kind: str,
) -> Tensor:
    rows, width = x.shape
    if x.dtype != torch.float32:
        weight = Weight(packed, absmax, absmax_scale, absmax_offset, outputs, b=b)
        return products(x, [weight], block, kind, low=low)
    unit = min(block, UNIT)
    config = config_for(rows, outputs, width, block)
    levels, _, dynamic, *_ = codebook.device_tables(x.device, kind)
    runs = width // unit
    share = ceil_div(ceil_div(runs, config.split), config.runs) * config.runs
    split = ceil_div(runs, share)
    out = x.new_empty((split, rows, outputs))
    rank = 0 if b is None else b.shape[1]
    tensors = (
        _aligned(x),
        _aligned(packed).view(torch.int32),
        absmax,
        absmax_scale,
        absmax_offset,
        levels,
        dynamic,
    )
    term = [None if t is None else t.to(x.dtype).contiguous() for t in (low, b)]
    options = {
        "BLOCK": block,
        "WIDTH": unit,
        "OUTPUTS": config.outputs,
        "RUNS": config.runs,
        "DOUBLE": absmax_scale is not None,
        "num_warps": config.num_warps,
    }
    grid = (ceil_div(outputs, config.outputs), split)
    if rows == 1:
        _vector_kernel(
            grid,
            *tensors,
            *term,
            out,
            outputs,
            runs,
            share,
            rank,
            RANK=power_of_two(rank) if rank else 0,
            **options,
        )
    else:
        _rows_kernel(
            grid,
            *tensors,
            *term,
            out,
            rows,
            outputs,
            runs,
            share,
            rank,
            ROWS=max(16, power_of_two(rows)),
            RANK=max(16, power_of_two(rank)) if rank else 0,
            **options,
        )
    return out[0] if split == 1 else out.sum(0)
