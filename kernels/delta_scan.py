"""The gated delta rule in chunks of l tokens, forward and backward; `delta_rule_reference`'s math.

Letters as there. In a chunk, with sum_i the decays up to token i, total all of them, pairs_ij =
exp(sum_i - sum_j) where token i sees token j, and S the state [n, p] before,

    A_ij = beta_i pairs_ij k_i . k_j  (j < i),    T = (1 + A)^-1,
    u = T beta (v - exp(sum) k S),    y = exp(sum) q S + (q k^T pairs) u,
    S' = exp(total) S + (exp(total - sum) k)^T u.

Backward, from dy and the gradient G of S': du = (q k^T pairs)^T dy + exp(total - sum) k G, dr = T^T
du is the gradient of what T multiplies, that of A is -dr u^T, and all else follows from these.
States and gradients of states are kept as [p, n]. What products make is never transposed: it is
made transposed, for Triton before 3.7.1 has wrong code for such products on Hopper.

Yang, Kautz and Hatamizadeh, arXiv 2412.06464, sec. 3.3; Yang et al., arXiv 2406.06484, sec. 3.
"""

# Kernels are written in Triton's language: they have no Python types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False

from __future__ import annotations

from .launch import jit
from .launch import language as tl
from .ssd_scan import _pairs, _tile, _times, _turned_pairs


@jit
def _solve_kernel(
    p_k, p_beta, p_decay, p_starts, p_t, s, heads, rows_k, step_k,
    N: tl.constexpr, SHARE: tl.constexpr, CHUNK: tl.constexpr, TILE_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """T [l, l] of one chunk and head, row by row."""
    i_h, i_c, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o, at = tl.arange(0, CHUNK), i_b * s * heads + i_h
    o_t = i_c * CHUNK + o
    p_k += i_b * rows_k + i_h // SHARE * N
    if p_starts is not None:
        p_starts += i_b * s
    b_sum, _, b_beta, b_segment, _ = _times(
        p_decay + at, p_beta + at, p_starts, o_t, s, heads, CHUNK
    )
    b_a = tl.zeros([CHUNK, CHUNK], tl.float32)
    for i_n in range(0, N, TILE_N):
        b_k = _tile(p_k, o_t, i_n + tl.arange(0, TILE_N), step_k, s, N)
        b_a += tl.dot(b_k, tl.trans(b_k), input_precision=PRECISION)
    # A as [j, i], which its symmetric products allow.
    b_a *= _turned_pairs(b_sum, b_segment, CHUNK) * b_beta[None, :]
    b_a = tl.where(o[:, None] < o[None, :], b_a, 0.0)
    b_t = tl.where(o[:, None] == o[None, :], 1.0, 0.0)
    for i in range(1, CHUNK):
        b_of = tl.sum(tl.where(o[None, :] == i, b_a, 0.0), 1)
        b_row = tl.sum(b_of[:, None] * b_t, 0)
        b_t = tl.where(o[:, None] == i, b_t - b_row[None, :], b_t)
    p_t += ((i_b * tl.num_programs(1) + i_c) * heads + i_h) * CHUNK * CHUNK
    tl.store(p_t + o[:, None] * CHUNK + o[None, :], b_t.to(p_t.dtype.element_ty))


@jit
def _states_kernel(
    p_k, p_v, p_beta, p_decay, p_starts, p_t, p_first, p_states, p_u, p_last,
    s, heads, rows_k, step_k, rows_v, step_v,
    P: tl.constexpr, N: tl.constexpr, SHARE: tl.constexpr, CHUNK: tl.constexpr,
    TILE_P: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """u, and the state [p, n] before each chunk, of some of a head's p."""
    i_h, i_b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    o, o_n = tl.arange(0, CHUNK), tl.arange(0, WIDTH)
    o_p = tl.program_id(0) * TILE_P + tl.arange(0, TILE_P)
    m_p = o_p < P
    m_state = m_p[:, None] & (o_n < N)[None, :]
    o_state = o_p[:, None] * N + o_n[None, :]
    chunks, at = tl.cdiv(s, CHUNK), i_b * s * heads + i_h
    p_k += i_b * rows_k + i_h // SHARE * N
    p_v += i_b * rows_v + i_h * P
    if p_starts is not None:
        p_starts += i_b * s
    b_state = tl.zeros([TILE_P, WIDTH], tl.float32)
    ends = (i_b * heads + i_h) * P * N
    o_ends = o_n[None, :] * P + o_p[:, None]
    if p_first is not None:
        b_state = tl.load(p_first + ends + o_ends, mask=m_state, other=0.0)
    for i_c in range(chunks):
        o_t = i_c * CHUNK + o
        chunk = (i_b * chunks + i_c) * heads + i_h
        b_sum, b_total, b_beta, b_segment, b_ended = _times(
            p_decay + at, p_beta + at, p_starts, o_t, s, heads, CHUNK
        )
        b_k = _tile(p_k, o_t, o_n, step_k, s, N)
        b_old = b_state.to(b_k.dtype)
        tl.store(p_states + chunk * P * N + o_state, b_old, mask=m_state)
        b_r = tl.dot(b_old, tl.trans(b_k), input_precision=PRECISION)
        b_r *= tl.where(b_segment == 0, tl.exp(b_sum), 0.0)[None, :]
        b_v = tl.trans(_tile(p_v, o_t, o_p, step_v, s, P)).to(tl.float32)
        b_r = ((b_v - b_r) * b_beta[None, :]).to(b_k.dtype)
        b_t = tl.load(p_t + chunk * CHUNK * CHUNK + o[:, None] * CHUNK + o[None, :])
        b_u = tl.dot(b_r, tl.trans(b_t), input_precision=PRECISION)
        o_u = (at + o_t * heads)[None, :] * P + o_p[:, None]
        m_u = m_p[:, None] & (o_t < s)[None, :]
        tl.store(p_u + o_u, b_u.to(p_u.dtype.element_ty), mask=m_u)
        b_u *= tl.where(b_segment == b_ended, tl.exp(b_total - b_sum), 0.0)[None, :]
        b_state *= tl.where(b_ended == 0, tl.exp(b_total), 0.0)
        b_state += tl.dot(b_u.to(b_k.dtype), b_k, input_precision=PRECISION)
    if p_last is not None:
        tl.store(p_last + ends + o_ends, b_state, mask=m_state)


@jit
def _local_kernel(
    p_dy, p_q, p_k, p_decay, p_starts, p_du, s, heads, rows_q, step_q, rows_k, step_k,
    P: tl.constexpr, N: tl.constexpr, SHARE: tl.constexpr, CHUNK: tl.constexpr,
    TILE_P: tl.constexpr, TILE_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What y of its own chunk gives to du."""
    i_h, i_c, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_t, o_p = i_c * CHUNK + tl.arange(0, CHUNK), tl.arange(0, TILE_P)
    at = i_b * s * heads + i_h
    p_q += i_b * rows_q + i_h // SHARE * N
    p_k += i_b * rows_k + i_h // SHARE * N
    if p_starts is not None:
        p_starts += i_b * s
    b_sum, _, _, b_segment, _ = _times(p_decay + at, None, p_starts, o_t, s, heads, CHUNK)
    b_kq = tl.zeros([CHUNK, CHUNK], tl.float32)
    for i_n in range(0, N, TILE_N):
        o_n = i_n + tl.arange(0, TILE_N)
        b_q = _tile(p_q, o_t, o_n, step_q, s, N)
        b_k = _tile(p_k, o_t, o_n, step_k, s, N)
        b_kq += tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)
    b_dy = _tile(p_dy + at * P, o_t, o_p, heads * P, s, P)
    b_kq = (b_kq * _turned_pairs(b_sum, b_segment, CHUNK)).to(b_dy.dtype)
    b_du = tl.dot(b_kq, b_dy, input_precision=PRECISION)
    m = (o_t < s)[:, None] & (o_p < P)[None, :]
    o_du = (at + o_t * heads)[:, None] * P + o_p[None, :]
    tl.store(p_du + o_du, b_du.to(p_du.dtype.element_ty), mask=m)


@jit
def _pulls_kernel(
    p_dy, p_du, p_q, p_k, p_beta, p_decay, p_starts, p_t, p_pulls, p_dr,
    s, heads, rows_q, step_q, rows_k, step_k,
    P: tl.constexpr, N: tl.constexpr, SHARE: tl.constexpr, CHUNK: tl.constexpr,
    TILE_P: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dr, and the gradient [p, n] of the state after each chunk, of some of a head's p."""
    i_h, i_b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    o, o_n = tl.arange(0, CHUNK), tl.arange(0, WIDTH)
    o_p = tl.program_id(0) * TILE_P + tl.arange(0, TILE_P)
    m_p = o_p < P
    m_state = m_p[:, None] & (o_n < N)[None, :]
    o_state = o_p[:, None] * N + o_n[None, :]
    chunks, at = tl.cdiv(s, CHUNK), i_b * s * heads + i_h
    p_q += i_b * rows_q + i_h // SHARE * N
    p_k += i_b * rows_k + i_h // SHARE * N
    if p_starts is not None:
        p_starts += i_b * s
    b_pull = tl.zeros([TILE_P, WIDTH], tl.float32)
    for i in range(chunks):
        i_c = chunks - 1 - i
        o_t = i_c * CHUNK + o
        chunk = (i_b * chunks + i_c) * heads + i_h
        b_sum, b_total, b_beta, b_segment, b_ended = _times(
            p_decay + at, p_beta + at, p_starts, o_t, s, heads, CHUNK
        )
        b_q = _tile(p_q, o_t, o_n, step_q, s, N)
        b_k = _tile(p_k, o_t, o_n, step_k, s, N)
        b_new = b_pull.to(b_k.dtype)
        tl.store(p_pulls + chunk * P * N + o_state, b_new, mask=m_state)
        b_du = tl.dot(b_new, tl.trans(b_k), input_precision=PRECISION)
        b_du *= tl.where(b_segment == b_ended, tl.exp(b_total - b_sum), 0.0)[None, :]
        b_du += tl.trans(_tile(p_du + at * P, o_t, o_p, heads * P, s, P)).to(tl.float32)
        b_t = tl.load(p_t + chunk * CHUNK * CHUNK + o[:, None] * CHUNK + o[None, :])
        b_dr = tl.dot(b_du.to(b_k.dtype), b_t, input_precision=PRECISION)
        o_dr = (at + o_t * heads)[None, :] * P + o_p[:, None]
        m_dr = m_p[:, None] & (o_t < s)[None, :]
        tl.store(p_dr + o_dr, b_dr.to(p_dr.dtype.element_ty), mask=m_dr)
        b_seen = tl.where(b_segment == 0, tl.exp(b_sum), 0.0)
        b_z = (b_dr * (b_beta * b_seen)[None, :]).to(b_k.dtype)
        b_dy = tl.trans(_tile(p_dy + at * P, o_t, o_p, heads * P, s, P))
        b_dy = (b_dy.to(tl.float32) * b_seen[None, :]).to(b_q.dtype)
        b_pull *= tl.where(b_ended == 0, tl.exp(b_total), 0.0)
        b_pull += tl.dot(b_dy, b_q, input_precision=PRECISION)
        b_pull -= tl.dot(b_z, b_k, input_precision=PRECISION)


@jit
def _dq_kernel(
    p_dy, p_u, p_q, p_k, p_decay, p_starts, p_states, p_dq, p_dsum,
    s, heads, rows_q, step_q, rows_k, step_k,
    P: tl.constexpr, N: tl.constexpr, SHARE: tl.constexpr, CHUNK: tl.constexpr,
    TILE_P: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the queries of one chunk and group, and what y gives to those of the sums."""
    i_g, i_c, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_t, o_n = i_c * CHUNK + tl.arange(0, CHUNK), tl.arange(0, WIDTH)
    m_t = o_t < s
    p_q += i_b * rows_q + i_g * N
    p_k += i_b * rows_k + i_g * N
    if p_starts is not None:
        p_starts += i_b * s
    b_dq = tl.zeros([CHUNK, WIDTH], tl.float32)
    for i in range(SHARE):
        i_h = i_g * SHARE + i
        at = i_b * s * heads + i_h
        chunk = ((i_b * tl.num_programs(1) + i_c) * heads + i_h) * P * N
        b_sum, _, _, b_segment, _ = _times(p_decay + at, None, p_starts, o_t, s, heads, CHUNK)
        b_seen = tl.where(b_segment == 0, tl.exp(b_sum), 0.0)
        b_pair = tl.zeros([CHUNK, CHUNK], tl.float32)
        b_from = tl.zeros([CHUNK, WIDTH], tl.float32)
        for i_p in range(0, P, TILE_P):
            o_p = i_p + tl.arange(0, TILE_P)
            b_dy = _tile(p_dy + at * P, o_t, o_p, heads * P, s, P)
            b_u = _tile(p_u + at * P, o_t, o_p, heads * P, s, P)
            b_pair += tl.dot(b_dy, tl.trans(b_u), input_precision=PRECISION)
            b_state = _tile(p_states + chunk, o_p, o_n, N, P, N)
            b_dy = (b_dy.to(tl.float32) * b_seen[:, None]).to(b_dy.dtype)
            b_from += tl.dot(b_dy, b_state, input_precision=PRECISION)
        b_q = _tile(p_q, o_t, o_n, step_q, s, N)
        b_k = _tile(p_k, o_t, o_n, step_k, s, N)
        b_pair *= _pairs(b_sum, b_segment, CHUNK)
        b_qk = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        b_dsum = tl.sum(b_from * b_q.to(tl.float32), 1) + tl.sum(b_pair * b_qk, 1)
        tl.store(p_dsum + at + o_t * heads, b_dsum, mask=m_t)
        b_dq += b_from
        b_dq += tl.dot(b_pair.to(b_k.dtype), b_k, input_precision=PRECISION)
    o_q = ((i_b * s + o_t)[:, None] * (heads // SHARE) + i_g) * N + o_n[None, :]
    m_q = m_t[:, None] & (o_n < N)[None, :]
    tl.store(p_dq + o_q, b_dq.to(p_dq.dtype.element_ty), mask=m_q)


@jit
def _dk_kernel(
    p_dy, p_dr, p_u, p_q, p_k, p_v, p_beta, p_decay, p_starts, p_states, p_pulls, p_dsum,
    p_dk, p_dv, p_dbeta, p_ddecay,
    s, heads, rows_q, step_q, rows_k, step_k, rows_v, step_v,
    P: tl.constexpr, N: tl.constexpr, SHARE: tl.constexpr, CHUNK: tl.constexpr,
    TILE_P: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the keys of one chunk and group, and of its values, rates and decays; p_dsum is
    `_dq_kernel`'s.
    """
    i_g, i_c, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o = tl.arange(0, CHUNK)
    o_t, o_n = i_c * CHUNK + o, tl.arange(0, WIDTH)
    m_t = o_t < s
    p_q += i_b * rows_q + i_g * N
    p_k += i_b * rows_k + i_g * N
    if p_starts is not None:
        p_starts += i_b * s
    b_dk = tl.zeros([CHUNK, WIDTH], tl.float32)
    for i in range(SHARE):
        i_h = i_g * SHARE + i
        at = i_b * s * heads + i_h
        chunk = ((i_b * tl.num_programs(1) + i_c) * heads + i_h) * P * N
        b_sum, b_total, b_beta, b_segment, b_ended = _times(
            p_decay + at, p_beta + at, p_starts, o_t, s, heads, CHUNK
        )
        o_h = at + o_t * heads
        # Through u: of A, whose tokens i and j both have keys, as [i, j] and as [j, i]; and of what
        # was recalled of the state before.
        b_seen = tl.where(b_segment == 0, tl.exp(b_sum), 0.0)
        b_in = tl.zeros([CHUNK, CHUNK], tl.float32)
        b_out = tl.zeros([CHUNK, CHUNK], tl.float32)
        b_from = tl.zeros([CHUNK, WIDTH], tl.float32)
        b_dbeta = tl.zeros([CHUNK], tl.float32)
        for i_p in range(0, P, TILE_P):
            o_p = i_p + tl.arange(0, TILE_P)
            b_u = _tile(p_u + at * P, o_t, o_p, heads * P, s, P)
            b_dr = _tile(p_dr + at * P, o_t, o_p, heads * P, s, P)
            b_in += tl.dot(b_dr, tl.trans(b_u), input_precision=PRECISION)
            b_out += tl.dot(b_u, tl.trans(b_dr), input_precision=PRECISION)
            b_v = _tile(p_v + i_b * rows_v + i_h * P, o_t, o_p, step_v, s, P).to(tl.float32)
            b_wide = b_dr.to(tl.float32)
            b_dbeta += tl.sum(b_wide * b_v, 1)
            b_dv = (b_wide * b_beta[:, None]).to(p_dv.dtype.element_ty)
            m_v = m_t[:, None] & (o_p < P)[None, :]
            tl.store(p_dv + o_h[:, None] * P + o_p[None, :], b_dv, mask=m_v)
            b_state = _tile(p_states + chunk, o_p, o_n, N, P, N)
            b_dr = (b_wide * b_seen[:, None]).to(b_dr.dtype)
            b_from += tl.dot(b_dr, b_state, input_precision=PRECISION)
        b_k = _tile(p_k, o_t, o_n, step_k, s, N)
        b_kk = tl.dot(b_k, tl.trans(b_k), input_precision=PRECISION)
        b_in *= _pairs(b_sum, b_segment, CHUNK)
        b_in = -tl.where(o[:, None] > o[None, :], b_in, 0.0)
        b_rate = tl.sum(b_in * b_kk, 1) - tl.sum(b_from * b_k.to(tl.float32), 1)
        tl.store(p_dbeta + o_h, b_dbeta + b_rate, mask=m_t)
        b_out *= _turned_pairs(b_sum, b_segment, CHUNK) * b_beta[None, :]
        b_out = -tl.where(o[:, None] < o[None, :], b_out, 0.0)
        b_dsum = tl.load(p_dsum + o_h, mask=m_t, other=0.0) + b_rate * b_beta
        b_dsum -= tl.sum(b_out * b_kk, 1)
        b_dk -= b_from * b_beta[:, None]
        b_out += b_in * b_beta[:, None]
        b_dk += tl.dot(b_out.to(b_k.dtype), b_k, input_precision=PRECISION)
        # Through y of this chunk, as [j, i], and through the state after.
        b_weight = tl.where(b_segment == b_ended, tl.exp(b_total - b_sum), 0.0)
        b_pair = tl.zeros([CHUNK, CHUNK], tl.float32)
        b_to = tl.zeros([CHUNK, WIDTH], tl.float32)
        b_through = 0.0
        for i_p in range(0, P, TILE_P):
            o_p = i_p + tl.arange(0, TILE_P)
            b_u = _tile(p_u + at * P, o_t, o_p, heads * P, s, P)
            b_dy = _tile(p_dy + at * P, o_t, o_p, heads * P, s, P)
            b_pair += tl.dot(b_u, tl.trans(b_dy), input_precision=PRECISION)
            b_pull = _tile(p_pulls + chunk, o_p, o_n, N, P, N)
            b_u = (b_u.to(tl.float32) * b_weight[:, None]).to(b_u.dtype)
            b_to += tl.dot(b_u, b_pull, input_precision=PRECISION)
            b_state = _tile(p_states + chunk, o_p, o_n, N, P, N).to(tl.float32)
            b_through += tl.sum(tl.sum(b_state * b_pull.to(tl.float32), 1), 0)
        b_pair *= _turned_pairs(b_sum, b_segment, CHUNK)
        b_q = _tile(p_q, o_t, o_n, step_q, s, N)
        b_k = _tile(p_k, o_t, o_n, step_k, s, N)
        b_kq = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)
        b_dsum -= tl.sum(b_pair * b_kq, 1)
        b_left = tl.sum(b_to * b_k.to(tl.float32), 1)
        b_dk += b_to
        b_dk += tl.dot(b_pair.to(b_q.dtype), b_q, input_precision=PRECISION)
        b_ddecay = tl.cumsum(b_dsum, 0, reverse=True) + tl.cumsum(b_left, 0) - b_left
        b_ddecay += tl.where(b_ended == 0, tl.exp(b_total), 0.0) * b_through
        tl.store(p_ddecay + o_h, b_ddecay, mask=m_t)
    o_k = ((i_b * s + o_t)[:, None] * (heads // SHARE) + i_g) * N + o_n[None, :]
    m_k = m_t[:, None] & (o_n < N)[None, :]
    tl.store(p_dk + o_k, b_dk.to(p_dk.dtype.element_ty), mask=m_k)
