"""Gated activations, act(gate) * up, forward and backward.

Shazeer, "GLU Variants Improve Transformer" (arXiv 2002.05202); squared ReLU: So et al., "Primer"
(arXiv 2109.08668).
"""

# Kernels are written in Triton's language: they have no Python types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import KernelError
from .launch import apply, ceil_div, jit, on_gpu, once, operator, ops
from .launch import language as tl

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu2")

BLOCK = 2048  # values of a program: two 16-byte loads a thread in bf16
WARPS = 4


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """act(gate) * up, elementwise, the shape and dtype of both; activation is one of ACTIVATIONS.

    "gelu" is exact (erf), "gelu_tanh" its tanh form, "relu2" relu squared. The launch computes in
    fp32 and rounds once; its backward reads gate and up only. Raises KernelError.
    """
    _check(gate, up, activation)
    if not on_gpu(gate, up):
        return gated_reference(gate, up, activation)
    h: Tensor = apply(_Gated, gate, up, activation)
    return h


def _check(gate: Tensor, up: Tensor, activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise KernelError(f"activation {activation!r}: expected one of {', '.join(ACTIVATIONS)}")
    _check_pair(gate, up)


def _check_pair(gate: Tensor, up: Tensor) -> None:
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise KernelError(
            f"gate {gate.dtype} {list(gate.shape)} and up {up.dtype} {list(up.shape)}: "
            "expected the same"
        )


def gated_reference(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Plain torch, as transformers' MLPs compute it, in the dtype of its inputs."""
    if activation == "silu":
        return torch.nn.functional.silu(gate) * up
    if activation == "relu2":
        return torch.nn.functional.relu(gate).square() * up
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    return torch.nn.functional.gelu(gate, approximate=approximate) * up


def gated_pull(
    dh: Tensor, gate: Tensor, up: Tensor, activation: str, *, spend: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward of `gated`, and its result made again in the same pass: (h, dgate, dup).

    The launch writes h over dh, whose values are lost; with `spend` also dgate over gate and dup
    over up. Builds no graph. Raises KernelError as `gated` does.
    """
    if not on_gpu(dh, gate, up):
        with torch.enable_grad():
            gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
            h = gated(gate, up, activation)
        dgate, dup = torch.autograd.grad(h, (gate, up), dh)
        return h.detach(), dgate, dup
    if dh.shape != gate.shape or gate.shape != up.shape:
        raise KernelError(
            f"dh {list(dh.shape)}, gate {list(gate.shape)} and up {list(up.shape)}: "
            "expected one shape"
        )
    dh, gate, up = (t.contiguous() for t in (dh, gate, up))
    dgate, dup = (gate, up) if spend else (_new(gate), _new(up))
    ops.gated_pull(dh, gate, up, dgate, dup, activation)
    return dh, dgate, dup


class _Gated(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
        h: Tensor = ops.gated(gate, up, activation)
        return h

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        gate, up, ctx.activation = inputs
        ctx.save_for_backward(gate, up)

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> Any:
        gate, up = ctx.saved_tensors
        return *once(ops.gated_backward, dh, gate, up, ctx.activation), None


@jit
def _sigmoid(b_x):
    """sigmoid(x) and 1 - sigmoid(x), both to full relative precision."""
    b_e = tl.exp(-tl.abs(b_x))
    b_r = 1.0 / (1.0 + b_e)
    b_near = tl.where(b_x >= 0.0, b_r, b_e * b_r)
    b_rest = tl.where(b_x >= 0.0, b_e * b_r, b_r)
    return b_near, b_rest


@jit
def _activate(b_g, ACTIVATION: tl.constexpr):
    """The activation of fp32 values and its derivative."""
    if ACTIVATION == "silu":
        b_s, b_rest = _sigmoid(b_g)
        b_act = b_g * b_s
        b_slope = b_s * (1.0 + b_g * b_rest)
    elif ACTIVATION == "gelu":
        # Phi(g) and phi(g), the normal distribution and its density.
        b_s = 0.5 * (1.0 + tl.erf(b_g * 0.7071067811865476))
        b_act = b_g * b_s
        b_slope = b_s + b_g * 0.3989422804014327 * tl.exp(-0.5 * b_g * b_g)
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(u)) / 2 = sigmoid(2u), here with u doubled already.
        b_s, b_rest = _sigmoid(b_g * (1.5957691216057308 + 0.07135481282553593 * b_g * b_g))
        b_act = b_g * b_s
        b_inner = 1.5957691216057308 + 0.2140644384766078 * b_g * b_g
        b_slope = b_s + b_g * b_s * b_rest * b_inner
    else:
        b_r = tl.maximum(b_g, 0.0)
        b_act = b_r * b_r
        b_slope = 2.0 * b_r
    return b_act, b_slope


@jit
def _forward_kernel(p_gate, p_up, p_h, count, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = o < count
    b_g = tl.load(p_gate + o, mask=mask, other=0.0).to(tl.float32)
    b_up = tl.load(p_up + o, mask=mask, other=0.0).to(tl.float32)
    b_act, _ = _activate(b_g, ACTIVATION)
    tl.store(p_h + o, (b_act * b_up).to(p_h.dtype.element_ty), mask=mask)


@jit
def _backward_kernel(
    p_dh,
    p_gate,
    p_up,
    p_dgate,
    p_dup,
    count,
    ACTIVATION: tl.constexpr,
    REMAKE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # With REMAKE h goes over dh; each value is read before it is written over, by one program.
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = o < count
    b_dh = tl.load(p_dh + o, mask=mask, other=0.0).to(tl.float32)
    b_g = tl.load(p_gate + o, mask=mask, other=0.0).to(tl.float32)
    b_up = tl.load(p_up + o, mask=mask, other=0.0).to(tl.float32)
    b_act, b_slope = _activate(b_g, ACTIVATION)
    tl.store(p_dgate + o, (b_dh * b_up * b_slope).to(p_dgate.dtype.element_ty), mask=mask)
    tl.store(p_dup + o, (b_dh * b_act).to(p_dup.dtype.element_ty), mask=mask)
    if REMAKE:
        tl.store(p_dh + o, (b_act * b_up).to(p_dh.dtype.element_ty), mask=mask)


def _new(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@operator(
    "gated(Tensor gate, Tensor up, str activation) -> Tensor",
    fake=lambda gate, *_: _new(gate),
    rows=(0, 1),
)
def _launch_forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    h = _new(gate)
    count = gate.numel()
    _forward_kernel(
        (ceil_div(count, BLOCK),),
        gate.contiguous(),
        up.contiguous(),
        h,
        count,
        ACTIVATION=activation,
        BLOCK=BLOCK,
        num_warps=WARPS,
        enable_fp_fusion=True,
    )
    return h


@operator(
    "gated_backward(Tensor dh, Tensor gate, Tensor up, str activation) -> (Tensor, Tensor)",
    fake=lambda dh, gate, up, _: (_new(gate), _new(up)),
    rows=(0, 1, 2),
)
def _launch_backward(
    dh: Tensor, gate: Tensor, up: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    dgate, dup = _new(gate), _new(up)
    _pull(dh.contiguous(), gate.contiguous(), up.contiguous(), dgate, dup, activation, False)
    return dgate, dup


@operator(
    "gated_pull(Tensor(a!) dh, Tensor(b!) gate, Tensor(c!) up, Tensor(d!) dgate, Tensor(e!) dup,"
    " str activation) -> ()",
    fake=lambda *_: None,
    mutates=("dh", "gate", "up", "dgate", "dup"),
)
def _launch_pull(
    dh: Tensor, gate: Tensor, up: Tensor, dgate: Tensor, dup: Tensor, activation: str
) -> None:
    _pull(dh, gate, up, dgate, dup, activation, True)


def _pull(
    dh: Tensor,
    gate: Tensor,
    up: Tensor,
    dgate: Tensor,
    dup: Tensor,
    activation: str,
    remake: bool,
) -> None:
    count = dh.numel()
    _backward_kernel(
        (ceil_div(count, BLOCK),),
        dh,
        gate,
        up,
        dgate,
        dup,
        count,
        ACTIVATION=activation,
        REMAKE=remake,
        BLOCK=BLOCK,
        num_warps=WARPS,
        enable_fp_fusion=True,
    )
