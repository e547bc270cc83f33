"""One row times 4-bit weights on the tensor cores: eight runs of an output are eight rows there.

With one row of x the product of nf4_tensor.py multiplies each weight by eight columns of which one
counts, reads 16 outputs from as many places, and looks every block's maximum up alone. Here the
rows of a matrix unit's tile are eight consecutive runs of one output, and its columns the eight
parts of x that belong to them: what counts is the diagonal, as many products as before. But codes,
maxima and x are read contiguously, and a lane looks up the maximum of one block, not four lanes
that of the same. The codes are decoded by shuffles: two byte permutes a weight, which share their
pipe with all other integer work, become a shift and a shuffle.
"""

# Kernels are written in Triton's language: they have no Python types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False

from __future__ import annotations

from .codebook import GROUP
from .gated import _activate
from .launch import jit
from .launch import language as tl
from .nf4_decode import _shuffled
from .nf4_tensor import _either, _of, _part

SIDE = 4  # outputs of a program, or of each of two weights under an activation


@jit
def _row_kernel(
    p_x,
    p_words,
    p_absmax,
    p_scale,
    p_offset,
    p_bias,
    p_b,
    p_words1,
    p_absmax1,
    p_scale1,
    p_offset1,
    p_bias1,
    p_b1,
    p_words2,
    p_absmax2,
    p_scale2,
    p_offset2,
    p_bias2,
    p_b2,
    p_low,
    p_residual,
    p_lanes,
    p_map,
    p_out,
    runs,
    outputs,
    outputs1,
    outputs2,
    rank,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    WARPS: tl.constexpr,
    TURNS: tl.constexpr,
    PARTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RANK: tl.constexpr,
    DOUBLE: tl.constexpr,
    SHUFFLES: tl.constexpr,
    UNSCALE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    WHOLE: tl.constexpr,
):
    # A warp takes eight runs of all outputs of the program, TURNS times a step.
    TWO: tl.constexpr = ACTIVATION is not None
    P: tl.constexpr = SIDE * 2 if TWO else SIDE
    M: tl.constexpr = 8 * P
    V: tl.constexpr = WIDTH // 32  # words of one thread
    STEP: tl.constexpr = WARPS * 8  # runs
    dtype: tl.constexpr = p_x.dtype.element_ty
    part, first, column = _part(tl.program_id(0) * SIDE, outputs, outputs1, SIDE, PARTS)
    outputs = _of(part, outputs, outputs1, outputs2, PARTS)
    p_words = _of(part, p_words, p_words1, p_words2, PARTS)
    p_absmax = _of(part, p_absmax, p_absmax1, p_absmax2, PARTS)
    if DOUBLE:
        p_scale = _of(part, p_scale, p_scale1, p_scale2, PARTS)
        p_offset = _of(part, p_offset, p_offset1, p_offset2, PARTS)
    if p_bias is not None:
        p_bias = _of(part, p_bias, p_bias1, p_bias2, PARTS)
    if RANK > 0:
        p_b = _of(part, p_b, p_b1, p_b2, PARTS)
    o_4 = tl.arange(0, 4)
    o_8 = tl.arange(0, 8)
    o_p = tl.arange(0, P)
    # Four threads share a run; then runs, warps, outputs, and what one thread has of its own.
    o_run = o_8[:, None] + tl.arange(0, WARPS)[None, :] * 8
    o_word = (o_4[:, None] * V + tl.arange(0, V)[None, :])[:, None, None, None, :]
    o_in = o_word + (o_run * (4 * V))[None, :, :, None, None]
    o_of = tl.minimum(first + o_p % SIDE, outputs - 1).to(tl.int64) * (runs * 4 * V)
    m_two = (o_p >= SIDE)[None, None, None, :, None]
    p_word = _either(p_words, p_words1, o_of[None, None, None, :, None] + o_in, m_two, TWO)
    o_x = o_in[:, :, :, :, :, None] * 8 + o_8[None, None, None, None, None, :]
    # Of the maxima each thread has some: eight of an output, output after output, warp by warp.
    o_m = tl.arange(0, WARPS * M)
    m_max = o_m % M // 8 >= SIDE
    o_first = tl.minimum(first + o_m // 8 % SIDE, outputs - 1).to(tl.int64) * runs
    o_turn = o_m // M * 8 + o_m % 8
    b_offset = 0.0
    if DOUBLE:
        b_offset = tl.load(p_offset)
        if TWO:
            b_offset = tl.where(m_max, tl.load(p_offset1), b_offset)
    b_acc = tl.zeros([WARPS, M, 8], dtype=tl.float32)
    for i in range(0, runs, STEP * TURNS):
        for turn in tl.static_range(TURNS):
            at = i + turn * STEP
            # Masks that are true throughout vanish.
            m_run = ((at + o_run < runs) | WHOLE)[None, :, :, None, None]
            m_x = m_run[:, :, :, :, :, None]
            b_words = tl.load(p_word + at * (4 * V), mask=m_run, other=0)
            b_x = tl.load(p_x + (at * WIDTH + o_x), mask=m_x, other=0.0)
            b_x = tl.reshape(b_x, (4, 8, WARPS, V, 2, 4))
            b_x = tl.reshape(tl.permute(b_x, (2, 3, 4, 0, 5, 1)), (WARPS, WIDTH, 8))
            b_w = _shuffled(b_words, p_lanes, SHUFFLES).to(dtype, bitcast=True)
            b_w = tl.reshape(tl.permute(b_w, (2, 3, 1, 4, 7, 0, 6, 5)), (WARPS, M, WIDTH))
            b_part = tl.dot(b_w, b_x)
            m_block = (at + o_turn < runs) | WHOLE
            o_block = (o_first + (at + o_turn)) // (BLOCK // WIDTH)
            p_code = _either(p_absmax, p_absmax1, o_block, m_max, TWO)
            if DOUBLE:
                b_code = tl.load(p_code, mask=m_block, other=0).to(tl.int32)
                p_group = _either(p_scale, p_scale1, o_block // GROUP, m_max, TWO)
                b_scale = tl.load(p_group, mask=m_block, other=0.0)
                b_absmax = tl.load(p_map + b_code) * b_scale + b_offset
            else:
                b_absmax = tl.load(p_code, mask=m_block, other=0.0)
            b_acc += b_part * tl.reshape(b_absmax, (WARPS, M))[:, :, None]
    m_own = (o_8[:, None] == o_8[None, :])[None, None, :, :]
    b_own = tl.where(m_own, tl.reshape(b_acc, (WARPS, P, 8, 8)), 0.0)
    b_y = tl.sum(tl.sum(tl.reshape(b_own, (WARPS, P, 64)), axis=2), axis=0) * UNSCALE
    o_n = tl.minimum(first + o_p % SIDE, outputs - 1)
    m_p = o_p >= SIDE
    if RANK > 0:
        # Of two weights each output has its own half of the low-rank inputs.
        o_r = tl.arange(0, RANK)
        m_r = (o_r < rank)[None, :]
        o_low = (part + o_p // SIDE)[:, None] * rank + o_r[None, :]
        b_low = tl.load(p_low + o_low, mask=m_r, other=0.0).to(tl.float32)
        p_row = _either(p_b, p_b1, o_n[:, None] * rank + o_r[None, :], m_p[:, None], TWO)
        b_y += tl.sum(tl.load(p_row, mask=m_r, other=0.0).to(tl.float32) * b_low, axis=1)
    if p_bias is not None:
        b_y += tl.load(_either(p_bias, p_bias1, o_n, m_p, TWO)).to(tl.float32)
    if TWO:
        b_gate, b_up = tl.split(tl.permute(tl.reshape(b_y, (2, SIDE)), (1, 0)))
        b_act, _ = _activate(b_gate, ACTIVATION)
        b_y = b_act * b_up
    o_y = first + tl.arange(0, SIDE)
    m_y = o_y < outputs
    if p_residual is not None:
        b_residual = tl.load(p_residual + column + o_y, mask=m_y, other=0.0)
        b_y = b_y * RESIDUAL + b_residual.to(tl.float32)
    tl.store(p_out + column + o_y, b_y.to(p_out.dtype.element_ty), mask=m_y)
