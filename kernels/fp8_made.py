"""Operands of products in fp8 rounded where they are made: by the norm or the gated activation that
writes them, which spares a launch and one read of them.

The result in 16 bits is written too, for what else reads it (adapters), and its rounding to e4m3 is
that of fp8.py's `cast_rows` on that result.
"""

# Kernels are written in Triton's language: they have no Python types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import KernelError
from . import fp8, gated, rms_norm
from .fp8 import E4M3, Rows
from .fp8_launch import _scale as _row_scale
from .gated import _activate
from .launch import ceil_div, jit, on_gpu, operator, ops, power_of_two
from .launch import language as tl
from .rms_norm_launch import _scale, _weigh

MAX_WIDTH = 32768  # values of a row that a program holds in registers


class Made(NamedTuple):
    """A result [..., k], and its rows in e4m3."""

    value: Tensor
    rows: Rows


# Values of a row that a thread holds: of one result, and of two.
HELD, HELD_OF_TWO = 32, 16


def warps_for(width: int, values: int) -> int:
    """So many that a thread holds at most `values` of a row."""
    return min(32, max(4, ceil_div(power_of_two(width), 32 * values)))


def takes(width: int) -> bool:
    """Whether rows of this width are rounded where they are made."""
    return width <= MAX_WIDTH


def norm_rows(
    x: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0, cast_first: bool = True
) -> Made:
    """`rms_norm`, and its rows in e4m3 as `cast_rows` rounds them. Builds no graph."""
    how = {"offset": offset, "cast_first": cast_first}
    if not takes(x.shape[-1]) or not on_gpu(x, weight):
        with torch.no_grad():
            y = rms_norm.rms_norm(x, weight, eps, **how)  # type: ignore[arg-type]
        return Made(y, fp8.cast_rows(y.reshape(-1, y.shape[-1])))
    rms_norm._check(x, weight, None)
    fp8.check_device(x.device)
    y, codes, scale = ops.fp8_norm_rows(
        x.contiguous(), weight.contiguous(), eps, offset, cast_first
    )
    return Made(y, Rows(codes, scale))


def gated_rows(gate: Tensor, up: Tensor, activation: str) -> Made:
    """`gated`, and its rows in e4m3 as `cast_rows` rounds them. Builds no graph."""
    if not takes(gate.shape[-1]) or not on_gpu(gate, up):
        with torch.no_grad():
            h = gated.gated(gate, up, activation)
        return Made(h, fp8.cast_rows(h.reshape(-1, h.shape[-1])))
    gated._check(gate, up, activation)
    fp8.check_device(gate.device)
    h, codes, scale = ops.fp8_gated_rows(gate.contiguous(), up.contiguous(), activation)
    return Made(h, Rows(codes, scale))


def gated_pull_rows(
    dh: Tensor, gate: Tensor, up: Tensor, activation: str, *, spend: bool = False
) -> tuple[Tensor, Tensor, Tensor, Rows]:
    """`gated_pull`, and the rows of dgate and dup side by side in e4m3, with one scale, as
    `cast_rows` rounds them.
    """
    gated._check(gate, up, activation)
    if dh.shape != gate.shape:
        raise KernelError(f"dh {list(dh.shape)} and gate {list(gate.shape)}: expected one shape")
    if not takes(2 * gate.shape[-1]) or not on_gpu(dh, gate, up):
        h, dgate, dup = gated.gated_pull(dh, gate, up, activation, spend=spend)
        sides = [t.reshape(-1, t.shape[-1]) for t in (dgate, dup)]
        return h, dgate, dup, fp8.cast_rows(sides)
    fp8.check_device(dh.device)
    dh, gate, up = (t.contiguous() for t in (dh, gate, up))
    dgate, dup = (gate, up) if spend else (gated._new(gate), gated._new(up))
    codes, scale = ops.fp8_gated_pull_rows(dh, gate, up, dgate, dup, activation)
    return dh, dgate, dup, Rows(codes, scale)


@jit
def _bits(b_x):
    """The magnitudes' bits, in whose order NaN is the largest."""
    return b_x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@jit
def _norm_kernel(
    p_x,
    p_w,
    p_y,
    p_codes,
    p_scale,
    width,
    EPS: tl.constexpr,
    OFFSET: tl.constexpr,
    CAST_FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    o = tl.arange(0, BLOCK)
    mask = o < width
    b_x = tl.load(p_x + i_row * width + o, mask=mask, other=0.0).to(tl.float32)
    b_w = tl.load(p_w + o, mask=mask, other=0.0)
    b_rstd = 1.0 / tl.sqrt_rn(tl.sum(b_x * b_x, axis=0) / width + EPS)
    b_weight = _scale(b_w, p_w.dtype.element_ty, OFFSET, CAST_FIRST)
    b_y = _weigh(b_x * b_rstd, b_weight, p_y.dtype.element_ty, CAST_FIRST)
    tl.store(p_y + i_row * width + o, b_y.to(p_y.dtype.element_ty), mask=mask)
    b_scale, b_inverse = _row_scale(tl.max(_bits(b_y), axis=0))
    tl.store(p_codes + i_row * width + o, (b_y * b_inverse).to(p_codes.dtype.element_ty), mask=mask)
    tl.store(p_scale + i_row + tl.arange(0, 1), b_scale)


@jit
def _gated_kernel(
    p_gate,
    p_up,
    p_h,
    p_codes,
    p_scale,
    width,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    o_col = tl.arange(0, BLOCK)
    mask = o_col < width
    o = i_row * width + o_col
    b_g = tl.load(p_gate + o, mask=mask, other=0.0).to(tl.float32)
    b_up = tl.load(p_up + o, mask=mask, other=0.0).to(tl.float32)
    b_act, _ = _activate(b_g, ACTIVATION)
    b_h = (b_act * b_up).to(p_h.dtype.element_ty)
    tl.store(p_h + o, b_h, mask=mask)
    b_wide = b_h.to(tl.float32)
    b_scale, b_inverse = _row_scale(tl.max(_bits(b_wide), axis=0))
    tl.store(p_codes + o, (b_wide * b_inverse).to(p_codes.dtype.element_ty), mask=mask)
    tl.store(p_scale + i_row + tl.arange(0, 1), b_scale)


@jit
def _gated_pull_kernel(
    p_dh,
    p_gate,
    p_up,
    p_dgate,
    p_dup,
    p_codes,
    p_scale,
    width,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # h goes over dh, dgate and dup may go over gate and up: one program reads a row and writes it.
    i_row = tl.program_id(0).to(tl.int64)
    o_col = tl.arange(0, BLOCK)
    mask = o_col < width
    o = i_row * width + o_col
    dtype: tl.constexpr = p_dh.dtype.element_ty
    b_dh = tl.load(p_dh + o, mask=mask, other=0.0).to(tl.float32)
    b_g = tl.load(p_gate + o, mask=mask, other=0.0).to(tl.float32)
    b_up = tl.load(p_up + o, mask=mask, other=0.0).to(tl.float32)
    b_act, b_slope = _activate(b_g, ACTIVATION)
    b_dgate = (b_dh * b_up * b_slope).to(dtype)
    b_dup = (b_dh * b_act).to(dtype)
    tl.store(p_dh + o, (b_act * b_up).to(dtype), mask=mask)
    tl.store(p_dgate + o, b_dgate, mask=mask)
    tl.store(p_dup + o, b_dup, mask=mask)
    b_most = tl.maximum(_bits(b_dgate.to(tl.float32)), _bits(b_dup.to(tl.float32)))
    b_scale, b_inverse = _row_scale(tl.max(b_most, axis=0))
    p_codes += i_row * 2 * width + o_col
    code: tl.constexpr = p_codes.dtype.element_ty
    tl.store(p_codes, (b_dgate.to(tl.float32) * b_inverse).to(code), mask=mask)
    tl.store(p_codes + width, (b_dup.to(tl.float32) * b_inverse).to(code), mask=mask)
    tl.store(p_scale + i_row + tl.arange(0, 1), b_scale)


def _new_rows(x: Tensor, times: int = 1) -> tuple[Tensor, Tensor]:
    width = x.shape[-1]
    count = x.numel() // max(width, 1)
    return (
        x.new_empty((count, times * width), dtype=E4M3),
        x.new_empty(count, dtype=torch.float32),
    )


@operator(
    "fp8_norm_rows(Tensor x, Tensor weight, float eps, float offset, bool cast_first)"
    " -> (Tensor, Tensor, Tensor)",
    fake=lambda x, *_: (torch.empty_like(x), *_new_rows(x)),
)
def _launch_norm(
    x: Tensor, weight: Tensor, eps: float, offset: float, cast_first: bool
) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.empty_like(x)
    codes, scale = _new_rows(x)
    width = x.shape[-1]
    _norm_kernel(
        (len(scale),),
        x,
        weight,
        y,
        codes,
        scale,
        width,
        EPS=eps,
        OFFSET=offset,
        CAST_FIRST=cast_first,
        BLOCK=power_of_two(width),
        num_warps=warps_for(width, HELD),
        enable_fp_fusion=True,
    )
    return y, codes, scale


@operator(
    "fp8_gated_rows(Tensor gate, Tensor up, str activation) -> (Tensor, Tensor, Tensor)",
    fake=lambda gate, *_: (torch.empty_like(gate), *_new_rows(gate)),
)
def _launch_gated(gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    h = torch.empty_like(gate)
    codes, scale = _new_rows(gate)
    width = gate.shape[-1]
    _gated_kernel(
        (len(scale),),
        gate,
        up,
        h,
        codes,
        scale,
        width,
        ACTIVATION=activation,
        BLOCK=power_of_two(width),
        num_warps=warps_for(width, HELD),
        enable_fp_fusion=True,
    )
    return h, codes, scale


@operator(
    "fp8_gated_pull_rows(Tensor(a!) dh, Tensor(b!) gate, Tensor(c!) up, Tensor(d!) dgate,"
    " Tensor(e!) dup, str activation) -> (Tensor, Tensor)",
    fake=lambda dh, *_: _new_rows(dh, 2),
    mutates=("dh", "gate", "up", "dgate", "dup"),
)
def _launch_gated_pull(
    dh: Tensor, gate: Tensor, up: Tensor, dgate: Tensor, dup: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    codes, scale = _new_rows(dh, 2)
    width = dh.shape[-1]
    _gated_pull_kernel(
        (len(scale),),
        dh,
        gate,
        up,
        dgate,
        dup,
        codes,
        scale,
        width,
        ACTIVATION=activation,
        BLOCK=power_of_two(width),
        num_warps=warps_for(width, HELD_OF_TWO),
        enable_fp_fusion=True,
    )
    return codes, scale
