"""The Triton launch behind rope.py, which has its reference and defines the arithmetic."""

# Kernels are written in Triton's language: they have no Python types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .launch import ceil_div, jit, operator, power_of_two
from .launch import language as tl
from .rms_norm_launch import _scale, _weigh


class Config(NamedTuple):
    """How many heads of a token a program turns; warps."""

    heads: int
    num_warps: int


def config_for(heads: int, half: int) -> Config:
    """At most eight heads, 8 pairs a thread."""
    heads = min(8, power_of_two(heads))
    return Config(heads, min(8, max(1, heads * power_of_two(half) // 256)))


@jit
def _pairs(
    p_row,
    mask,
    rot,
    INTERLEAVED: tl.constexpr,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
    EVICT: tl.constexpr,
):
    """Both members [ROWS, HALF] of each pair of rows that start at p_row [ROWS, 1], in fp32."""
    if INTERLEAVED:
        # Neighbours are loaded together and parted in registers: wide accesses.
        p_row += tl.arange(0, 2 * HALF)[None, :]
        b_in = tl.load(p_row, mask=mask, other=0.0, eviction_policy=EVICT)
        return tl.split(tl.reshape(b_in.to(tl.float32), (ROWS, HALF, 2)))
    else:
        p_row += tl.arange(0, HALF)[None, :]
        b_1 = tl.load(p_row, mask=mask, other=0.0, eviction_policy=EVICT)
        b_2 = tl.load(p_row + rot // 2, mask=mask, other=0.0, eviction_policy=EVICT)
        return b_1.to(tl.float32), b_2.to(tl.float32)


@jit
def _rope_kernel(
    p_q,
    p_k,
    p_q_raw,
    p_k_raw,
    p_q_weight,
    p_k_weight,
    p_cos,
    p_sin,
    p_q_out,
    p_k_out,
    length,
    heads_q,
    heads_k,
    dim,
    rot,
    stride_q_row,
    stride_q_token,
    stride_q_head,
    stride_k_row,
    stride_k_token,
    stride_k_head,
    stride_cos_row,
    EPS: tl.constexpr,
    OFFSET: tl.constexpr,
    CAST_FIRST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
):
    # A program has HEADS heads of one token: of q, then of k. With weights each is normalised
    # before it is turned; INVERSE turns gradients back, and with weights pulls them through the
    # norm of the raw heads, which lie without gaps. Heads pass through the cache once, and leave it
    # before the tables, which other programs read too: 4% at heads of 256.
    ONCE: tl.constexpr = "evict_first"
    KEPT: tl.constexpr = "evict_last"
    i_token = tl.program_id(0).to(tl.int64)
    i_row = i_token // length
    i_place = i_token % length
    blocks_q = tl.cdiv(heads_q, HEADS)
    is_q = tl.program_id(1) < blocks_q
    i_block = tl.program_id(1) if is_q else tl.program_id(1) - blocks_q
    heads = heads_q if is_q else heads_k
    o_head = (i_block * HEADS + tl.arange(0, HEADS)).to(tl.int64)[:, None]
    m_head = o_head < heads
    if is_q:
        o_in = i_row * stride_q_row + i_place * stride_q_token + o_head * stride_q_head
    else:
        o_in = i_row * stride_k_row + i_place * stride_k_token + o_head * stride_k_head
    p_in = (p_q if is_q else p_k) + o_in
    o_out = (i_token * heads + o_head) * dim
    p_out = (p_q_out if is_q else p_k_out) + o_out
    dtype: tl.constexpr = p_q_out.dtype.element_ty
    if INTERLEAVED:
        m_table = tl.arange(0, 2 * HALF)[None, :] < rot
    else:
        m_table = tl.arange(0, HALF)[None, :] < rot // 2
    mask = m_head & m_table
    o_table = i_row * stride_cos_row + i_place * rot + tl.arange(0, 1)[:, None]
    b_cos1, b_cos2 = _pairs(p_cos + o_table, m_table, rot, INTERLEAVED, 1, HALF, KEPT)
    b_sin1, b_sin2 = _pairs(p_sin + o_table, m_table, rot, INTERLEAVED, 1, HALF, KEPT)
    b_1, b_2 = _pairs(p_in, mask, rot, INTERLEAVED, HEADS, HALF, ONCE)
    if REST > 0:
        o_rest = rot + tl.arange(0, REST)[None, :]
        m_rest = o_rest < dim
        b_3 = tl.load(p_in + o_rest, mask=m_head & m_rest, other=0.0).to(tl.float32)
    if p_q_weight is not None:
        w: tl.constexpr = p_q_weight.dtype.element_ty
        p_weight = (p_q_weight if is_q else p_k_weight) + tl.arange(0, 1)[:, None]
        b_w1, b_w2 = _pairs(p_weight, m_table, rot, INTERLEAVED, 1, HALF, KEPT)
        b_w1 = _scale(b_w1, w, OFFSET, CAST_FIRST)
        b_w2 = _scale(b_w2, w, OFFSET, CAST_FIRST)
        if INVERSE:
            p_raw = (p_q_raw if is_q else p_k_raw) + o_out
            b_x1, b_x2 = _pairs(p_raw, mask, rot, INTERLEAVED, HEADS, HALF, ONCE)
        else:
            b_x1 = b_1
            b_x2 = b_2
        b_squares = tl.sum(b_x1 * b_x1, axis=1) + tl.sum(b_x2 * b_x2, axis=1)
        if REST > 0:
            b_w3 = tl.load(p_weight + o_rest, mask=m_rest, other=0.0).to(tl.float32)
            b_w3 = _scale(b_w3, w, OFFSET, CAST_FIRST)
            b_x3 = b_3
            if INVERSE:
                b_x3 = tl.load(p_raw + o_rest, mask=m_head & m_rest, other=0.0).to(tl.float32)
            b_squares += tl.sum(b_x3 * b_x3, axis=1)
        b_rstd = (1.0 / tl.sqrt_rn(b_squares / dim + EPS))[:, None]
        b_x1 = b_x1 * b_rstd
        b_x2 = b_x2 * b_rstd
        if not INVERSE:
            b_1 = _weigh(b_x1, b_w1, dtype, CAST_FIRST)
            b_2 = _weigh(b_x2, b_w2, dtype, CAST_FIRST)
            if REST > 0:
                b_3 = _weigh(b_x3 * b_rstd, b_w3, dtype, CAST_FIRST)
    if INVERSE:
        b_out1 = b_1 * b_cos1 + b_2 * b_sin2
        b_out2 = b_2 * b_cos2 - b_1 * b_sin1
        if p_q_weight is not None:
            b_g1 = b_out1 * b_w1
            b_g2 = b_out2 * b_w2
            b_dot = tl.sum(b_g1 * b_x1, axis=1) + tl.sum(b_g2 * b_x2, axis=1)
            if REST > 0:
                b_g3 = b_3 * b_w3
                b_x3 = b_x3 * b_rstd
                b_dot += tl.sum(b_g3 * b_x3, axis=1)
            b_mean = (b_dot / dim)[:, None]
            b_out1 = (b_g1 - b_x1 * b_mean) * b_rstd
            b_out2 = (b_g2 - b_x2 * b_mean) * b_rstd
            if REST > 0:
                b_3 = (b_g3 - b_x3 * b_mean) * b_rstd
    else:
        b_out1 = b_1 * b_cos1 - b_2 * b_sin1
        b_out2 = b_2 * b_cos2 + b_1 * b_sin2
    if INTERLEAVED:
        b_out = tl.reshape(tl.join(b_out1, b_out2), (HEADS, 2 * HALF)).to(dtype)
        tl.store(p_out + tl.arange(0, 2 * HALF)[None, :], b_out, mask=mask, eviction_policy=ONCE)
    else:
        p_half = p_out + tl.arange(0, HALF)[None, :]
        tl.store(p_half, b_out1.to(dtype), mask=mask, eviction_policy=ONCE)
        tl.store(p_half + rot // 2, b_out2.to(dtype), mask=mask, eviction_policy=ONCE)
    if REST > 0:
        tl.store(p_out + o_rest, b_3.to(dtype), mask=m_head & m_rest)


def _launch(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    inverse: bool,
    raw: tuple[Tensor, Tensor] | None = None,
    norm: tuple[Tensor, Tensor, float, float, bool] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """norm: weights of q and of k, eps, offset, cast_first; raw: q and k before it."""
    batch, length, heads, dim = q.shape
    rot = cos.shape[-1]
    q = q if q.stride(-1) == 1 else q.contiguous()
    k = k if k is None or k.stride(-1) == 1 else k.contiguous()
    cos, sin = cos.float().contiguous(), sin.float().contiguous()
    raws = (None, None) if raw is None else tuple(t.contiguous() for t in raw)
    weights = (None, None) if norm is None else tuple(t.contiguous() for t in norm[:2])
    q_out = q.new_empty(q.shape)
    k_out = None if k is None else k.new_empty(k.shape)
    heads_k = 0 if k is None else k.shape[2]
    config = config_for(heads, rot // 2)
    blocks = ceil_div(heads, config.heads) + ceil_div(heads_k, config.heads)
    _rope_kernel(
        (batch * length, blocks),
        q,
        q if k is None else k,
        *raws,
        *weights,
        cos,
        sin,
        q_out,
        q_out if k_out is None else k_out,
        length,
        heads,
        heads_k,
        dim,
        rot,
        *q.stride()[:3],
        *((0, 0, 0) if k is None else k.stride()[:3]),
        length * rot if cos.shape[0] > 1 else 0,
        EPS=0.0 if norm is None else norm[2],
        OFFSET=0.0 if norm is None else norm[3],
        CAST_FIRST=True if norm is None else norm[4],
        INTERLEAVED=interleaved,
        INVERSE=inverse,
        HEADS=config.heads,
        HALF=power_of_two(rot // 2),
        REST=0 if rot == dim else power_of_two(dim - rot),
        num_warps=config.num_warps,
        # Two products and a sum, each rounded, as the reference has them.
        enable_fp_fusion=False,
    )
    return q_out, k_out


def _new(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@operator(
    "rope(Tensor x, Tensor cos, Tensor sin, bool interleaved, bool inverse) -> Tensor",
    fake=lambda x, *_: _new(x),
)
def _launch_one(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    return _launch(x, None, cos, sin, interleaved, inverse)[0]


@operator(
    "rope_qk(Tensor q, Tensor k, Tensor cos, Tensor sin, bool interleaved, bool inverse)"
    " -> (Tensor, Tensor)",
    fake=lambda q, k, *_: (_new(q), _new(k)),
)
def _launch_two(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    q_out, k_out = _launch(q, k, cos, sin, interleaved, inverse)
    assert k_out is not None
    return q_out, k_out


@operator(
    "norm_rope_qk(Tensor q, Tensor k, Tensor weight_q, Tensor weight_k, Tensor cos, Tensor sin,"
    " float eps, float offset, bool cast_first, bool interleaved) -> (Tensor, Tensor)",
    fake=lambda q, k, *_: (_new(q), _new(k)),
)
def _launch_normed(
    q: Tensor,
    k: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    offset: float,
    cast_first: bool,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    norm = (weight_q, weight_k, eps, offset, cast_first)
    q_out, k_out = _launch(q, k, cos, sin, interleaved, False, None, norm)
    assert k_out is not None
    return q_out, k_out


@operator(
    "norm_rope_qk_dx(Tensor dq, Tensor dk, Tensor q, Tensor k, Tensor weight_q, Tensor weight_k,"
    " Tensor cos, Tensor sin, float eps, float offset, bool cast_first, bool interleaved)"
    " -> (Tensor, Tensor)",
    fake=lambda dq, dk, *_: (_new(dq), _new(dk)),
)
def _launch_normed_dx(
    dq: Tensor,
    dk: Tensor,
    q: Tensor,
    k: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    offset: float,
    cast_first: bool,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    norm = (weight_q, weight_k, eps, offset, cast_first)
    q_out, k_out = _launch(dq, dk, cos, sin, interleaved, True, (q, k), norm)
    assert k_out is not None
    return q_out, k_out
