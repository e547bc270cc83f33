"""The kernels of FlashAttention-2 with what torch's fused backends lack: a soft cap, sinks, biases.

Dao, "FlashAttention-2" (arXiv 2307.08691): scores are made tile by tile and never written; of the
softmax the logarithm of its sum stays for the backward. Logits are kept in units of log 2. As
published, the backward's sums of dout * out take the output as it was rounded: where few keys make
the gradients of scores cancel out, that is most of their error. A program has one tile of queries
of one head (forward, dq) or one tile of keys of one head of keys (dk and dv, over all queries and
heads that see it), so that every gradient has one writer and one order of summation. `flash_launch`
cuts and launches.
"""

# Kernels are written in Triton's language: they have no Python types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False

from __future__ import annotations

from .launch import jit
from .launch import language as tl

LOG2E = 1.4426950408889634
# Where a running maximum starts: below every logit, and no infinity, whose differences are NaN.
LOWEST = -1e30


@jit
def _rows(p_x, first, stride, length, ROWS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Pointers to rows first.. of [length, DIM] as [ROWS, WIDTH], and which are inside."""
    o_row = tl.arange(0, ROWS)
    o_d = tl.arange(0, WIDTH)
    p_row = (p_x + first * tl.cast(stride, tl.int64)) + (o_row[:, None] * stride + o_d[None, :])
    mask = (first + o_row < length)[:, None]
    if DIM != WIDTH:
        mask = mask & (o_d < DIM)[None, :]
    return p_row, mask


@jit
def _tile(p_x, first, stride, length, ROWS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Rows first.. of [length, DIM] as [ROWS, WIDTH]; zeros past the ends."""
    p_row, mask = _rows(p_x, first, stride, length, ROWS, DIM, WIDTH)
    return tl.load(p_row, mask=mask, other=0.0)


@jit
def _keep(
    p_x, b_x, first, stride, length, ROWS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr
):
    """The inverse of `_tile`."""
    p_row, mask = _rows(p_x, first, stride, length, ROWS, DIM, WIDTH)
    tl.store(p_row, b_x.to(p_x.dtype.element_ty), mask=mask)


@jit
def _place(p_cu, total, PACKED: tl.constexpr):
    """The row, its first token and its length: a document of a packed row, or a row of a batch."""
    i = tl.program_id(2).to(tl.int64)
    if PACKED:
        row = i * 0
        first = tl.load(p_cu + i)
        length = tl.load(p_cu + i + 1) - first
        first = first.to(tl.int64)
    else:
        row = i
        first = i * 0
        length = total
    return row, first, length


@jit
def _logits(b_s, SCALE: tl.constexpr, SOFTCAP: tl.constexpr):
    """Products as logits in units of log 2, and d logit / d (SCALE product) where it is not 1.

    tanh from an exponential whose overflow and underflow give 1 and -1.
    """
    if SOFTCAP > 0:
        b_t = 1.0 - 2.0 / (1.0 + tl.exp2(b_s * (2.0 * LOG2E * SCALE / SOFTCAP)))
        b_s = b_t * (SOFTCAP * LOG2E)
        b_slope = 1.0 - b_t * b_t
    else:
        b_s = b_s * (SCALE * LOG2E)
        b_slope = 1.0
    return b_s, b_slope


@jit
def _seen(o_query, o_key, WINDOW: tl.constexpr):
    """Whether a query sees a key; the two broadcast."""
    seen = o_query >= o_key
    if WINDOW > 0:
        seen = seen & (o_query - o_key < WINDOW)
    return seen


@jit
def _scores(
    b_q,
    b_k,
    p_bias,
    o_n,
    length,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BIASED: tl.constexpr,
):
    """The logits of a tile of queries and one of keys, and their slopes, as `_logits`."""
    b_s, b_slope = _logits(tl.dot(b_q, tl.trans(b_k), input_precision="ieee"), SCALE, SOFTCAP)
    if BIASED:
        b_bias = tl.load(p_bias + o_n, mask=o_n < length, other=0.0)
        b_s += b_bias[None, :] * LOG2E
    return b_s, b_slope


@jit
def _attend(
    b_max,
    b_sum,
    b_out,
    b_q,
    p_k,
    p_v,
    p_bias,
    o_m,
    begin,
    end,
    length,
    stride_k,
    stride_v,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    BIASED: tl.constexpr,
    MASKED: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
):
    """The running maximum, sum and output after the keys begin..end."""
    for n in range(begin, end, KEYS):
        o_n = n + tl.arange(0, KEYS)
        b_k = _tile(p_k, n, stride_k, length, KEYS, DIM, WIDTH)
        b_s, _ = _scores(b_q, b_k, p_bias, o_n, length, SCALE, SOFTCAP, BIASED)
        if MASKED:
            b_s = tl.where(_seen(o_m[:, None], o_n[None, :], WINDOW), b_s, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, axis=1))
        b_less = tl.exp2(b_max - b_new)
        b_p = tl.exp2(b_s - b_new[:, None])
        b_sum = b_sum * b_less + tl.sum(b_p, axis=1)
        b_out = b_out * b_less[:, None]
        b_v = _tile(p_v, n, stride_v, length, KEYS, DIM, WIDTH)
        b_out = tl.dot(b_p.to(b_v.dtype), b_v, b_out, input_precision="ieee")
        b_max = b_new
    return b_max, b_sum, b_out


@jit
def _forward_kernel(
    p_q,
    p_k,
    p_v,
    p_cu,
    p_sinks,
    p_bias,
    p_out,
    p_lse,
    total,
    heads,
    columns,
    stride_q_row,
    stride_q,
    stride_q_head,
    stride_k_row,
    stride_k,
    stride_k_head,
    stride_v_row,
    stride_v,
    stride_v_head,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    PACKED: tl.constexpr,
    SINKS: tl.constexpr,
    BIASED: tl.constexpr,
    GROUPS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    row, first, length = _place(p_cu, total, PACKED)
    # The longest rows of scores first: what is left for the end is short.
    m = (tl.num_programs(0) - 1 - tl.program_id(0)) * QUERIES
    if m >= length:
        return
    head = tl.program_id(1)
    p_q += row * stride_q_row + first * stride_q + head * stride_q_head
    p_k += row * stride_k_row + first * stride_k + head // GROUPS * stride_k_head
    p_v += row * stride_v_row + first * stride_v + head // GROUPS * stride_v_head
    if BIASED:
        p_bias += head * columns
    o_m = m + tl.arange(0, QUERIES)
    b_q = _tile(p_q, m, stride_q, length, QUERIES, DIM, WIDTH)
    if SINKS:
        b_max = tl.zeros([QUERIES], dtype=tl.float32) + tl.load(p_sinks + head) * LOG2E
        b_sum = tl.full([QUERIES], 1.0, dtype=tl.float32)
    else:
        b_max = tl.full([QUERIES], LOWEST, dtype=tl.float32)
        b_sum = tl.zeros([QUERIES], dtype=tl.float32)
    b_out = tl.zeros([QUERIES, WIDTH], dtype=tl.float32)
    # Tiles of keys that all of the queries see need no mask; with a window one loop takes all.
    begin = m * 0
    if WINDOW > 0:
        begin = tl.maximum(m - WINDOW + 1, 0) // KEYS * KEYS
    else:
        b_max, b_sum, b_out = _attend(
            b_max, b_sum, b_out, b_q, p_k, p_v, p_bias, o_m, begin, m // KEYS * KEYS, length,
            stride_k, stride_v, SCALE, SOFTCAP, WINDOW, BIASED, False, DIM, WIDTH, KEYS,
        )  # fmt: skip
        begin = m // KEYS * KEYS
    b_max, b_sum, b_out = _attend(
        b_max, b_sum, b_out, b_q, p_k, p_v, p_bias, o_m, begin, tl.minimum(m + QUERIES, length),
        length, stride_k, stride_v, SCALE, SOFTCAP, WINDOW, BIASED, True, DIM, WIDTH, KEYS,
    )  # fmt: skip
    p_out += ((row * total + first) * heads + head) * DIM
    _keep(p_out, b_out / b_sum[:, None], m, heads * DIM, length, QUERIES, DIM, WIDTH)
    b_lse = (b_max + tl.log2(b_sum)) / LOG2E
    tl.store(p_lse + (row * heads + head) * total + first + o_m, b_lse, mask=o_m < length)


@jit
def _pull_queries(
    b_dq,
    b_q,
    b_do,
    b_lse,
    b_delta,
    p_k,
    p_v,
    p_bias,
    o_m,
    begin,
    end,
    length,
    stride_k,
    stride_v,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    BIASED: tl.constexpr,
    MASKED: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
):
    """dq / SCALE with what the keys begin..end add to it."""
    for n in range(begin, end, KEYS):
        o_n = n + tl.arange(0, KEYS)
        b_k = _tile(p_k, n, stride_k, length, KEYS, DIM, WIDTH)
        b_v = _tile(p_v, n, stride_v, length, KEYS, DIM, WIDTH)
        b_s, b_slope = _scores(b_q, b_k, p_bias, o_n, length, SCALE, SOFTCAP, BIASED)
        b_p = tl.exp2(b_s - b_lse[:, None])
        if MASKED:
            b_p = tl.where(_seen(o_m[:, None], o_n[None, :], WINDOW), b_p, 0.0)
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision="ieee")
        b_ds = b_p * (b_dp - b_delta[:, None]) * b_slope
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision="ieee")
    return b_dq


@jit
def _dq_kernel(
    p_do,
    p_q,
    p_k,
    p_v,
    p_out,
    p_lse,
    p_cu,
    p_bias,
    p_dq,
    p_delta,
    total,
    heads,
    columns,
    stride_q_row,
    stride_q,
    stride_q_head,
    stride_k_row,
    stride_k,
    stride_k_head,
    stride_v_row,
    stride_v,
    stride_v_head,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    PACKED: tl.constexpr,
    BIASED: tl.constexpr,
    GROUPS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """dq, and the sums of dout * out that `_dkv_kernel` reads after it."""
    row, first, length = _place(p_cu, total, PACKED)
    m = (tl.num_programs(0) - 1 - tl.program_id(0)) * QUERIES
    if m >= length:
        return
    head = tl.program_id(1)
    p_q += row * stride_q_row + first * stride_q + head * stride_q_head
    p_k += row * stride_k_row + first * stride_k + head // GROUPS * stride_k_head
    p_v += row * stride_v_row + first * stride_v + head // GROUPS * stride_v_head
    if BIASED:
        p_bias += head * columns
    stride = heads * DIM
    o_token = ((row * total + first) * heads + head) * DIM
    o_stat = (row * heads + head) * total + first
    o_m = m + tl.arange(0, QUERIES)
    m_m = o_m < length
    b_do = _tile(p_do + o_token, m, stride, length, QUERIES, DIM, WIDTH)
    b_out = _tile(p_out + o_token, m, stride, length, QUERIES, DIM, WIDTH)
    b_delta = tl.sum(b_do.to(tl.float32) * b_out.to(tl.float32), axis=1)
    tl.store(p_delta + o_stat + o_m, b_delta, mask=m_m)
    b_q = _tile(p_q, m, stride_q, length, QUERIES, DIM, WIDTH)
    # Past the end every weight is exp2(-inf).
    b_lse = tl.load(p_lse + o_stat + o_m, mask=m_m, other=float("inf")) * LOG2E
    b_dq = tl.zeros([QUERIES, WIDTH], dtype=tl.float32)
    begin = m * 0
    if WINDOW > 0:
        begin = tl.maximum(m - WINDOW + 1, 0) // KEYS * KEYS
    else:
        b_dq = _pull_queries(
            b_dq, b_q, b_do, b_lse, b_delta, p_k, p_v, p_bias, o_m, begin, m // KEYS * KEYS,
            length, stride_k, stride_v, SCALE, SOFTCAP, WINDOW, BIASED, False, DIM, WIDTH, KEYS,
        )  # fmt: skip
        begin = m // KEYS * KEYS
    b_dq = _pull_queries(
        b_dq, b_q, b_do, b_lse, b_delta, p_k, p_v, p_bias, o_m, begin,
        tl.minimum(m + QUERIES, length), length, stride_k, stride_v, SCALE, SOFTCAP, WINDOW,
        BIASED, True, DIM, WIDTH, KEYS,
    )  # fmt: skip
    _keep(p_dq + o_token, b_dq * SCALE, m, stride, length, QUERIES, DIM, WIDTH)


@jit
def _pull_keys(
    b_dk,
    b_dv,
    b_k,
    b_v,
    b_bias,
    p_q,
    p_do,
    p_lse,
    p_delta,
    o_n,
    begin,
    end,
    length,
    stride_q,
    stride_do,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    BIASED: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    QUERIES: tl.constexpr,
):
    """dk / SCALE and dv, or one of them, with what the queries begin..end of one head add to them;
    scores lie transposed, [keys, queries].
    """
    for m in range(begin, end, QUERIES):
        o_m = m + tl.arange(0, QUERIES)
        m_m = o_m < length
        b_q = _tile(p_q, m, stride_q, length, QUERIES, DIM, WIDTH)
        b_lse = tl.load(p_lse + o_m, mask=m_m, other=float("inf")) * LOG2E
        b_s, b_slope = _logits(tl.dot(b_k, tl.trans(b_q), input_precision="ieee"), SCALE, SOFTCAP)
        if BIASED:
            b_s += b_bias[:, None] * LOG2E
        b_p = tl.exp2(b_s - b_lse[None, :])
        # Everywhere: a second loop for the tiles without a mask takes the registers of one.
        b_p = tl.where(_seen(o_m[None, :], o_n[:, None], WINDOW), b_p, 0.0)
        b_do = _tile(p_do, m, stride_do, length, QUERIES, DIM, WIDTH)
        if DV:
            b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision="ieee")
        if DK:
            b_dp = tl.dot(b_v, tl.trans(b_do), input_precision="ieee")
            b_delta = tl.load(p_delta + o_m, mask=m_m, other=0.0)
            b_ds = b_p * (b_dp - b_delta[None, :]) * b_slope
            b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision="ieee")
    return b_dk, b_dv


@jit
def _dkv_kernel(
    p_do,
    p_q,
    p_k,
    p_v,
    p_lse,
    p_delta,
    p_cu,
    p_bias,
    p_dk,
    p_dv,
    total,
    heads,
    columns,
    stride_q_row,
    stride_q,
    stride_q_head,
    stride_k_row,
    stride_k,
    stride_k_head,
    stride_v_row,
    stride_v,
    stride_v_head,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    PACKED: tl.constexpr,
    BIASED: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    GROUPS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    row, first, length = _place(p_cu, total, PACKED)
    n = tl.program_id(0) * KEYS
    if n >= length:
        return
    head_k = tl.program_id(1)
    p_k += row * stride_k_row + first * stride_k + head_k * stride_k_head
    p_v += row * stride_v_row + first * stride_v + head_k * stride_v_head
    stride = heads * DIM
    o_n = n + tl.arange(0, KEYS)
    b_k = _tile(p_k, n, stride_k, length, KEYS, DIM, WIDTH)
    b_v = b_k
    if DK:
        b_v = _tile(p_v, n, stride_v, length, KEYS, DIM, WIDTH)
    b_dk = tl.zeros([KEYS, WIDTH], dtype=tl.float32)
    b_dv = tl.zeros([KEYS, WIDTH], dtype=tl.float32)
    end = length
    if WINDOW > 0:
        end = tl.minimum(end, n + KEYS - 1 + WINDOW)
    for g in range(GROUPS):
        head = head_k * GROUPS + g
        p_head = p_q + row * stride_q_row + first * stride_q + head * stride_q_head
        p_do_head = p_do + ((row * total + first) * heads + head) * DIM
        o_stat = (row * heads + head) * total + first
        b_bias = tl.zeros([KEYS], dtype=tl.float32)
        if BIASED:
            b_bias = tl.load(p_bias + head * columns + o_n, mask=o_n < length, other=0.0)
        b_dk, b_dv = _pull_keys(
            b_dk, b_dv, b_k, b_v, b_bias, p_head, p_do_head, p_lse + o_stat, p_delta + o_stat, o_n,
            n // QUERIES * QUERIES, end, length, stride_q, stride, SCALE, SOFTCAP, WINDOW, BIASED,
            DK, DV, DIM, WIDTH, QUERIES,
        )  # fmt: skip
    stride_out = heads // GROUPS * DIM
    o_token = ((row * total + first) * (heads // GROUPS) + head_k) * DIM
    if DK:
        _keep(p_dk + o_token, b_dk * SCALE, n, stride_out, length, KEYS, DIM, WIDTH)
    if DV:
        _keep(p_dv + o_token, b_dv, n, stride_out, length, KEYS, DIM, WIDTH)
