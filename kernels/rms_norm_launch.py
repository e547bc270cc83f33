"""The Triton launches behind rms_norm.py, which has their reference and defines the arithmetic."""

# Kernels are written in Triton's language: they have no Python types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .launch import ceil_div, jit, operator, power_of_two
from .launch import language as tl

MAX_WIDTH = 65536
# Of the weight's gradient: programs, and so partial sums, a multiprocessor; multiprocessors where
# there is no GPU; rows under way at a time, of as many bytes at most.
PROGRAMS, PROCESSORS = 2, 132
STAGES, STAGED_BYTES = 3, 16384
SUM_ROWS, SUM_COLUMNS = 32, 32


class Config(NamedTuple):
    """How a launch cuts its rows: rows and columns of a tile, warps."""

    rows: int
    block: int
    num_warps: int


def config_for(width: int) -> Config:
    """Whole rows in registers, 16 values a thread; short rows (heads) share a program."""
    block = power_of_two(width)
    rows = max(1, 2048 // block)
    return Config(rows, block, min(16, max(4, rows * block // 512)))


def partials(device: torch.device) -> int:
    """How many programs sum the weight's gradient: so many as run at once."""
    if device.type != "cuda":
        return PROGRAMS * PROCESSORS
    return PROGRAMS * torch.cuda.get_device_properties(device).multi_processor_count


def stages_for(block: int, itemsize: int) -> int:
    """How many tiles a program that sums the weight's gradient has under way."""
    return STAGES if block * itemsize <= STAGED_BYTES else 1


@jit
def _scale(b_w, dtype: tl.constexpr, OFFSET: tl.constexpr, CAST_FIRST: tl.constexpr):
    """offset + weight in fp32, for a weight of this dtype, in which the sum is rounded with
    CAST_FIRST.
    """
    b_scale = b_w.to(tl.float32)
    if OFFSET != 0.0:
        b_scale += OFFSET
        if CAST_FIRST:
            b_scale = b_scale.to(dtype).to(tl.float32)
    return b_scale


@jit
def _weigh(b_normed, b_scale, dtype: tl.constexpr, CAST_FIRST: tl.constexpr):
    """What is normalised, in fp32, times the scale, rounded to `dtype`; still in fp32."""
    if CAST_FIRST:
        b_normed = b_normed.to(dtype).to(tl.float32)
    return (b_normed * b_scale).to(dtype).to(tl.float32)


@jit
def _centered(b_x, mask, width):
    """Rows in fp32, 0 where masked, less their means."""
    b_mean = tl.sum(b_x, axis=1) / width
    return tl.where(mask, b_x - b_mean[:, None], 0.0)


@jit
def _forward_kernel(
    p_x,
    p_w,
    p_onto,
    p_y,
    p_rstd,
    num_rows,
    width,
    stride_x,
    stride_onto,
    EPS: tl.constexpr,
    OFFSET: tl.constexpr,
    CAST_FIRST: tl.constexpr,
    CENTERED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_col = tl.arange(0, BLOCK)
    m_row = o_row < num_rows
    m_col = o_col < width
    mask = m_row[:, None] & m_col[None, :]
    b_x = tl.load(p_x + o_row[:, None] * stride_x + o_col[None, :], mask=mask, other=0.0)
    b_w = tl.load(p_w + o_col, mask=m_col, other=0.0)[None, :]
    b_wide = b_x.to(tl.float32)
    if CENTERED:
        b_wide = _centered(b_wide, mask, width)
    b_rstd = 1.0 / tl.sqrt_rn(tl.sum(b_wide * b_wide, axis=1) / width + EPS)
    b_scale = _scale(b_w, p_w.dtype.element_ty, OFFSET, CAST_FIRST)
    b_y = _weigh(b_wide * b_rstd[:, None], b_scale, p_y.dtype.element_ty, CAST_FIRST)
    if p_onto is not None:
        o_onto = o_row[:, None] * stride_onto + o_col[None, :]
        b_y += tl.load(p_onto + o_onto, mask=mask, other=0.0).to(tl.float32)
    o_y = o_row[:, None] * width + o_col[None, :]
    tl.store(p_y + o_y, b_y.to(p_y.dtype.element_ty), mask=mask)
    tl.store(p_rstd + o_row, b_rstd, mask=m_row)


@jit
def _backward_kernel(
    p_dy,
    p_x,
    p_w,
    p_rstd,
    p_onto,
    p_dx,
    p_partial,
    num_rows,
    width,
    stride_dy,
    stride_x,
    stride_onto,
    turns,
    EPS: tl.constexpr,
    OFFSET: tl.constexpr,
    CAST_FIRST: tl.constexpr,
    CENTERED: tl.constexpr,
    PARTIAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    # With x^ = x * rstd and g = dy * scale: dx = rstd * (g - x^ * mean(g * x^)), less its own mean
    # where x was CENTERED; dscale = sum of dy * x^, of which each program has a part. Neighbouring
    # programs have neighbouring tiles, and the next ones of a program are loaded while one is at
    # work.
    i_program = tl.program_id(0).to(tl.int64)
    o_col = tl.arange(0, BLOCK)
    m_col = o_col < width
    b_w = tl.load(p_w + o_col, mask=m_col, other=0.0)
    b_scale = _scale(b_w, p_w.dtype.element_ty, OFFSET, CAST_FIRST)
    b_sum = tl.zeros([BLOCK], dtype=tl.float32)
    for i_turn in tl.range(0, turns, num_stages=STAGES):
        i_tile = i_program + i_turn * tl.num_programs(0)
        o_row = i_tile * ROWS + tl.arange(0, ROWS)
        m_row = o_row < num_rows
        mask = m_row[:, None] & m_col[None, :]
        b_x = tl.load(p_x + o_row[:, None] * stride_x + o_col[None, :], mask=mask, other=0.0)
        b_dy = tl.load(p_dy + o_row[:, None] * stride_dy + o_col[None, :], mask=mask, other=0.0)
        b_x = b_x.to(tl.float32)
        if CENTERED:
            b_x = _centered(b_x, mask, width)
        if p_rstd is not None:
            b_rstd = tl.load(p_rstd + o_row, mask=m_row, other=0.0)[:, None]
        else:
            b_rstd = 1.0 / tl.sqrt_rn(tl.sum(b_x * b_x, axis=1) / width + EPS)[:, None]
        b_normed = b_x * b_rstd
        b_dy = b_dy.to(tl.float32)
        b_g = b_dy * b_scale[None, :]
        b_mean = tl.sum(b_g * b_normed, axis=1)[:, None] / width
        b_dx = (b_g - b_normed * b_mean) * b_rstd
        if CENTERED:
            b_dx = _centered(b_dx, mask, width)
        if p_onto is not None:
            o_onto = o_row[:, None] * stride_onto + o_col[None, :]
            b_dx += tl.load(p_onto + o_onto, mask=mask, other=0.0).to(tl.float32)
        o_out = o_row[:, None] * width + o_col[None, :]
        tl.store(p_dx + o_out, b_dx.to(p_dx.dtype.element_ty), mask=mask)
        if PARTIAL:
            if CAST_FIRST:
                b_normed = b_normed.to(p_x.dtype.element_ty).to(tl.float32)
            b_sum += tl.sum(b_dy * b_normed, axis=0)
    if PARTIAL:
        tl.store(p_partial + i_program * width + o_col, b_sum, mask=m_col)


@jit
def _sum_kernel(p_partial, p_sum, count, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The sum over the rows of partial [count, width]."""
    o_col = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    m_col = o_col < width
    b_sum = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for start in range(0, count, ROWS):
        o_row = start + tl.arange(0, ROWS)
        o = o_row[:, None] * width + o_col[None, :]
        mask = (o_row < count)[:, None] & m_col[None, :]
        b_sum += tl.load(p_partial + o, mask=mask, other=0.0)
    tl.store(p_sum + o_col, tl.sum(b_sum, axis=0).to(p_sum.dtype.element_ty), mask=m_col)


def _rows(x: Tensor) -> Tensor:
    """[rows, e] with unit stride within a row; copies only a layout that has none."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


def _new(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@operator(
    "rms_norm(Tensor x, Tensor weight, Tensor? onto, float eps, float offset, bool cast_first,"
    " bool centered=False) -> (Tensor, Tensor)",
    fake=lambda x, *_: (_new(x), x.new_empty(x.shape[:-1], dtype=torch.float32)),
    rows=(0, 2),
)
def _launch_forward(
    x: Tensor,
    weight: Tensor,
    onto: Tensor | None,
    eps: float,
    offset: float,
    cast_first: bool,
    centered: bool = False,
) -> tuple[Tensor, Tensor]:
    rows, weight = _rows(x), weight.contiguous()
    beside = None if onto is None else _rows(onto)
    y, rstd = _new(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
    count, width = rows.shape
    config = config_for(width)
    _forward_kernel(
        (ceil_div(count, config.rows),),
        rows,
        weight,
        beside,
        y,
        rstd,
        count,
        width,
        rows.stride(0),
        0 if beside is None else beside.stride(0),
        EPS=eps,
        OFFSET=offset,
        CAST_FIRST=cast_first,
        CENTERED=centered,
        ROWS=config.rows,
        BLOCK=config.block,
        num_warps=config.num_warps,
        enable_fp_fusion=True,
    )
    return y, rstd


def _launch_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor | None,
    onto: Tensor | None,
    eps: float,
    offset: float,
    cast_first: bool,
    centered: bool,
    partial: bool,
) -> tuple[Tensor, Tensor | None]:
    grads, rows, weight = _rows(dy), _rows(x), weight.contiguous()
    beside = None if onto is None else _rows(onto)
    dx = _new(x)
    count, width = rows.shape
    config = config_for(width)
    tiles = ceil_div(count, config.rows)
    turns = max(1, ceil_div(tiles, partials(x.device))) if partial else 1
    programs = ceil_div(tiles, turns)
    sums = x.new_empty((programs, width), dtype=torch.float32) if partial else None
    _backward_kernel(
        (programs,),
        grads,
        rows,
        weight,
        None if rstd is None else rstd.contiguous(),
        beside,
        dx,
        sums,
        count,
        width,
        grads.stride(0),
        rows.stride(0),
        0 if beside is None else beside.stride(0),
        turns,
        EPS=eps,
        OFFSET=offset,
        CAST_FIRST=cast_first,
        CENTERED=centered,
        PARTIAL=partial,
        ROWS=config.rows,
        BLOCK=config.block,
        STAGES=stages_for(config.block, x.element_size()) if partial else 1,
        num_warps=config.num_warps,
        enable_fp_fusion=True,
    )
    return dx, sums


@operator(
    "rms_norm_dx(Tensor dy, Tensor x, Tensor weight, Tensor? rstd, Tensor? onto, float eps,"
    " float offset, bool cast_first, bool centered=False) -> Tensor",
    fake=lambda dy, x, *_: _new(x),
    rows=(0, 1, 3, 4),
)
def _launch_dx(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor | None,
    onto: Tensor | None,
    eps: float,
    offset: float,
    cast_first: bool,
    centered: bool = False,
) -> Tensor:
    """rstd: as the forward made it, or None, which makes it again from x."""
    how = (eps, offset, cast_first, centered)
    return _launch_backward(dy, x, weight, rstd, onto, *how, False)[0]


@operator(
    "rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor? rstd, float eps, float offset,"
    " bool cast_first, bool centered=False) -> (Tensor, Tensor)",
    fake=lambda dy, x, weight, *_: (_new(x), torch.empty_like(weight)),
)
def _launch_both(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor | None,
    eps: float,
    offset: float,
    cast_first: bool,
    centered: bool = False,
) -> tuple[Tensor, Tensor]:
    how = (eps, offset, cast_first, centered)
    dx, sums = _launch_backward(dy, x, weight, rstd, None, *how, True)
    assert sums is not None
    count, width = sums.shape
    dweight = torch.zeros_like(weight) if count == 0 else torch.empty_like(weight)
    _sum_kernel(
        (ceil_div(width, SUM_COLUMNS) if count else 0,),
        sums,
        dweight,
        count,
        width,
        ROWS=SUM_ROWS,
        COLUMNS=SUM_COLUMNS,
        num_warps=4,
    )
    return dx, dweight
