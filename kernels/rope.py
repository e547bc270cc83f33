"""Rotary position embedding on heads, forward and backward (the inverse rotation).

Su et al., "RoFormer" (arXiv 2104.09864). Two pairings of the rotated dims: halves (transformers'
`rotate_half`: dim i with dim i + rot/2) and interleaved (dim 2i with 2i + 1: GPT-J, Cohere). Each
head may be normalised before it is turned, in the same launch (Qwen3, Gemma 3). The Triton launch
is in rope_launch.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import KernelError
from . import rope_launch as rope_launch  # which defines the launches
from .launch import apply, on_gpu, once, ops
from .rms_norm import rms_norm_reference


class HeadNorm(NamedTuple):
    """RMSNorm of every head: weights [d] of q and of k, and how, as in `rms_norm`."""

    q: Tensor
    k: Tensor
    eps: float
    offset: float
    cast_first: bool


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
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    norm: HeadNorm | None = None,
) -> tuple[Tensor, Tensor]:
    """`rope` of q [b, s, h, d] and k [b, s, k, d] in one launch, every head normalised before it
    where `norm` says so.

    With a norm differentiable in its weights too, in more launches; what the norm rounds, to the
    dtype of q, is what is turned.
    """
    _check(q, cos, sin)
    _check(k, cos, sin)
    if q.dtype != k.dtype or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise KernelError(f"q {q.dtype} {list(q.shape)} and k {k.dtype} {list(k.shape)} do not fit")
    if norm is not None and not norm.q.shape == norm.k.shape == q.shape[3:]:
        raise KernelError(
            f"norms with weights {list(norm.q.shape)} and {list(norm.k.shape)} for heads of "
            f"{q.shape[3]}: expected twice [d]"
        )
    turned: tuple[Tensor, Tensor]
    if not on_gpu(q, k, cos, sin, *(norm or ())[:2]):
        if norm is not None:
            how: dict[str, Any] = {"offset": norm.offset, "cast_first": norm.cast_first}
            q = rms_norm_reference(q, norm.q, norm.eps, **how)
            k = rms_norm_reference(k, norm.k, norm.eps, **how)
        turned = (
            rope_reference(q, cos, sin, interleaved=interleaved),
            rope_reference(k, cos, sin, interleaved=interleaved),
        )
    elif norm is None:
        turned = apply(_RopeQK, q, k, cos, sin, interleaved)
    else:
        turned = apply(_NormRopeQK, q, k, cos, sin, *norm, interleaved)
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


class _NormRopeQK(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        cos: Tensor,
        sin: Tensor,
        weight_q: Tensor,
        weight_k: Tensor,
        eps: float,
        offset: float,
        cast_first: bool,
        interleaved: bool,
    ) -> tuple[Tensor, Tensor]:
        how = (eps, offset, cast_first, interleaved)
        q, k = ops.norm_rope_qk(q, k, weight_q, weight_k, cos, sin, *how)
        return q, k

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, ctx.eps, ctx.offset, ctx.cast_first, ctx.interleaved = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> Any:
        q, k, cos, sin, weight_q, weight_k = ctx.saved_tensors
        how = (ctx.eps, ctx.offset, ctx.cast_first)
        dweights: list[Tensor | None] = [None, None]
        if any(ctx.needs_input_grad[4:6]):
            dq, dk = once(ops.rope_qk, dq, dk, cos, sin, ctx.interleaved, True)
            dq, dweights[0] = once(ops.rms_norm_backward, dq, q, weight_q, None, *how)
            dk, dweights[1] = once(ops.rms_norm_backward, dk, k, weight_k, None, *how)
        else:
            given = (dq, dk, q, k, weight_q, weight_k, cos, sin)
            dq, dk = once(ops.norm_rope_qk_dx, *given, *how, ctx.interleaved)
        return dq, dk, None, None, *dweights, None, None, None, None
