"""A new token's heads made ready in one launch: q and k normalised and rotated, v normalised, keys
and values written to the cache.

The arithmetic and its roundings are those of rms_norm.py over each head and of rope.py. Forward
only.
"""

# Kernels are written in Triton's language: they have no Python types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import KernelError
from .launch import jit, on_gpu, operator, ops, power_of_two
from .launch import language as tl
from .rms_norm import rms_norm_reference
from .rms_norm_launch import _scale, _weigh
from .rope import HeadNorm, rope_reference

# Of e4m3.
LARGEST = 448.0


def head_step(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    at: Tensor,
    *,
    interleaved: bool = False,
    norm: HeadNorm | None = None,
    value_eps: float | None = None,
    keys_as_values: bool = False,
) -> Tensor:
    """qkv [b, h d + 2 k d], a new token of every row, to q [b, h, d], ready to attend.

    With `value_eps` each head of v is divided by its root mean square; with `keys_as_values` it is
    what there is of k, neither weighed nor rotated, and qkv is [b, h d + k d].

    keys and values [b, capacity, k, d] or [n, page, k, d] get the token's at places [b] int64 of
    their first two axes in one, in e4m3 the nearest number that it has. cos, sin fp32 [b, rot],
    rot <= d. Raises KernelError for shapes that do not fit.
    """
    b = qkv.shape[0]
    heads_k, dim = keys.shape[2:]
    heads = _heads(qkv, keys, keys_as_values)
    made = heads_k if keys_as_values else 2 * heads_k
    fits = (
        keys.shape == values.shape
        and keys.is_contiguous()
        and values.is_contiguous()
        and qkv.shape == (b, (heads + made) * dim)
        and heads > 0
        and cos.shape == sin.shape == (b, cos.shape[-1])
        and cos.shape[-1] % 2 == 0
        and 0 < cos.shape[-1] <= dim
        and at.shape == (b,)
        and keys.dtype == values.dtype
        and keys.dtype in (qkv.dtype, torch.float8_e4m3fn)
        and (norm is None or norm.q.shape == norm.k.shape == (dim,))
    )
    if not fits:
        raise KernelError(
            f"qkv {qkv.dtype} {list(qkv.shape)}, cos {list(cos.shape)}, keys {keys.dtype} "
            f"{list(keys.shape)}, values {list(values.shape)}, at {list(at.shape)}: expected "
            "[b, (h + 2 k) d], or (h + k) d where keys are values, [b, rot], twice "
            "[b, capacity, k, d] in memory without gaps, [b], "
            "of one dtype, or keys and values in e4m3, and weights of a norm [d]"
        )
    if not on_gpu(qkv, cos, sin, keys, values, at, *(norm or ())[:2]):
        return head_step_reference(
            *(qkv, cos, sin, keys, values, at),
            interleaved=interleaved,
            norm=norm,
            value_eps=value_eps,
            keys_as_values=keys_as_values,
        )
    how = (None, None, 0.0, 0.0, True) if norm is None else tuple(norm)
    more = interleaved, value_eps, keys_as_values
    q: Tensor = ops.head_step(qkv, cos, sin, keys, values, at, *how, *more)
    return q


def head_step_reference(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    at: Tensor,
    *,
    interleaved: bool = False,
    norm: HeadNorm | None = None,
    value_eps: float | None = None,
    keys_as_values: bool = False,
) -> Tensor:
    """Plain torch for the launch."""
    heads_k, dim = keys.shape[2:]
    every = qkv.view(qkv.shape[0], -1, dim)
    heads = every.shape[1] - (heads_k if keys_as_values else 2 * heads_k)
    q, k, v = every[:, :heads], every[:, heads : heads + heads_k], every[:, -heads_k:]
    if value_eps is not None:
        wide = v.to(torch.promote_types(v.dtype, torch.float32))
        v = F.rms_norm(wide, (dim,), eps=value_eps).to(v.dtype)
    if norm is not None:
        eps, offset, first = norm[2:]
        q = rms_norm_reference(q, norm.q, eps, offset=offset, cast_first=first)
        k = rms_norm_reference(k, norm.k, eps, offset=offset, cast_first=first)
    q, k = (
        rope_reference(x[:, None], cos[:, None], sin[:, None], interleaved=interleaved)[:, 0]
        for x in (q, k)
    )
    store(keys.flatten(0, 1), at, k)
    store(values.flatten(0, 1), at, v)
    return q


def store(rows: Tensor, at: Tensor, new: Tensor) -> None:
    """rows[at] = new, as `stored` has it."""
    new = stored(new, rows.dtype).contiguous()
    if rows.dtype == torch.float8_e4m3fn:  # which torch copies no rows of
        rows, new = rows.view(torch.uint8), new.view(torch.uint8)
    rows.index_copy_(0, at, new)


def stored(new: Tensor, dtype: torch.dtype) -> Tensor:
    """new in `dtype`; what e4m3 is too narrow for becomes its largest number."""
    if dtype == torch.float8_e4m3fn:
        new = new.clamp(-LARGEST, LARGEST)
    return new.to(dtype)


@jit
def _head_kernel(
    p_in,
    p_cos,
    p_sin,
    p_keys,
    p_values,
    p_at,
    p_q_weight,
    p_k_weight,
    p_out,
    heads,
    heads_k,
    rot,
    EPS: tl.constexpr,
    OFFSET: tl.constexpr,
    CAST_FIRST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    VALUE_EPS: tl.constexpr,
    KEYS_AS_VALUES: tl.constexpr,
    NARROW: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
):
    # A program has one head of one row: of q, then of k, then of v.
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    dtype: tl.constexpr = p_out.dtype.element_ty
    o_d = tl.arange(0, WIDTH)
    m_d = o_d < DIM
    if KEYS_AS_VALUES:
        made = tl.where(head >= heads + heads_k, head - heads_k, head)
        p_head = p_in + (row * (heads + heads_k) + made) * DIM
    else:
        p_head = p_in + (row * (heads + 2 * heads_k) + head) * DIM
    b_x = tl.load(p_head + o_d, mask=m_d, other=0.0)
    o_kv = tl.load(p_at + row) * heads_k + head - heads
    if head >= heads + heads_k:
        if VALUE_EPS is not None:
            b_value = b_x.to(tl.float32)
            b_value *= tl.rsqrt(tl.sum(b_value * b_value, axis=0) / DIM + VALUE_EPS)
            b_x = b_value.to(b_x.dtype)
        p_v = p_values + (o_kv - heads_k) * DIM + o_d
        tl.store(p_v, _stored(b_x, p_values.dtype.element_ty, NARROW), mask=m_d)
    else:
        # The other feature of each pair is read beside it.
        m_rot = o_d < rot
        if INTERLEAVED:
            o_other = o_d ^ 1
            m_first = o_d % 2 == 0
        else:
            o_other = tl.where(o_d < rot // 2, o_d + rot // 2, o_d - rot // 2)
            m_first = o_d < rot // 2
        b_other = tl.load(p_head + o_other, mask=m_rot, other=0.0)
        if p_q_weight is not None:
            b_wide = b_x.to(tl.float32)
            b_rms = tl.rsqrt(tl.sum(b_wide * b_wide, axis=0) / DIM + EPS)
            p_weight = p_q_weight if head < heads else p_k_weight
            b_x = _weighed(b_x, b_rms, p_weight + o_d, m_d, OFFSET, CAST_FIRST)
            b_other = _weighed(b_other, b_rms, p_weight + o_other, m_rot, OFFSET, CAST_FIRST)
        b_cos = tl.load(p_cos + row * rot + o_d, mask=m_rot, other=1.0)
        b_sin = tl.load(p_sin + row * rot + o_d, mask=m_rot, other=0.0)
        b_turn = b_other.to(tl.float32) * b_sin
        b_y = b_x.to(tl.float32) * b_cos + tl.where(m_first, -b_turn, b_turn)
        if head < heads:
            tl.store(p_out + (row * heads + head) * DIM + o_d, b_y.to(dtype), mask=m_d)
        else:
            b_key = _stored(b_y.to(dtype), p_keys.dtype.element_ty, NARROW)
            tl.store(p_keys + o_kv * DIM + o_d, b_key, mask=m_d)


@jit
def _stored(b_x, DTYPE: tl.constexpr, NARROW: tl.constexpr):
    """x as the cache holds it; e4m3 has no infinity to overflow to."""
    if NARROW:
        b_x = b_x.to(tl.float32)
        b_x = tl.where(b_x > LARGEST, LARGEST, tl.where(b_x < -LARGEST, -LARGEST, b_x))
    return b_x.to(DTYPE)


@jit
def _weighed(b_x, b_rms, p_weight, mask, OFFSET: tl.constexpr, CAST_FIRST: tl.constexpr):
    """x over its root mean square, weighed, rounded to the dtype of x."""
    b_w = tl.load(p_weight, mask=mask, other=0.0)
    b_scale = _scale(b_w, b_w.dtype, OFFSET, CAST_FIRST)
    return _weigh(b_x.to(tl.float32) * b_rms, b_scale, b_x.dtype, CAST_FIRST).to(b_x.dtype)


def _heads(qkv: Tensor, keys: Tensor, keys_as_values: bool) -> int:
    """How many heads of q there are."""
    heads_k, dim = keys.shape[2:]
    return qkv.shape[1] // dim - (heads_k if keys_as_values else 2 * heads_k)


@operator(
    "head_step(Tensor qkv, Tensor cos, Tensor sin, Tensor(a!) keys, Tensor(b!) values, Tensor at,"
    " Tensor? q_weight, Tensor? k_weight, float eps, float offset, bool cast_first,"
    " bool interleaved, float? value_eps, bool keys_as_values) -> Tensor",
    fake=lambda qkv, cos, sin, keys, *how: qkv.new_empty(
        (qkv.shape[0], _heads(qkv, keys, how[-1]), keys.shape[3])
    ),
    mutates=("keys", "values"),
)
def _launch(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    at: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    offset: float,
    cast_first: bool,
    interleaved: bool,
    value_eps: float | None,
    keys_as_values: bool,
) -> Tensor:
    heads_k, dim = keys.shape[2:]
    heads = _heads(qkv, keys, keys_as_values)
    out = qkv.new_empty((qkv.shape[0], heads, dim))
    _head_kernel(
        (qkv.shape[0], heads + 2 * heads_k),
        qkv.contiguous(),
        cos.float().contiguous(),
        sin.float().contiguous(),
        keys,
        values,
        at.contiguous(),
        *(None if w is None else w.contiguous() for w in (q_weight, k_weight)),
        out,
        heads,
        heads_k,
        cos.shape[-1],
        EPS=eps,
        OFFSET=offset,
        CAST_FIRST=cast_first,
        INTERLEAVED=interleaved,
        VALUE_EPS=value_eps,
        KEYS_AS_VALUES=keys_as_values,
        NARROW=keys.dtype == torch.float8_e4m3fn,
        DIM=dim,
        WIDTH=power_of_two(dim),
        num_warps=1 if dim <= 128 else 2,
        # Two products and a sum, each rounded, as the reference has them.
        enable_fp_fusion=False,
    )
    return out
