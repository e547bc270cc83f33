"""Rotary position embedding on heads, forward and backward (the inverse rotation).

Su et al., "RoFormer" (arXiv 2104.09864). Two pairings of the rotated dims: halves (transformers'
`rotate_half`: dim i with dim i + rot/2) and interleaved (dim 2i with 2i + 1: GPT-J, Cohere).
"""

# Kernels are written in Triton's language: they have no Python types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import KernelError
from .launch import apply, jit, on_gpu, once, operator, ops, power_of_two
from .launch import language as tl


def config_for(heads: int, half: int) -> int:
    """Warps of a program that turns all heads of one token, about 16 pairs a thread."""
    return min(8, max(1, power_of_two(heads) * power_of_two(half) // 512))


def rope(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """x [b, s, h, d] rotated by cos, sin [b or 1, s, rot], fp32, rot <= d; dims past rot pass
    through.

    Computed in fp32 and rounded once, contiguous, the dtype of `x`; in fp32 equal to
    transformers' `x * cos + rotate_half(x) * sin` bit for bit (transformers rounds cos, sin and
    each product to bf16 in bf16). No gradient reaches cos and sin. Raises KernelError.
    """
    _check(x, cos, sin)
    if not on_gpu(x, cos, sin):
        return rope_reference(x, cos, sin, interleaved=interleaved)
    y: Tensor = apply(_Rope, x, cos, sin, interleaved)
    return y


def rope_qk(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """`rope` of q [b, s, h, d] and k [b, s, k, d] in one launch."""
    _check(q, cos, sin)
    _check(k, cos, sin)
    if q.dtype != k.dtype or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise KernelError(f"q {q.dtype} {list(q.shape)} and k {k.dtype} {list(k.shape)} do not fit")
    if not on_gpu(q, k, cos, sin):
        return (
            rope_reference(q, cos, sin, interleaved=interleaved),
            rope_reference(k, cos, sin, interleaved=interleaved),
        )
    turned: tuple[Tensor, Tensor] = apply(_RopeQK, q, k, cos, sin, interleaved)
    return turned


def _check(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    fits = (
        x.dim() == 4
        and cos.shape == sin.shape
        and cos.dim() == 3
        and cos.shape[0] in (1, x.shape[0])
        and cos.shape[1] == x.shape[1]
        and cos.shape[2] <= x.shape[3]
        and cos.shape[2] % 2 == 0
    )
    if not fits:
        raise KernelError(
            f"heads {list(x.shape)} with cos {list(cos.shape)} and sin {list(sin.shape)}: "
            "expected [b, s, h, d] and twice [b or 1, s, rot], rot even and at most d"
        )


def rope_reference(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Plain torch, in fp32 (float64 for a float64 input), rounded once."""
    rot = cos.shape[-1]
    wide = x[..., :rot].to(torch.promote_types(x.dtype, torch.float32))
    if interleaved:
        turned = torch.stack([-wide[..., 1::2], wide[..., 0::2]], -1).flatten(-2)
    else:
        turned = torch.cat([-wide[..., rot // 2 :], wide[..., : rot // 2]], -1)
    out = (wide * cos.unsqueeze(2) + turned * sin.unsqueeze(2)).to(x.dtype)
    return out if rot == x.shape[-1] else torch.cat([out, x[..., rot:]], -1)


class _Rope(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        y: Tensor = ops.rope(x, cos, sin, interleaved, False)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, cos, sin, ctx.interleaved = inputs
        ctx.save_for_backward(cos, sin)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        dx = once(ops.rope, dy, cos, sin, ctx.interleaved, True)
        return dx, None, None, None


class _RopeQK(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
    ) -> tuple[Tensor, Tensor]:
        q, k = ops.rope_qk(q, k, cos, sin, interleaved, False)
        return q, k

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, _, cos, sin, ctx.interleaved = inputs
        ctx.save_for_backward(cos, sin)

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        dq, dk = once(ops.rope_qk, dq, dk, cos, sin, ctx.interleaved, True)
        return dq, dk, None, None, None


@jit
def _turn(
    p_in,
    p_out,
    b_cos1,
    b_cos2,
    b_sin1,
    b_sin2,
    heads,
    dim,
    rot,
    stride_head,
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
):
    o_head = tl.arange(0, HEADS).to(tl.int64)[:, None]
    if INTERLEAVED:
        # Neighbours are loaded together and parted in registers: wide accesses.
        o_pair = tl.arange(0, 2 * HALF)[None, :]
        mask = (o_head < heads) & (o_pair < rot)
        b_in = tl.load(p_in + o_head * stride_head + o_pair, mask=mask, other=0.0).to(tl.float32)
        b_1, b_2 = tl.split(tl.reshape(b_in, (HEADS, HALF, 2)))
    else:
        o_half = tl.arange(0, HALF)[None, :]
        mask = (o_head < heads) & (o_half < rot // 2)
        p_1 = p_in + o_head * stride_head + o_half
        b_1 = tl.load(p_1, mask=mask, other=0.0).to(tl.float32)
        b_2 = tl.load(p_1 + rot // 2, mask=mask, other=0.0).to(tl.float32)
    if INVERSE:
        b_out1 = b_1 * b_cos1 + b_2 * b_sin2
        b_out2 = b_2 * b_cos2 - b_1 * b_sin1
    else:
        b_out1 = b_1 * b_cos1 - b_2 * b_sin1
        b_out2 = b_2 * b_cos2 + b_1 * b_sin2
    type_out = p_out.dtype.element_ty
    if INTERLEAVED:
        b_out = tl.reshape(tl.join(b_out1, b_out2), (HEADS, 2 * HALF))
        tl.store(p_out + o_head * dim + o_pair, b_out.to(type_out), mask=mask)
    else:
        p_out1 = p_out + o_head * dim + o_half
        tl.store(p_out1, b_out1.to(type_out), mask=mask)
        tl.store(p_out1 + rot // 2, b_out2.to(type_out), mask=mask)
    if REST > 0:
        o_rest = rot + tl.arange(0, REST)[None, :]
        m_rest = (o_head < heads) & (o_rest < dim)
        b_rest = tl.load(p_in + o_head * stride_head + o_rest, mask=m_rest, other=0.0)
        tl.store(p_out + o_head * dim + o_rest, b_rest, mask=m_rest)


@jit
def _rope_kernel(
    p_q,
    p_k,
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
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
    HEADS_Q: tl.constexpr,
    HEADS_K: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
):
    i_token = tl.program_id(0).to(tl.int64)
    i_row = i_token // length
    i_place = i_token % length
    p_cos += i_row * stride_cos_row + i_place * rot
    p_sin += i_row * stride_cos_row + i_place * rot
    if INTERLEAVED:
        o_pair = tl.arange(0, 2 * HALF)
        b_cos = tl.load(p_cos + o_pair, mask=o_pair < rot, other=0.0)
        b_sin = tl.load(p_sin + o_pair, mask=o_pair < rot, other=0.0)
        b_cos1, b_cos2 = tl.split(tl.reshape(b_cos, (1, HALF, 2)))
        b_sin1, b_sin2 = tl.split(tl.reshape(b_sin, (1, HALF, 2)))
    else:
        o_half = tl.arange(0, HALF)
        m_half = o_half < rot // 2
        b_cos1 = tl.load(p_cos + o_half, mask=m_half, other=0.0)[None, :]
        b_cos2 = tl.load(p_cos + rot // 2 + o_half, mask=m_half, other=0.0)[None, :]
        b_sin1 = tl.load(p_sin + o_half, mask=m_half, other=0.0)[None, :]
        b_sin2 = tl.load(p_sin + rot // 2 + o_half, mask=m_half, other=0.0)[None, :]
    _turn(
        p_q + i_row * stride_q_row + i_place * stride_q_token,
        p_q_out + i_token * heads_q * dim,
        b_cos1, b_cos2, b_sin1, b_sin2,
        heads_q, dim, rot, stride_q_head, INTERLEAVED, INVERSE, HEADS_Q, HALF, REST,
    )  # fmt: skip
    if HEADS_K > 0:
        _turn(
            p_k + i_row * stride_k_row + i_place * stride_k_token,
            p_k_out + i_token * heads_k * dim,
            b_cos1, b_cos2, b_sin1, b_sin2,
            heads_k, dim, rot, stride_k_head, INTERLEAVED, INVERSE, HEADS_K, HALF, REST,
        )  # fmt: skip


def _launch(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool
) -> tuple[Tensor, Tensor | None]:
    batch, length, heads, dim = q.shape
    rot = cos.shape[-1]
    q = q if q.stride(-1) == 1 else q.contiguous()
    k = k if k is None or k.stride(-1) == 1 else k.contiguous()
    cos, sin = cos.float().contiguous(), sin.float().contiguous()
    q_out = q.new_empty(q.shape)
    k_out = None if k is None else k.new_empty(k.shape)
    heads_k = 0 if k is None else k.shape[2]
    _rope_kernel(
        (batch * length,),
        q,
        k,
        cos,
        sin,
        q_out,
        k_out,
        length,
        heads,
        heads_k,
        dim,
        rot,
        *q.stride()[:3],
        *((0, 0, 0) if k is None else k.stride()[:3]),
        length * rot if cos.shape[0] > 1 else 0,
        INTERLEAVED=interleaved,
        INVERSE=inverse,
        HEADS_Q=power_of_two(heads),
        HEADS_K=0 if k is None else power_of_two(heads_k),
        HALF=power_of_two(rot // 2),
        REST=0 if rot == dim else power_of_two(dim - rot),
        num_warps=config_for(heads, rot // 2),
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
