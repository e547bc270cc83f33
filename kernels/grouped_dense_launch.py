"""The Triton launches behind grouped.py for dense weights, and for their gradients: products of
rows with their group's matrix, and sums of outer products over a group's rows.
"""

# Kernels are written in Triton's language: they have no Python types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False

from __future__ import annotations

import torch
from torch import Tensor

from .grouped_tiles import (
    LARGE_TILES,
    Config,
    _finish,
    _gpu,
    _place,
    _rank,
    _rows_of,
    _term,
    _tiles,
)
from .launch import ceil_div, jit, operator, power_of_two
from .launch import language as tl


def dense_config(
    rows: int, groups: int, outputs: int, depth: int, dtype: torch.dtype, capability: int
) -> Config:
    """The cut of a product with dense weights [groups, outputs, depth]."""
    tile = _rows_of(rows, groups, 128)
    if dtype == torch.float32:
        return Config(min(tile, 64), 32 if outputs <= 32 else 64, 32, 4, 2)
    if outputs <= 64:  # a low-rank term
        return Config(tile, max(16, power_of_two(outputs)), 64, 4, 3)
    if tile == 128:
        return Config(128, 256 if capability >= LARGE_TILES else 128, 64, 8, 3)
    return Config(tile, 64, 64, 4, 3)


def outer_config(left: int, right: int, dtype: torch.dtype) -> Config:
    """The cut of the sums over rows: `rows` are those of a step, `outputs` and `depth` the tile."""
    most = 64 if dtype == torch.float32 else 128
    p, q = (max(16, min(most, power_of_two(n))) for n in (left, right))
    return Config(32, p, q, 4, 2 if dtype == torch.float32 else 3)


@jit
def _dense_kernel(
    p_x,
    p_w,
    p_low,
    p_b,
    p_out,
    p_offsets,
    groups,
    outputs,
    depth,
    rank,
    s_wg,
    s_wn,
    s_wk,
    s_bg,
    s_bn,
    s_br,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    DEPTH: tl.constexpr,
    RANK: tl.constexpr,
    EVEN: tl.constexpr,
):
    # Programs walk over the tiles that these offsets have: no more exist, whatever the grid.
    o_g = tl.arange(0, GROUPS)
    b_begin = tl.load(p_offsets + o_g, mask=o_g < groups, other=0)
    b_end = tl.load(p_offsets + o_g + 1, mask=o_g < groups, other=0)
    across = tl.cdiv(outputs, OUTPUTS)
    total = tl.sum((b_end - b_begin + ROWS - 1) // ROWS, axis=0) * across
    for tile in range(tl.program_id(0), total, tl.num_programs(0)):
        group, begin, end = _place(p_offsets, groups, tile // across, GROUPS, ROWS)
        o_m = begin.to(tl.int64) + tl.arange(0, ROWS)
        m_m = o_m < end
        o_n = (tile % across) * OUTPUTS + tl.arange(0, OUTPUTS)
        m_n = o_n < outputs
        o_k = tl.arange(0, DEPTH)
        p_rows = p_x + o_m[:, None] * depth
        p_columns = p_w + group.to(tl.int64) * s_wg + o_n[None, :] * s_wn
        b_y = tl.zeros([ROWS, OUTPUTS], dtype=tl.float32)
        for i in range(0, depth, DEPTH):
            m_x, m_w = m_m[:, None], m_n[None, :]
            if not EVEN:
                m_x = m_x & (o_k < depth - i)[None, :]
                m_w = m_w & (o_k < depth - i)[:, None]
            b_x = tl.load(p_rows + (i + o_k)[None, :], mask=m_x, other=0.0)
            b_w = tl.load(p_columns + (i + o_k)[:, None] * s_wk, mask=m_w, other=0.0)
            b_y = tl.dot(b_x, b_w, b_y, input_precision="ieee")
        _finish(
            b_y, p_low, p_b, p_out, group, o_m, m_m, o_n, m_n, outputs, rank, s_bg, s_bn, s_br, RANK
        )  # fmt: skip


@jit
def _outer_kernel(
    p_dy,
    p_x,
    p_out,
    p_offsets,
    left,
    right,
    ROWS: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
):
    group = tl.program_id(2)
    begin = tl.load(p_offsets + group)
    end = tl.load(p_offsets + group + 1)
    o_p = tl.program_id(1) * P + tl.arange(0, P)
    o_q = tl.program_id(0) * Q + tl.arange(0, Q)
    m_p, m_q = o_p < left, o_q < right
    b_sum = tl.zeros([P, Q], dtype=tl.float32)
    for i in range(begin, end, ROWS):
        o_m = (i + tl.arange(0, ROWS)).to(tl.int64)
        m_m = o_m < end
        o_dy = o_m[None, :] * left + o_p[:, None]
        b_dy = tl.load(p_dy + o_dy, mask=m_m[None, :] & m_p[:, None], other=0.0)
        o_x = o_m[:, None] * right + o_q[None, :]
        b_x = tl.load(p_x + o_x, mask=m_m[:, None] & m_q[None, :], other=0.0)
        b_sum = tl.dot(b_dy, b_x, b_sum, input_precision="ieee")
    o = group.to(tl.int64) * left * right + o_p[:, None] * right + o_q[None, :]
    tl.store(p_out + o, b_sum.to(p_out.dtype.element_ty), mask=m_p[:, None] & m_q[None, :])


def _programs(device: torch.device, config: Config) -> int:
    """As many as a device runs at once: one of the large tiles a multiprocessor, four of others."""
    return _gpu(device)[0] * (1 if config.num_warps > 4 else 4)


@operator(
    "grouped_dense(Tensor x, Tensor w, Tensor offsets, Tensor? low, Tensor? b, Tensor(a!) out)"
    " -> ()",
    fake=lambda x, w, offsets, low, b, out: None,
    mutates=("out",),
)
def _launch_dense(
    x: Tensor,
    w: Tensor,
    offsets: Tensor,
    low: Tensor | None,
    b: Tensor | None,
    out: Tensor,
) -> None:
    rows, depth = x.shape
    groups, outputs, _ = w.shape
    config = dense_config(rows, groups, outputs, depth, x.dtype, _gpu(x.device)[1])
    term, strides = _term(low, b, x.dtype)
    most = ceil_div(outputs, config.outputs) * _tiles(rows, groups, config.rows)
    _dense_kernel(
        (min(most, _programs(x.device, config)),),
        x.contiguous(),
        w,
        *term,
        out,
        offsets,
        groups,
        outputs,
        depth,
        strides[0],
        *w.stride(),
        *strides[1:],
        GROUPS=power_of_two(groups),
        ROWS=config.rows,
        OUTPUTS=config.outputs,
        DEPTH=config.depth,
        RANK=_rank(b),
        EVEN=depth % config.depth == 0,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


@operator(
    "grouped_outer(Tensor dy, Tensor x, Tensor offsets, ScalarType dtype) -> Tensor",
    fake=lambda dy, x, offsets, dtype: x.new_empty(
        (len(offsets) - 1, dy.shape[1], x.shape[1]), dtype=dtype
    ),
)
def _launch_outer(dy: Tensor, x: Tensor, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    left, right, groups = dy.shape[1], x.shape[1], len(offsets) - 1
    config = outer_config(left, right, x.dtype)
    out = x.new_empty((groups, left, right), dtype=dtype)
    _outer_kernel(
        (ceil_div(right, config.depth), ceil_div(left, config.outputs), groups),
        dy.contiguous(),
        x.contiguous(),
        out,
        offsets,
        left,
        right,
        ROWS=config.rows,
        P=config.outputs,
        Q=config.depth,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out
