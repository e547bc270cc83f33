"""Mamba 2's scan in chunks of l tokens, forward and backward; the math is `ssd_reference`'s.

Letters as there; b and c are of a group, which r heads share. In a chunk, with sum_i the decays up
to token i and total all of them, where token i sees token j

    y_i = sum_(j <= i) (c_i . b_j) exp(sum_i - sum_j) dt_j x_j + exp(sum_i) before c_i + D x_i,
    after = exp(total) before + sum_j exp(total - sum_j) dt_j x_j b_j^T.

A program of `_states_kernel` goes through a row's chunks and leaves the state before each, or,
backward, the gradient of the state after each; all else is of one chunk. Dao and Gu, arXiv
2405.21060, sec. 6.
"""

# Kernels are written in Triton's language: they have no Python types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False

from __future__ import annotations

from .launch import jit
from .launch import language as tl


@jit
def _times(p_decay, p_dt, p_starts, o_t, s, heads, CHUNK: tl.constexpr):
    """Of a chunk's tokens o_t and one head: sums of decays, their total, dt (1 without p_dt), how
    many starts there were up to each, and how many in all. Past the row's end nothing decays.
    """
    m = o_t < s
    o = o_t.to(tl.int64) * heads
    b_decay = tl.load(p_decay + o, mask=m, other=0.0)
    b_dt = tl.where(m, 1.0, 0.0)
    if p_dt is not None:
        b_dt = tl.load(p_dt + o, mask=m, other=0.0)
    b_segment = tl.zeros([CHUNK], tl.int32)
    if p_starts is not None:
        b_segment = tl.cumsum(tl.load(p_starts + o_t, mask=m, other=0).to(tl.int32), 0)
    return tl.cumsum(b_decay, 0), tl.sum(b_decay, 0), b_dt, b_segment, tl.max(b_segment, 0)


@jit
def _tile(p, o_rows, o_columns, step, rows, columns):
    """[rows, columns] at the offsets, 0 outside."""
    m = (o_rows < rows)[:, None] & (o_columns < columns)[None, :]
    return tl.load(p + o_rows.to(tl.int64)[:, None] * step + o_columns[None, :], mask=m, other=0.0)


@jit
def _pairs(b_sum, b_segment, CHUNK: tl.constexpr):
    """exp(sum_i - sum_j) [i, j] where token i sees token j, else 0."""
    o = tl.arange(0, CHUNK)
    m = (o[:, None] >= o[None, :]) & (b_segment[:, None] == b_segment[None, :])
    return tl.where(m, tl.exp(tl.where(m, b_sum[:, None] - b_sum[None, :], 0.0)), 0.0)


@jit
def _turned_pairs(b_sum, b_segment, CHUNK: tl.constexpr):
    """The same as [j, i]."""
    o = tl.arange(0, CHUNK)
    m = (o[:, None] <= o[None, :]) & (b_segment[:, None] == b_segment[None, :])
    return tl.where(m, tl.exp(tl.where(m, b_sum[None, :] - b_sum[:, None], 0.0)), 0.0)


@jit
def _states_kernel(
    p_x, p_b, p_decay, p_dt, p_starts, p_first, p_states, p_last,
    s, heads, rows_x, step_x, rows_b, step_b,
    P: tl.constexpr, N: tl.constexpr, SHARE: tl.constexpr, BACKWARD: tl.constexpr,
    CHUNK: tl.constexpr, TILE_P: tl.constexpr, TILE_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state [p, n] before each chunk, from x and b; backward the gradient of the state after
    each, from those of y (p_x) and c (p_b).
    """
    i_h, i_b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    tiles = tl.cdiv(N, TILE_N)
    o_p = tl.program_id(0) // tiles * TILE_P + tl.arange(0, TILE_P)
    o_n = tl.program_id(0) % tiles * TILE_N + tl.arange(0, TILE_N)
    m_state = (o_p < P)[:, None] & (o_n < N)[None, :]
    o_state = o_p[:, None] * N + o_n[None, :]
    chunks = tl.cdiv(s, CHUNK)
    p_x += i_b * rows_x + i_h * P
    p_b += i_b * rows_b + i_h // SHARE * N
    p_decay += i_b * s * heads + i_h
    p_dt += i_b * s * heads + i_h
    if p_starts is not None:
        p_starts += i_b * s
    b_state = tl.zeros([TILE_P, TILE_N], tl.float32)
    if p_first is not None:
        p_first += (i_b * heads + i_h) * P * N
        b_state = tl.load(p_first + o_state, mask=m_state, other=0.0).to(tl.float32)
    for i in range(chunks):
        i_c = chunks - 1 - i if BACKWARD else i
        o_t = i_c * CHUNK + tl.arange(0, CHUNK)
        p = p_states + ((i_b * chunks + i_c) * heads + i_h) * P * N
        tl.store(p + o_state, b_state.to(p_states.dtype.element_ty), mask=m_state)
        b_sum, b_total, b_dt, b_segment, b_ended = _times(
            p_decay, p_dt, p_starts, o_t, s, heads, CHUNK
        )
        if BACKWARD:
            b_weight = tl.where(b_segment == 0, tl.exp(b_sum), 0.0)
        else:
            b_weight = tl.where(b_segment == b_ended, tl.exp(b_total - b_sum) * b_dt, 0.0)
        b_x = _tile(p_x, o_t, o_p, step_x, s, P)
        b_x = (b_x.to(tl.float32) * b_weight[:, None]).to(b_x.dtype)
        b_b = _tile(p_b, o_t, o_n, step_b, s, N)
        b_kept = tl.where(b_ended == 0, tl.exp(b_total), 0.0)
        b_state = b_state * b_kept + tl.dot(tl.trans(b_x), b_b, input_precision=PRECISION)
    if p_last is not None:
        p_last += (i_b * heads + i_h) * P * N
        tl.store(p_last + o_state, b_state.to(p_last.dtype.element_ty), mask=m_state)


@jit
def _out_kernel(
    p_x, p_b, p_c, p_decay, p_dt, p_d, p_starts, p_states, p_y,
    s, heads, rows_x, step_x, rows_b, step_b, rows_c, step_c,
    P: tl.constexpr, N: tl.constexpr, SHARE: tl.constexpr, CHUNK: tl.constexpr,
    TILE_P: tl.constexpr, TILE_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y of one chunk and head."""
    i_h, i_c, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_t, o_p = i_c * CHUNK + tl.arange(0, CHUNK), tl.arange(0, TILE_P)
    p_states += ((i_b * tl.num_programs(1) + i_c) * heads + i_h) * P * N
    p_b += i_b * rows_b + i_h // SHARE * N
    p_c += i_b * rows_c + i_h // SHARE * N
    if p_starts is not None:
        p_starts += i_b * s
    p_decay += i_b * s * heads + i_h
    if p_dt is not None:
        p_dt += i_b * s * heads + i_h
    b_sum, _, b_dt, b_segment, _ = _times(p_decay, p_dt, p_starts, o_t, s, heads, CHUNK)
    b_cb = tl.zeros([CHUNK, CHUNK], tl.float32)
    b_y = tl.zeros([CHUNK, TILE_P], tl.float32)
    for i_n in range(0, N, TILE_N):
        o_n = i_n + tl.arange(0, TILE_N)
        b_c = _tile(p_c, o_t, o_n, step_c, s, N)
        b_b = _tile(p_b, o_t, o_n, step_b, s, N)
        b_cb += tl.dot(b_c, tl.trans(b_b), input_precision=PRECISION)
        b_state = _tile(p_states, o_p, o_n, N, P, N)
        b_y += tl.dot(b_c, tl.trans(b_state), input_precision=PRECISION)
    b_y *= tl.where(b_segment == 0, tl.exp(b_sum), 0.0)[:, None]
    b_x = _tile(p_x + i_b * rows_x + i_h * P, o_t, o_p, step_x, s, P)
    b_w = (b_cb * _pairs(b_sum, b_segment, CHUNK) * b_dt[None, :]).to(b_x.dtype)
    b_y += tl.dot(b_w, b_x, input_precision=PRECISION)
    if p_d is not None:
        b_y += b_x.to(tl.float32) * tl.load(p_d + i_h)
    m = (o_t < s)[:, None] & (o_p < P)[None, :]
    o = ((i_b * s + o_t)[:, None] * heads + i_h) * P + o_p[None, :]
    tl.store(p_y + o, b_y.to(p_y.dtype.element_ty), mask=m)


@jit
def _dx_kernel(
    p_dy, p_x, p_b, p_c, p_decay, p_dt, p_d, p_starts, p_states, p_pulls,
    p_dx, p_ddt, p_ddecay, p_dd,
    s, heads, rows_x, step_x, rows_b, step_b, rows_c, step_c,
    P: tl.constexpr, N: tl.constexpr, SHARE: tl.constexpr, CHUNK: tl.constexpr,
    TILE_P: tl.constexpr, TILE_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of x, dt and decays of one chunk and head, and its share of D's; p_pulls are the
    gradients of the states after each chunk.
    """
    i_h, i_c, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_t, o_p = i_c * CHUNK + tl.arange(0, CHUNK), tl.arange(0, TILE_P)
    chunk = (i_b * tl.num_programs(1) + i_c) * heads + i_h
    p_b += i_b * rows_b + i_h // SHARE * N
    p_c += i_b * rows_c + i_h // SHARE * N
    if p_starts is not None:
        p_starts += i_b * s
    at = i_b * s * heads + i_h
    b_sum, b_total, b_dt, b_segment, b_ended = _times(
        p_decay + at, p_dt + at, p_starts, o_t, s, heads, CHUNK
    )
    b_cb = tl.zeros([CHUNK, CHUNK], tl.float32)
    b_from = tl.zeros([CHUNK, TILE_P], tl.float32)
    b_to = tl.zeros([CHUNK, TILE_P], tl.float32)
    b_through = 0.0
    for i_n in range(0, N, TILE_N):
        o_n = i_n + tl.arange(0, TILE_N)
        b_c = _tile(p_c, o_t, o_n, step_c, s, N)
        b_b = _tile(p_b, o_t, o_n, step_b, s, N)
        b_cb += tl.dot(b_c, tl.trans(b_b), input_precision=PRECISION)
        b_state = _tile(p_states + chunk * P * N, o_p, o_n, N, P, N)
        b_from += tl.dot(b_c, tl.trans(b_state), input_precision=PRECISION)
        b_pull = _tile(p_pulls + chunk * P * N, o_p, o_n, N, P, N)
        b_to += tl.dot(b_b, tl.trans(b_pull), input_precision=PRECISION)
        b_through += tl.sum(tl.sum(b_state.to(tl.float32) * b_pull.to(tl.float32), 1), 0)
    b_x = _tile(p_x + i_b * rows_x + i_h * P, o_t, o_p, step_x, s, P)
    b_dy = _tile(p_dy + (i_b * s * heads + i_h) * P, o_t, o_p, heads * P, s, P)
    b_wide, b_pulled = b_x.to(tl.float32), b_dy.to(tl.float32)
    b_w = b_cb * _pairs(b_sum, b_segment, CHUNK)
    # What each pair of tokens has to do with the loss, but for dt_j.
    b_pair = b_w * tl.dot(b_dy, tl.trans(b_x), input_precision=PRECISION)
    b_to *= tl.where(b_segment == b_ended, tl.exp(b_total - b_sum), 0.0)[:, None]
    b_end = tl.sum(b_wide * b_to, 1)
    b_seen = tl.where(b_segment == 0, tl.exp(b_sum), 0.0)
    b_pairs = tl.sum(b_pair, 0)
    b_dsum = tl.sum(b_pair * b_dt[None, :], 1) - b_pairs * b_dt
    b_dsum += tl.sum(b_from * b_pulled, 1) * b_seen
    # A token's decay is of the pairs it lies between, of what those after it see of the state
    # before, of what those before it leave behind, and of what lasts through the chunk.
    b_left = b_end * b_dt
    b_ddecay = tl.cumsum(b_dsum, 0, reverse=True) + tl.cumsum(b_left, 0) - b_left
    b_ddecay += tl.where(b_ended == 0, tl.exp(b_total), 0.0) * b_through
    m = o_t < s
    o = at + o_t * heads
    tl.store(p_ddt + o, b_pairs + b_end, mask=m)
    tl.store(p_ddecay + o, b_ddecay, mask=m)
    if p_dd is not None:
        tl.store(p_dd + chunk, tl.sum(tl.sum(b_wide * b_pulled, 1), 0))
    b_dx = b_to + tl.dot(tl.trans(b_w).to(b_dy.dtype), b_dy, input_precision=PRECISION)
    b_dx = b_dx * b_dt[:, None] + b_pulled * tl.load(p_d + i_h)
    o = o[:, None] * P + o_p[None, :]
    tl.store(p_dx + o, b_dx.to(p_dx.dtype.element_ty), mask=m[:, None] & (o_p < P)[None, :])


@jit
def _dbc_kernel(
    p_dy, p_x, p_b, p_c, p_decay, p_dt, p_starts, p_states, p_pulls, p_db, p_dc,
    s, heads, rows_x, step_x, rows_b, step_b, rows_c, step_c,
    P: tl.constexpr, N: tl.constexpr, SHARE: tl.constexpr, SPLITS: tl.constexpr,
    CHUNK: tl.constexpr, TILE_P: tl.constexpr, TILE_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What some heads of a group give to the gradients of b and c of one chunk: [split, b, s, g, n]
    in fp32.
    """
    i_c, i_b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    tiles = tl.cdiv(N, TILE_N)
    o_n = tl.program_id(0) % tiles * TILE_N + tl.arange(0, TILE_N)
    i_split = tl.program_id(0) // tiles % SPLITS
    i_g = tl.program_id(0) // tiles // SPLITS
    o_t, o_p = i_c * CHUNK + tl.arange(0, CHUNK), tl.arange(0, TILE_P)
    if p_starts is not None:
        p_starts += i_b * s
    b_dcb = tl.zeros([CHUNK, CHUNK], tl.float32)
    b_db = tl.zeros([CHUNK, TILE_N], tl.float32)
    b_dc = tl.zeros([CHUNK, TILE_N], tl.float32)
    each: tl.constexpr = (SHARE + SPLITS - 1) // SPLITS
    for i in range(i_split * each, min(i_split * each + each, SHARE)):
        i_h = i_g * SHARE + i
        at = i_b * s * heads + i_h
        b_sum, b_total, b_dt, b_segment, b_ended = _times(
            p_decay + at, p_dt + at, p_starts, o_t, s, heads, CHUNK
        )
        b_x = _tile(p_x + i_b * rows_x + i_h * P, o_t, o_p, step_x, s, P)
        b_dy = _tile(p_dy + at * P, o_t, o_p, heads * P, s, P)
        b_pair = tl.dot(b_dy, tl.trans(b_x), input_precision=PRECISION)
        b_dcb += b_pair * _pairs(b_sum, b_segment, CHUNK) * b_dt[None, :]
        chunk = ((i_b * tl.num_programs(1) + i_c) * heads + i_h) * P * N
        b_weight = tl.where(b_segment == 0, tl.exp(b_sum), 0.0)
        b_dy = (b_dy.to(tl.float32) * b_weight[:, None]).to(b_dy.dtype)
        b_state = _tile(p_states + chunk, o_p, o_n, N, P, N)
        b_dc += tl.dot(b_dy, b_state, input_precision=PRECISION)
        b_weight = tl.where(b_segment == b_ended, tl.exp(b_total - b_sum) * b_dt, 0.0)
        b_x = (b_x.to(tl.float32) * b_weight[:, None]).to(b_x.dtype)
        b_pull = _tile(p_pulls + chunk, o_p, o_n, N, P, N)
        b_db += tl.dot(b_x, b_pull, input_precision=PRECISION)
    b_b = _tile(p_b + i_b * rows_b + i_g * N, o_t, o_n, step_b, s, N)
    b_c = _tile(p_c + i_b * rows_c + i_g * N, o_t, o_n, step_c, s, N)
    b_dcb = b_dcb.to(b_b.dtype)
    b_dc += tl.dot(b_dcb, b_b, input_precision=PRECISION)
    b_db += tl.dot(tl.trans(b_dcb), b_c, input_precision=PRECISION)
    m = (o_t < s)[:, None] & (o_n < N)[None, :]
    row = (i_split * tl.num_programs(2) + i_b) * s + o_t
    o = (row[:, None] * (heads // SHARE) + i_g) * N + o_n[None, :]
    tl.store(p_db + o, b_db, mask=m)
    tl.store(p_dc + o, b_dc, mask=m)
