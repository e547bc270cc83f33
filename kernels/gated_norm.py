"""What a recurrent mixer reads out, gated and normalised: silu(gate) before the norm or after it.

    out = w u / rms(u),  u = y silu(gate);    or, norm first,    out = w y / rms(y) silu(gate)

RMSNorm over groups of equal width (Mamba 2's `MambaRMSNormGated`, Gated DeltaNet's
`Qwen3NextRMSNormGated` of transformers).
"""

# Kernels are written in Triton's language: they have no Python types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import KernelError
from .gated import _sigmoid
from .launch import apply, ceil_div, jit, on_gpu, once, operator, ops, power_of_two
from .launch import language as tl

# The widest group of a launch, and the values of a program where groups are narrower.
MAX_WIDTH, VALUES = 16384, 2048


def gated_norm(
    y: Tensor, gate: Tensor, weight: Tensor | None, eps: float, width: int, *, norm_first: bool
) -> Tensor:
    """y and gate [b, s, d], weight [d] or [width], for all groups of `width` or each of d -> [b, s,
    d] in gate's dtype, computed in fp32. Without a weight only gated. Raises KernelError.
    """
    d = gate.shape[-1]
    fits = weight is None or weight.shape in ((d,), (width,))
    if y.shape != gate.shape or y.ndim != 3 or d % width or not fits:
        raise KernelError(
            f"y {list(y.shape)} and gate {list(gate.shape)} in groups of {width}, with a weight of "
            f"{None if weight is None else list(weight.shape)}: expected [b, s, d] twice, d a "
            "multiple of a group's width, and a weight of either"
        )
    if not on_gpu(y, gate, weight) or width > MAX_WIDTH:
        return gated_norm_reference(y, gate, weight, eps, width, norm_first=norm_first)
    out: Tensor = apply(_GatedNorm, y, gate, weight, eps, width, norm_first)
    return out


def gated_norm_reference(
    y: Tensor, gate: Tensor, weight: Tensor | None, eps: float, width: int, *, norm_first: bool
) -> Tensor:
    """Plain torch, in fp32 or wider, rounded once."""
    wide = torch.promote_types(torch.promote_types(y.dtype, gate.dtype), torch.float32)
    out, open_ = y.to(wide), F.silu(gate.to(wide))
    if weight is None:
        return (out * open_).to(gate.dtype)
    if not norm_first:
        out = out * open_
    out = F.rms_norm(out.reshape(*out.shape[:2], -1, width), (width,), eps=eps)
    out = (out * weight.to(wide).view(-1, width)).flatten(-2)
    return (out * open_ if norm_first else out).to(gate.dtype)


class _GatedNorm(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        y: Tensor, gate: Tensor, weight: Tensor | None, eps: float, width: int, norm_first: bool
    ) -> Tensor:
        out: Tensor = ops.gated_norm(y, gate, weight, eps, width, norm_first)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, ctx.eps, ctx.width, ctx.norm_first = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:
        y, gate, weight = ctx.saved_tensors
        how = ctx.eps, ctx.width, ctx.norm_first
        dy, dgate = once(ops.gated_norm_backward, dout, y, gate, weight, *how)
        dweight = None
        if ctx.needs_input_grad[2]:
            dweight = _weight_gradient(dout, y, gate, weight, *how)
        return dy, dgate, dweight, None, None, None


def _weight_gradient(
    dout: Tensor,
    y: Tensor,
    gate: Tensor,
    weight: Tensor,
    eps: float,
    width: int,
    norm_first: bool,
) -> Tensor:
    """In plain torch: these weights are trained only where all are."""
    one = torch.ones(width, dtype=torch.float32, device=y.device)
    plain = gated_norm_reference(y.float(), gate.float(), one, eps, width, norm_first=norm_first)
    summed = (plain * dout).sum((0, 1)).view(-1, width)
    return (
        (summed if weight.numel() == gate.shape[-1] else summed.sum(0))
        .view_as(weight)
        .to(weight.dtype)
    )


@jit
def _rows(groups, rows, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Of a program's groups: their tokens, where they begin in one, their features, and a mask."""
    o_r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o = tl.arange(0, BLOCK)
    m = (o_r < rows)[:, None] & (o < WIDTH)[None, :]
    o_in = (o_r % groups * WIDTH)[:, None] + o[None, :]
    return (o_r // groups).to(tl.int64)[:, None], o_in, o, m


@jit
def _forward_kernel(
    p_y, p_gate, p_w, p_out, rows, groups, step, EPS: tl.constexpr, NORM_FIRST: tl.constexpr,
    SHARED: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    o_t, o_in, o, m = _rows(groups, rows, WIDTH, ROWS, BLOCK)
    o_y = o_t * (groups * WIDTH) + o_in
    b_u = tl.load(p_y + o_y, mask=m, other=0.0).to(tl.float32)
    b_g = tl.load(p_gate + o_t * step + o_in, mask=m, other=0.0).to(tl.float32)
    b_near, _ = _sigmoid(b_g)
    b_open = b_g * b_near
    if p_w is None:
        b_u *= b_open
    else:
        if not NORM_FIRST:
            b_u *= b_open
        b_rstd = tl.rsqrt(tl.sum(b_u * b_u, 1) / WIDTH + EPS)
        if SHARED:
            b_w = tl.load(p_w + o, mask=o < WIDTH, other=0.0).to(tl.float32)[None, :]
        else:
            b_w = tl.load(p_w + o_in, mask=m, other=0.0).to(tl.float32)
        b_u = b_u * b_rstd[:, None] * b_w
        if NORM_FIRST:
            b_u *= b_open
    tl.store(p_out + o_y, b_u.to(p_out.dtype.element_ty), mask=m)


@jit
def _backward_kernel(
    p_dout, p_y, p_gate, p_w, p_dy, p_dgate, rows, groups, step,
    EPS: tl.constexpr, NORM_FIRST: tl.constexpr, SHARED: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    o_t, o_in, o, m = _rows(groups, rows, WIDTH, ROWS, BLOCK)
    o_y = o_t * (groups * WIDTH) + o_in
    b_y = tl.load(p_y + o_y, mask=m, other=0.0).to(tl.float32)
    b_g = tl.load(p_gate + o_t * step + o_in, mask=m, other=0.0).to(tl.float32)
    b_d = tl.load(p_dout + o_y, mask=m, other=0.0).to(tl.float32)
    b_near, b_rest = _sigmoid(b_g)
    b_open = b_g * b_near
    b_slope = b_near * (1.0 + b_g * b_rest)
    if p_w is not None:
        b_u = b_y if NORM_FIRST else b_y * b_open
        b_rstd = tl.rsqrt(tl.sum(b_u * b_u, 1) / WIDTH + EPS)[:, None]
        if SHARED:
            b_w = tl.load(p_w + o, mask=o < WIDTH, other=0.0).to(tl.float32)[None, :]
        else:
            b_w = tl.load(p_w + o_in, mask=m, other=0.0).to(tl.float32)
        b_d *= b_w
        if NORM_FIRST:
            b_dgate = b_d * b_u * b_rstd * b_slope
            b_d *= b_open
        b_n = b_u * b_rstd
        b_d = b_rstd * (b_d - b_n * (tl.sum(b_d * b_n, 1) / WIDTH)[:, None])
    if p_w is None or not NORM_FIRST:
        b_dgate = b_d * b_y * b_slope
        b_d *= b_open
    tl.store(p_dy + o_y, b_d.to(p_dy.dtype.element_ty), mask=m)
    tl.store(p_dgate + o_y, b_dgate.to(p_dgate.dtype.element_ty), mask=m)


def config_for(width: int) -> tuple[int, int, int]:
    """(groups of a program, its tile's width, warps)."""
    block = power_of_two(width)
    rows = max(1, VALUES // block)
    return rows, block, 4 if block <= 2048 else 8 if block <= 8192 else 16


def _tokens(gate: Tensor) -> tuple[Tensor, int]:
    """With tokens of all rows at one distance, which it returns; a slice of features has that."""
    if gate.stride(-1) != 1 or gate.stride(0) != gate.shape[1] * gate.stride(1):
        gate = gate.contiguous()
    return gate, gate.stride(1)


def _launch(
    kernel: Any,
    before: tuple[Tensor, ...],
    gate: Tensor,
    weight: Tensor | None,
    after: tuple[Tensor, ...],
    eps: float,
    width: int,
    norm_first: bool,
) -> None:
    groups = gate.shape[-1] // width
    rows = gate.numel() // width
    gate, step = _tokens(gate)
    per_program, block, warps = config_for(width)
    kernel(
        (ceil_div(rows, per_program),),
        *(t.contiguous() for t in before), gate,
        None if weight is None else weight.contiguous(), *after, rows, groups, step,
        EPS=eps, NORM_FIRST=norm_first,
        SHARED=weight is not None and weight.numel() == width,
        WIDTH=width, ROWS=per_program, BLOCK=block, num_warps=warps,
    )  # fmt: skip


@operator(
    "gated_norm(Tensor y, Tensor gate, Tensor? weight, float eps, int width, bool norm_first)"
    " -> Tensor",
    fake=lambda y, gate, *_: gate.new_empty(gate.shape),
)
def _launch_forward(
    y: Tensor, gate: Tensor, weight: Tensor | None, eps: float, width: int, norm_first: bool
) -> Tensor:
    out = gate.new_empty(gate.shape)
    _launch(_forward_kernel, (y,), gate, weight, (out,), eps, width, norm_first)
    return out


@operator(
    "gated_norm_backward(Tensor dout, Tensor y, Tensor gate, Tensor? weight, float eps, int width,"
    " bool norm_first) -> (Tensor, Tensor)",
    fake=lambda dout, y, gate, *_: (y.new_empty(y.shape), gate.new_empty(gate.shape)),
)
def _launch_backward(
    dout: Tensor,
    y: Tensor,
    gate: Tensor,
    weight: Tensor | None,
    eps: float,
    width: int,
    norm_first: bool,
) -> tuple[Tensor, Tensor]:
    dy, dgate = y.new_empty(y.shape), gate.new_empty(gate.shape)
    _launch(_backward_kernel, (dout, y), gate, weight, (dy, dgate), eps, width, norm_first)
    return dy, dgate
