"""The clamped SwiGLU of gpt-oss (transformers' `GptOssExperts`), forward and backward.

With g = min(gate, limit) and u = clamp(up, -limit, limit): g sigmoid(alpha g) (u + 1).
"""

# Kernels are written in Triton's language: they have no Python types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .gated import BLOCK, WARPS, _check_pair, _new, _sigmoid
from .launch import apply, ceil_div, jit, on_gpu, once, operator, ops
from .launch import language as tl


def clamped(gate: Tensor, up: Tensor, alpha: float, limit: float) -> Tensor:
    """The clamped SwiGLU, elementwise, the shape and dtype of gate and up.

    The launch computes in fp32 and rounds once; its backward reads gate and up only. Where a clamp
    cuts, the gradient is zero. Raises KernelError.
    """
    _check_pair(gate, up)
    if not on_gpu(gate, up):
        return clamped_reference(gate, up, alpha, limit)
    h: Tensor = apply(_Clamped, gate, up, alpha, limit)
    return h


def clamped_reference(gate: Tensor, up: Tensor, alpha: float, limit: float) -> Tensor:
    """Plain torch, as transformers computes it, in the dtype of its inputs."""
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + 1) * (gate * torch.sigmoid(gate * alpha))


class _Clamped(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(gate: Tensor, up: Tensor, alpha: float, limit: float) -> Tensor:
        h: Tensor = ops.clamped(gate, up, alpha, limit)
        return h

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        gate, up, ctx.alpha, ctx.limit = inputs
        ctx.save_for_backward(gate, up)

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> Any:
        gate, up = ctx.saved_tensors
        return *once(ops.clamped_backward, dh, gate, up, ctx.alpha, ctx.limit), None, None


@jit
def _forward_kernel(p_gate, p_up, p_h, count, alpha, limit, BLOCK: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = o < count
    b_gate = tl.load(p_gate + o, mask=mask, other=0.0).to(tl.float32)
    b_up = tl.load(p_up + o, mask=mask, other=0.0).to(tl.float32)
    # Written as choices, which let NaN through as torch's clamp does.
    b_g = tl.where(b_gate > limit, limit, b_gate)
    b_u = tl.where(b_up > limit, limit, tl.where(b_up < -limit, -limit, b_up))
    b_s, _ = _sigmoid(alpha * b_g)
    tl.store(p_h + o, (b_g * b_s * (b_u + 1.0)).to(p_h.dtype.element_ty), mask=mask)


@jit
def _backward_kernel(p_dh, p_gate, p_up, p_dgate, p_dup, count, alpha, limit, BLOCK: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = o < count
    b_dh = tl.load(p_dh + o, mask=mask, other=0.0).to(tl.float32)
    b_gate = tl.load(p_gate + o, mask=mask, other=0.0).to(tl.float32)
    b_up = tl.load(p_up + o, mask=mask, other=0.0).to(tl.float32)
    b_g = tl.where(b_gate > limit, limit, b_gate)
    b_u = tl.where(b_up > limit, limit, tl.where(b_up < -limit, -limit, b_up))
    b_s, b_rest = _sigmoid(alpha * b_g)
    b_slope = b_s * (1.0 + alpha * b_g * b_rest)
    b_dgate = tl.where(b_gate > limit, 0.0, b_dh * (b_u + 1.0) * b_slope)
    b_dup = tl.where((b_up > limit) | (b_up < -limit), 0.0, b_dh * (b_g * b_s))
    tl.store(p_dgate + o, b_dgate.to(p_dgate.dtype.element_ty), mask=mask)
    tl.store(p_dup + o, b_dup.to(p_dup.dtype.element_ty), mask=mask)


@operator(
    "clamped(Tensor gate, Tensor up, float alpha, float limit) -> Tensor",
    fake=lambda gate, *_: _new(gate),
    rows=(0, 1),
)
def _launch_forward(gate: Tensor, up: Tensor, alpha: float, limit: float) -> Tensor:
    h = _new(gate)
    count = gate.numel()
    _forward_kernel(
        (ceil_div(count, BLOCK),),
        gate.contiguous(),
        up.contiguous(),
        h,
        count,
        float(alpha),
        float(limit),
        BLOCK=BLOCK,
        num_warps=WARPS,
        enable_fp_fusion=True,
    )
    return h


@operator(
    "clamped_backward(Tensor dh, Tensor gate, Tensor up, float alpha, float limit)"
    " -> (Tensor, Tensor)",
    fake=lambda dh, gate, up, *_: (_new(gate), _new(up)),
    rows=(0, 1, 2),
)
def _launch_backward(
    dh: Tensor, gate: Tensor, up: Tensor, alpha: float, limit: float
) -> tuple[Tensor, Tensor]:
    dgate, dup = _new(gate), _new(up)
    count = gate.numel()
    _backward_kernel(
        (ceil_div(count, BLOCK),),
        dh.contiguous(),
        gate.contiguous(),
        up.contiguous(),
        dgate,
        dup,
        count,
        float(alpha),
        float(limit),
        BLOCK=BLOCK,
        num_warps=WARPS,
        enable_fp_fusion=True,
    )
    return dgate, dup
