"""A few rows times 4-bit weights on the tensor cores, the codes decoded straight into fragments.

A product's operand in a matrix unit lies in registers by a fixed pattern. A sum does not depend on
the order of what it adds, so the columns of both operands are renamed here until that pattern is
the one in which 32-bit words of codes come from memory: no weight passes through shared memory. The
bare levels are multiplied, and each block's maximum applied to its sum in fp32. The warps of a
program share its outputs and take different runs of at most 64 weights; their sums are added at the
end. One launch serves several weights of one input, and may activate and multiply two of them.
"""

# Kernels are written in Triton's language: they have no Python types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False

from __future__ import annotations

from .codebook import GROUP
from .gated import _activate
from .launch import jit
from .launch import language as tl
from .nf4_decode import _fragments


@jit
def _either(p, p_other, o, m_other, TWO: tl.constexpr):
    """Pointers to `o` of `p`, or of `p_other` where m_other."""
    if TWO:
        return tl.where(m_other, p_other + o, p + o)
    else:
        return p + o


@jit
def _part(first, outputs, outputs1, SIDE: tl.constexpr, PARTS: tl.constexpr):
    """Of the outputs of PARTS weights, each padded to whole SIDEs, those from `first` on: which
    weight they are of, from which of its outputs on, and how many the weights before have.
    """
    part = 0
    column = 0
    if PARTS > 1:
        padded = tl.cdiv(outputs, SIDE) * SIDE
        padded1 = tl.cdiv(outputs1, SIDE) * SIDE
        if PARTS > 2 and first >= padded + padded1:
            first -= padded + padded1
            column = outputs + outputs1
            part = 2
        elif first >= padded:
            first -= padded
            column = outputs
            part = 1
    return part, first, column


@jit
def _of(part, x, x1, x2, PARTS: tl.constexpr):
    """x, x1 or x2."""
    if PARTS > 2:
        return tl.where(part == 2, x2, tl.where(part == 1, x1, x))
    elif PARTS > 1:
        return tl.where(part == 1, x1, x)
    else:
        return x


@jit
def _products_kernel(
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
    p_levels,
    p_map,
    p_out,
    rows,
    runs,
    outputs,
    outputs1,
    outputs2,
    stride,
    rank,
    zero,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    WARPS: tl.constexpr,
    TURNS: tl.constexpr,
    EIGHTS: tl.constexpr,
    PARTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RANK: tl.constexpr,
    DOUBLE: tl.constexpr,
    FRAGMENTS: tl.constexpr,
    UNSCALE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    WHOLE: tl.constexpr,
):
    # 16 outputs (with an activation, of each of two weights) for EIGHTS of 8 rows of x; each warp
    # takes TURNS runs a step.
    TWO: tl.constexpr = ACTIVATION is not None
    SIDE: tl.constexpr = 16
    M: tl.constexpr = SIDE * 2 if TWO else SIDE
    N: tl.constexpr = 8 * EIGHTS
    V: tl.constexpr = WIDTH // 32  # words of one thread
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
    o_warp = tl.arange(0, WARPS)
    o_v = tl.arange(0, V)
    # Threads of 8 outputs, 4 a row; then warps; then what one thread has of its own.
    o_half = tl.arange(0, M // 8)
    o_row = (o_half % (SIDE // 8) * 8)[None, None, None, :, None] + o_8[None, :, None, None, None]
    o_row = tl.minimum(first + o_row, outputs - 1).to(tl.int64) * runs
    o_in = (o_4[:, None] * V + o_v[None, :])[:, None, None, None, :]
    o_in = o_in + o_warp[None, None, :, None, None] * (4 * V)
    m_two = (o_half >= SIDE // 8)[None, None, None, :, None]
    p_word = _either(p_words, p_words1, o_row * (4 * V) + o_in, m_two, TWO)
    o_m = tl.arange(0, M)
    o_n = first + o_m % SIDE
    m_n = o_n < outputs
    o_n = tl.minimum(o_n, outputs - 1)
    o_first = (o_n.to(tl.int64) * runs)[None, :]
    m_m = o_m >= SIDE
    b_offset = 0.0
    if DOUBLE:
        b_offset = tl.load(p_offset)
        if TWO:
            b_offset = tl.where(m_m, tl.load(p_offset1), b_offset)[None, :]
    o_eight = tl.arange(0, EIGHTS)
    o_x = o_8[None, :, None, None, None, None] + (o_eight * 8)[None, None, None, :, None, None]
    o_x = tl.minimum(o_x, rows - 1) * (runs * WIDTH)
    o_x = o_x + ((o_4[:, None] * V + o_v[None, :]) * 8)[:, None, None, None, :, None]
    o_x = o_x + o_8[None, None, None, None, None, :]
    o_x = o_x + (o_warp * WIDTH)[None, None, :, None, None, None]
    o_zero = (o_warp * zero)[None, None, :, None, None]
    b_acc = tl.zeros([WARPS, M, N], dtype=tl.float32)
    for i in range(0, runs, WARPS * TURNS):
        for turn in tl.static_range(TURNS):
            at = i + turn * WARPS
            # Masks that are true throughout vanish.
            m_run = (at + o_warp < runs) | WHOLE
            m_5 = m_run[None, None, :, None, None]
            m_2 = m_run[:, None]
            b_words = tl.load(p_word + at * (4 * V), mask=m_5, other=0)
            b_x = tl.load(p_x + (at * WIDTH + o_x), mask=m_5[:, :, :, :, :, None], other=0.0)
            b_x = tl.reshape(b_x, (4, 8, WARPS, EIGHTS, V, 2, 4))
            b_x = tl.reshape(tl.permute(b_x, (2, 4, 5, 0, 6, 3, 1)), (WARPS, WIDTH, N))
            b_w = _fragments(b_words, p_levels, o_zero, FRAGMENTS).to(dtype, bitcast=True)
            b_w = tl.reshape(tl.permute(b_w, (2, 3, 1, 4, 7, 0, 6, 5)), (WARPS, M, WIDTH))
            b_part = tl.dot(b_w, b_x)
            o_block = (o_first + (at + o_warp)[:, None]) // (BLOCK // WIDTH)
            p_code = _either(p_absmax, p_absmax1, o_block, m_m[None, :], TWO)
            if DOUBLE:
                b_code = tl.load(p_code, mask=m_2, other=0).to(tl.int32)
                p_group = _either(p_scale, p_scale1, o_block // GROUP, m_m[None, :], TWO)
                b_scale = tl.load(p_group, mask=m_2, other=0.0)
                b_absmax = tl.load(p_map + b_code) * b_scale + b_offset
            else:
                b_absmax = tl.load(p_code, mask=m_2, other=0.0)
            b_acc += b_part * b_absmax[:, :, None]
    b_y = tl.sum(b_acc, axis=0) * UNSCALE
    o_x = tl.arange(0, N)
    m_x = o_x < rows
    if RANK > 0:
        # Of two weights each output has its own half of the low-rank inputs.
        SPAN: tl.constexpr = RANK * 2 if TWO else RANK
        o_r = tl.arange(0, SPAN)
        o_of = o_r % RANK
        m_r = o_of < rank
        o_low = (part + o_r // RANK) * rank + o_of
        width = rank * (2 if TWO else PARTS)
        b_low = tl.load(
            p_low + o_x[:, None] * width + o_low[None, :],
            mask=m_x[:, None] & m_r[None, :],
            other=0.0,
        )
        p_row = _either(p_b, p_b1, o_n[:, None] * rank + o_of[None, :], m_m[:, None], TWO)
        m_b = m_r[None, :] & ((o_r >= RANK)[None, :] == m_m[:, None])
        b_y = tl.dot(tl.load(p_row, mask=m_b, other=0.0), tl.trans(b_low), b_y)
    if p_bias is not None:
        p_of = _either(p_bias, p_bias1, o_n, m_m, TWO)
        b_y += tl.load(p_of).to(tl.float32)[:, None]
    if TWO:
        b_y = tl.permute(tl.reshape(b_y, (2, SIDE, N)), (1, 2, 0))
        b_gate, b_up = tl.split(b_y)
        b_act, _ = _activate(b_gate, ACTIVATION)
        b_y = b_act * b_up
        o_n = first + tl.arange(0, SIDE)
        m_n = o_n < outputs
    o_y = o_x[None, :] * stride + (column + o_n)[:, None]
    m_y = m_x[None, :] & m_n[:, None]
    if p_residual is not None:
        b_y = b_y * RESIDUAL + tl.load(p_residual + o_y, mask=m_y, other=0.0).to(tl.float32)
    tl.store(p_out + o_y, b_y.to(p_out.dtype.element_ty), mask=m_y)
