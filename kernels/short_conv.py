"""Short causal convolutions over the tokens of a row, each feature for itself; SiLU may follow.

    z_t = sum_j w_j x_(t - kernel + 1 + j) + bias,    y_t = z_t or silu(z_t)

as in torch's Conv1d with groups; no token sees beyond the last start of a document before it.
"""

# Kernels are written in Triton's language: they have no Python types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import KernelError
from . import token_heads
from .gated import _sigmoid
from .launch import apply, ceil_div, jit, on_gpu, once, operator, ops
from .launch import language as tl

# Tokens and features of a program, features of a backward's, which holds the square of the kernel's
# taps, and of a step's; a power of two each.
ROWS, BLOCK, PULLED, STEP = 16, 128, 64, 256
WARPS = 4
# The widest kernel of a launch, whose backward reads its square of tokens.
WIDEST = 8


def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    starts: Tensor | None = None,
    state: Tensor | None = None,
    silu: bool = False,
) -> Tensor:
    """x [b, s, c], weight [c, kernel], bias [c] -> y [b, s, c] in x's dtype, summed in fp32.

    starts bool [b, s]: the tokens that see none before them. state [b, kernel - 1, c]: what came
    before x (None: zeros), over which the last inputs are written, zeros where the row's last
    token does not see them. Differentiable in x, weight and bias; the launch rounds once. Raises
    KernelError.
    """
    b, s, channels = x.shape
    kernel = weight.shape[1]
    _check(x, weight, bias, starts, state)
    used = [t for t in (x, weight, bias) if t is not None]
    # The launch has no gradient of what came before, which the reference has.
    graph = state is not None and torch.is_grad_enabled() and any(t.requires_grad for t in used)
    if not on_gpu(*used, starts, state) or not 1 < kernel <= WIDEST or graph:
        return short_conv_reference(x, weight, bias, starts, state, silu)
    if state is None:
        y: Tensor = apply(_ShortConv, x, weight, bias, starts, silu)
    elif s == 1:
        y = ops.short_conv_step(x[:, 0], state, weight, bias, starts, silu)[:, None]
    else:
        y = ops.short_conv(x, state, weight, bias, starts, silu)
        _keep_last(x, starts, state)
    return y


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, starts: Tensor | None, state: Tensor | None
) -> None:
    b, s, channels = x.shape
    wanted = {
        "weight": (weight, (channels, weight.shape[-1])),
        "bias": (bias, (channels,)),
        "starts": (starts, (b, s)),
        "state": (state, (b, weight.shape[-1] - 1, channels)),
    }
    for name, (t, shape) in wanted.items():
        if t is not None and t.shape != shape:
            raise KernelError(
                f"{name} {list(t.shape)} does not belong to x {list(x.shape)}: "
                f"expected {list(shape)}"
            )


def short_conv_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    starts: Tensor | None = None,
    state: Tensor | None = None,
    silu: bool = False,
) -> Tensor:
    """What `short_conv` computes, in plain torch: summed in fp32 or wider, rounded, then SiLU."""
    before, s = weight.shape[1] - 1, x.shape[1]
    past = x.new_zeros(x.shape[0], before, x.shape[2]) if state is None else state.to(x.dtype)
    wide = torch.cat([past, x], 1).to(torch.promote_types(x.dtype, torch.float32))
    weight = weight.to(wide.dtype)
    segments = None
    if starts is not None:
        # Of the tokens before x, 0: they belong to its first ones unless a start lies between.
        segments = F.pad(starts.cumsum(1), (before, 0))
    y: Tensor = wide[:, before:] * weight[:, before]
    for j in range(before):
        tap = wide[:, j : j + s]
        if segments is not None:
            tap = tap * (segments[:, j : j + s] == segments[:, before:])[..., None]
        y = torch.addcmul(y, tap, weight[:, j])
    if bias is not None:
        y = y + bias
    if state is not None:
        _keep_last(x, starts, state)
    y = y.to(x.dtype)
    return F.silu(y) if silu else y


def _keep_last(x: Tensor, starts: Tensor | None, state: Tensor) -> None:
    """Write over `state` the last inputs of it and x that the next token may see."""
    before = state.shape[1]
    last = torch.cat([state.to(x.dtype), x[:, max(x.shape[1] - before, 0) :]], 1)
    last = last[:, last.shape[1] - before :]
    if starts is not None and before:
        begun = F.pad(starts, (before, 0))[:, -before:].long()
        after = begun.flip(1).cumsum(1).flip(1) - begun
        last = last * (after == 0)[..., None]
    state.copy_(last)


class _ShortConv(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, starts: Tensor | None, silu: bool
    ) -> Tensor:
        y: Tensor = ops.short_conv(x, None, weight, bias, starts, silu)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, ctx.silu = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, bias, starts = ctx.saved_tensors
        wanted = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        dx, dw, dbias = once(
            ops.short_conv_backward, dy, x, weight, bias, starts, ctx.silu, wanted
        )  # fmt: skip
        if not wanted:
            return dx, None, None, None, None
        return dx, dw, None if bias is None else dbias, None, None


@jit
def _summed(
    p_x, p_past, p_w, p_bias, p_starts, o_t, o_c, s, channels, step,
    KERNEL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """z [ROWS, BLOCK] of tokens o_t, which may lie past the row's end, and features o_c."""
    m_c = o_c < channels
    b_z = tl.zeros([ROWS, BLOCK], tl.float32)
    b_seen = o_t < s
    for d in tl.static_range(0, KERNEL):
        o = o_t - d
        b_w = tl.load(p_w + o_c * KERNEL + (KERNEL - 1 - d), mask=m_c, other=0.0).to(tl.float32)
        m = (b_seen & (o >= 0))[:, None] & m_c[None, :]
        b_x = tl.load(p_x + o.to(tl.int64)[:, None] * step + o_c[None, :], mask=m, other=0.0)
        b_x = b_x.to(tl.float32)
        if p_past is not None:
            m = (b_seen & (o < 0))[:, None] & m_c[None, :]
            o_p = (o + (KERNEL - 1))[:, None] * channels + o_c[None, :]
            b_x += tl.load(p_past + o_p, mask=m, other=0.0).to(tl.float32)
        b_z += b_x * b_w[None, :]
        if p_starts is not None:
            b_begun = tl.load(p_starts + o, mask=b_seen & (o >= 0), other=0)
            b_seen = b_seen & (b_begun == 0)
    if p_bias is not None:
        b_z += tl.load(p_bias + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    return b_z


@jit
def _forward_kernel(
    p_x, p_past, p_w, p_bias, p_starts, p_y, s, channels, step_b, step,
    SILU: tl.constexpr, KERNEL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(2).to(tl.int64)
    o_t = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    o_c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if p_past is not None:
        p_past += i_b * (KERNEL - 1) * channels
    if p_starts is not None:
        p_starts += i_b * s
    b_z = _summed(
        p_x + i_b * step_b, p_past, p_w, p_bias, p_starts, o_t, o_c, s, channels, step,
        KERNEL, ROWS, BLOCK,
    )  # fmt: skip
    if SILU:
        b_near, _ = _sigmoid(b_z)
        b_z = b_z * b_near
    m = (o_t < s)[:, None] & (o_c < channels)[None, :]
    o = (i_b * s + o_t)[:, None] * channels + o_c[None, :]
    tl.store(p_y + o, b_z.to(p_y.dtype.element_ty), mask=m)


@jit
def _backward_kernel(
    p_dy, p_x, p_w, p_bias, p_starts, p_dx, p_dw, s, channels, step_b, step,
    SILU: tl.constexpr, KERNEL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx of a tile, and with p_dw its share of the gradients of the weight and the bias."""
    i_b = tl.program_id(2).to(tl.int64)
    i_t = tl.program_id(1)
    o_t = i_t * ROWS + tl.arange(0, ROWS)
    o_c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_c = o_c < channels
    p_x += i_b * step_b
    if p_starts is not None:
        p_starts += i_b * s
    b_dx = tl.zeros([ROWS, BLOCK], tl.float32)
    b_seen = o_t < s
    for d in tl.static_range(0, KERNEL):
        # The token d later, if it sees this one.
        o = o_t + d
        b_seen = b_seen & (o < s)
        if p_starts is not None and d > 0:
            b_seen = b_seen & (tl.load(p_starts + o, mask=b_seen, other=0) == 0)
        o_y = (i_b * s + o)[:, None] * channels + o_c[None, :]
        m = b_seen[:, None] & m_c[None, :]
        b_dz = tl.load(p_dy + o_y, mask=m, other=0.0).to(tl.float32)
        if SILU:
            b_z = _summed(
                p_x, None, p_w, p_bias, p_starts, o, o_c, s, channels, step, KERNEL, ROWS, BLOCK
            )
            b_near, b_rest = _sigmoid(b_z)
            b_dz = b_dz * b_near * (1.0 + b_z * b_rest)
        b_w = tl.load(p_w + o_c * KERNEL + (KERNEL - 1 - d), mask=m_c, other=0.0).to(tl.float32)
        b_dx += b_dz * b_w[None, :]
        if p_dw is not None and d == 0:
            p_dw += (i_b * tl.num_programs(1) + i_t) * (KERNEL + 1) * channels
            tl.store(p_dw + KERNEL * channels + o_c, tl.sum(b_dz, 0), mask=m_c)
            b_past = o_t < s
            for e in tl.static_range(0, KERNEL):
                o_e = o_t - e
                m = (b_past & (o_e >= 0))[:, None] & m_c[None, :]
                o_x = o_e.to(tl.int64)[:, None] * step + o_c[None, :]
                b_x = tl.load(p_x + o_x, mask=m, other=0.0).to(tl.float32)
                tl.store(p_dw + (KERNEL - 1 - e) * channels + o_c, tl.sum(b_dz * b_x, 0), mask=m_c)
                if p_starts is not None:
                    b_begun = tl.load(p_starts + o_e, mask=b_past & (o_e >= 0), other=0)
                    b_past = b_past & (b_begun == 0)
    o = (i_b * s + o_t)[:, None] * channels + o_c[None, :]
    tl.store(p_dx + o, b_dx.to(p_dx.dtype.element_ty), mask=(o_t < s)[:, None] & m_c[None, :])


@jit
def _step_kernel(
    p_x, p_state, p_w, p_bias, p_starts, p_y, channels, step,
    SILU: tl.constexpr, KERNEL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token; a program's features of the state are its own to write."""
    i_b = tl.program_id(1).to(tl.int64)
    o_c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = o_c < channels
    b_new = tl.load(p_x + i_b * step + o_c, mask=m, other=0.0)
    p_state += i_b * (KERNEL - 1) * channels
    b_w = tl.load(p_w + o_c * KERNEL + (KERNEL - 1), mask=m, other=0.0).to(tl.float32)
    b_z = b_new.to(tl.float32) * b_w
    m_old = m
    if p_starts is not None:
        m_old = m & (tl.load(p_starts + i_b + tl.zeros_like(o_c)) == 0)
    for j in tl.static_range(0, KERNEL - 1):
        b_x = tl.load(p_state + j * channels + o_c, mask=m_old, other=0.0)
        b_w = tl.load(p_w + o_c * KERNEL + j, mask=m, other=0.0).to(tl.float32)
        b_z += b_x.to(tl.float32) * b_w
        if j > 0:
            tl.store(p_state + (j - 1) * channels + o_c, b_x, mask=m)
    b_new = b_new.to(p_state.dtype.element_ty)
    tl.store(p_state + (KERNEL - 2) * channels + o_c, b_new, mask=m)
    if p_bias is not None:
        b_z += tl.load(p_bias + o_c, mask=m, other=0.0).to(tl.float32)
    if SILU:
        b_near, _ = _sigmoid(b_z)
        b_z = b_z * b_near
    tl.store(p_y + i_b * channels + o_c, b_z.to(p_y.dtype.element_ty), mask=m)


def _new(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _whole(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _features_last(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@operator(
    "short_conv(Tensor x, Tensor? past, Tensor weight, Tensor? bias, Tensor? starts, bool silu)"
    " -> Tensor",
    fake=lambda x, *_: _new(x),
)
def _launch_forward(
    x: Tensor,
    past: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    starts: Tensor | None,
    silu: bool,
) -> Tensor:
    b, s, channels = x.shape
    x, y = _features_last(x), _new(x)
    _forward_kernel(
        (ceil_div(channels, BLOCK), ceil_div(s, ROWS), b),
        x, _whole(past), weight.contiguous(), _whole(bias),
        token_heads.flags(starts), y, s, channels, x.stride(0), x.stride(1),
        SILU=silu, KERNEL=weight.shape[1], ROWS=ROWS, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return y


def _gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    starts: Any,
    silu: bool,
    weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if not weights:
        return _new(x), weight.new_empty(0), weight.new_empty(0)
    return _new(x), _new(weight), (weight if bias is None else bias).new_empty(weight.shape[0])


@operator(
    "short_conv_backward(Tensor dy, Tensor x, Tensor weight, Tensor? bias, Tensor? starts,"
    " bool silu, bool weights) -> (Tensor, Tensor, Tensor)",
    fake=_gradients,
)
def _launch_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    starts: Tensor | None,
    silu: bool,
    weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    b, s, channels = x.shape
    kernel = weight.shape[1]
    x, dx = _features_last(x), _new(x)
    shares = None
    if weights:
        shares = x.new_empty((b * ceil_div(s, ROWS), kernel + 1, channels), dtype=torch.float32)
    _backward_kernel(
        (ceil_div(channels, PULLED), ceil_div(s, ROWS), b),
        dy.contiguous(), x, weight.contiguous(), _whole(bias), token_heads.flags(starts),
        dx, shares, s, channels, x.stride(0), x.stride(1),
        SILU=silu, KERNEL=kernel, ROWS=ROWS, BLOCK=PULLED, num_warps=WARPS,
    )  # fmt: skip
    if shares is None:
        return dx, weight.new_empty(0), weight.new_empty(0)
    summed = shares.sum(0)
    dbias = summed[kernel].to(weight.dtype if bias is None else bias.dtype)
    return dx, summed[:kernel].mT.contiguous().to(weight.dtype), dbias


@operator(
    "short_conv_step(Tensor x, Tensor(a!) state, Tensor weight, Tensor? bias, Tensor? starts,"
    " bool silu) -> Tensor",
    fake=lambda x, *_: _new(x),
    mutates=("state",),
)
def _launch_step(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    starts: Tensor | None,
    silu: bool,
) -> Tensor:
    b, channels = x.shape
    if not state.is_contiguous():
        raise KernelError(f"the state has strides {state.stride()}: expected it contiguous")
    x, y = _features_last(x), _new(x)
    _step_kernel(
        (ceil_div(channels, STEP), b),
        x, state, weight.contiguous(), _whole(bias), token_heads.flags(starts), y,
        channels, x.stride(0),
        SILU=silu, KERNEL=weight.shape[1], BLOCK=STEP, num_warps=WARPS,
    )  # fmt: skip
    return y
