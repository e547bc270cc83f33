"""RMS normalisation over the last dim, forward and backward, with a residual added in either; of
what is less its mean it is LayerNorm without a bias.

Zhang and Sennrich, "Root Mean Square Layer Normalization" (arXiv 1910.07467); Ba, Kiros and Hinton,
"Layer Normalization" (arXiv 1607.06450). Statistics are fp32. The Triton launches are in
rms_norm_launch.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import KernelError
from . import rms_norm_launch
from .launch import apply, on_gpu, once, ops

MAX_WIDTH = rms_norm_launch.MAX_WIDTH


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    offset: float = 0.0,
    cast_first: bool = True,
    centered: bool = False,
    onto: Tensor | None = None,
) -> Tensor:
    """x [..., e] over its root mean square, times (offset + weight [e]); the dtype of `x`.

    `cast_first` rounds to the dtype of `x` before the weight is applied (transformers'
    LlamaRMSNorm); without it everything is fp32 and the rounding comes last (Gemma, with offset
    1). `centered` takes from each row its mean first: LayerNorm. `onto` [..., e], of the dtype of
    `x`, is added to the rounded result. Raises KernelError.
    """
    _check(x, weight, onto)
    if not on_gpu(x, weight, onto):
        how: dict[str, Any] = {"offset": offset, "cast_first": cast_first, "centered": centered}
        return rms_norm_reference(x, weight, eps, **how, onto=onto)
    y: Tensor = apply(_RMSNorm, x, weight, onto, eps, offset, cast_first, centered)[0]
    return y


def rms_norm_reference(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    offset: float = 0.0,
    cast_first: bool = True,
    centered: bool = False,
    onto: Tensor | None = None,
) -> Tensor:
    """Plain torch, as transformers' LlamaRMSNorm (cast_first), Gemma2RMSNorm (offset 1) or
    CohereLayerNorm (centered, not cast_first) computes it.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if centered:
        wide = wide - wide.mean(-1, keepdim=True)
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if cast_first:
        scale = weight if offset == 0.0 else weight + offset
        y = (scale * normed.to(x.dtype)).to(x.dtype)
    else:
        scale = weight.to(wide.dtype)
        y = (normed * (scale if offset == 0.0 else offset + scale)).to(x.dtype)
    return y if onto is None else onto + y


def rms_norm_pull(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    offset: float = 0.0,
    cast_first: bool = True,
    centered: bool = False,
    onto: Tensor | None = None,
) -> Tensor:
    """dx [..., e] of `rms_norm` from the gradient dy of its result, for a weight that is not
    trained; plus `onto` [..., e], the gradient that passes beside the norm, before the rounding.

    The statistics are made again from x. Builds no graph. Raises KernelError as `rms_norm` does.
    """
    _check(x, weight, onto)
    _check(x, weight, dy)
    if on_gpu(dy, x, weight, onto):
        dx: Tensor = once(
            ops.rms_norm_dx, dy, x, weight, None, onto, eps, offset, cast_first, centered
        )
        return dx
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        how: dict[str, Any] = {"offset": offset, "cast_first": cast_first, "centered": centered}
        y = rms_norm_reference(x, weight.detach(), eps, **how)
    dx = torch.autograd.grad(y, x, dy)[0]
    return dx if onto is None else dx + onto


def _check(x: Tensor, weight: Tensor, beside: Tensor | None) -> None:
    if weight.shape != x.shape[-1:]:
        raise KernelError(f"weight {list(weight.shape)} for an input {list(x.shape)}: expected [e]")
    if beside is not None and (beside.shape != x.shape or beside.dtype != x.dtype):
        raise KernelError(
            f"{beside.dtype} {list(beside.shape)} beside an input {x.dtype} {list(x.shape)}: "
            "expected the same"
        )
    if x.shape[-1] > MAX_WIDTH and on_gpu(x, weight):
        raise KernelError(f"rows of {x.shape[-1]} values: the kernel takes up to {MAX_WIDTH}")


class _RMSNorm(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        onto: Tensor | None,
        eps: float,
        offset: float,
        cast_first: bool,
        centered: bool,
    ) -> tuple[Tensor, Tensor]:
        y, rstd = ops.rms_norm(x, weight, onto, eps, offset, cast_first, centered)
        return y, rstd

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, _, *ctx.how = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, weight, output[1])

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: Any) -> Any:
        x, weight, rstd = ctx.saved_tensors
        dx = dweight = None
        how = ctx.how
        if ctx.needs_input_grad[1]:
            dx, dweight = once(ops.rms_norm_backward, dy, x, weight, rstd, *how)
        elif ctx.needs_input_grad[0]:
            dx = once(ops.rms_norm_dx, dy, x, weight, rstd, None, *how)
        return dx, dweight, dy if ctx.needs_input_grad[2] else None, None, None, None, None
