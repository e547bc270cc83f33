"""The Triton launches behind grouped.py, which says what they do.

Rows are sorted by group, and where a group's rows begin stands on the device alone: a program finds
its group and its rows from the offsets, and the grid has as many programs as any offsets can need.
"""

# Kernels are written in Triton's language: they have no Python types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from . import codebook, nf4_decode
from .launch import ceil_div, jit, operator, power_of_two
from .launch import language as tl
from .nf4_decode import _codes, _levels
from .nf4_launch import UNIT
from .nf4_matvec_launch import WORD, _absmax
from .nf4_products import _aligned

# Multiprocessors and compute capability where there is no GPU, under the interpreter.
NO_GPU = (1, 9)
# From this capability on (Hopper), tiles of 128 x 128 and more keep their sums without spilling.
LARGE_TILES = 9


class Config(NamedTuple):
    """How a launch is cut: rows and outputs of a tile, values summed in a step, warps, stages."""

    rows: int
    outputs: int
    depth: int
    num_warps: int
    num_stages: int


def takes(shape: tuple[int, ...], block: int) -> bool:
    """Whether 4-bit matrices of `shape` (out, in) can be multiplied packed."""
    return len(shape) == 2 and shape[1] % min(block, UNIT) == 0


def _rows_of(rows: int, groups: int, most: int) -> int:
    """Rows of a tile: a power of two that most groups do not exceed, if rows spread evenly."""
    return min(most, max(16, power_of_two(ceil_div(3 * rows, 2 * groups))))


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


def nf4_config(
    rows: int,
    groups: int,
    outputs: int,
    depth: int,
    block: int,
    dtype: torch.dtype,
    turned: bool,
    capability: int,
) -> Config:
    """The cut of a product with 4-bit weights [groups, outputs, depth]; `turned`: with their
    transposes, so that the outputs are the last axis.
    """
    unit = min(block, UNIT)
    tile = _rows_of(rows, groups, 128 if capability >= LARGE_TILES else 64)
    if dtype == torch.float32:
        return Config(min(tile, 32), unit if turned else 32, 32 if turned else unit, 4, 1)
    if tile == 128:
        return Config(128, 128, 64, 4, 3)
    if turned:
        return Config(tile, max(64, unit), 128 if tile == 16 else 64, 4, 3)
    return Config(tile, 64, 128 if tile == 16 and depth % 128 == 0 else 64, 4, 3)


def outer_config(left: int, right: int, dtype: torch.dtype) -> Config:
    """The cut of the sums over rows: `rows` are those of a step, `outputs` and `depth` the tile."""
    most = 64 if dtype == torch.float32 else 128
    p, q = (max(16, min(most, power_of_two(n))) for n in (left, right))
    return Config(32, p, q, 4, 2 if dtype == torch.float32 else 3)


@jit
def _place(p_offsets, groups, tile, GROUPS: tl.constexpr, ROWS: tl.constexpr):
    """The group of the tile with this number (`groups` or more: none has it), the first and the end
    of its rows.
    """
    o_g = tl.arange(0, GROUPS)
    m_g = o_g < groups
    b_begin = tl.load(p_offsets + o_g, mask=m_g, other=0)
    b_end = tl.load(p_offsets + o_g + 1, mask=m_g, other=0)
    b_last = tl.cumsum((b_end - b_begin + ROWS - 1) // ROWS, 0)
    m_before = b_last <= tile
    group = tl.sum(m_before.to(tl.int32), axis=0)
    ahead = tl.max(tl.where(m_before, b_last, 0), axis=0)
    m_own = o_g == group
    begin = tl.sum(tl.where(m_own, b_begin, 0), axis=0)
    end = tl.sum(tl.where(m_own, b_end, 0), axis=0)
    return group, begin + (tile - ahead) * ROWS, end


@jit
def _add_term(
    b_y, p_low, p_b, o_m, m_m, o_n, m_n, rank, s_bn, s_br, RANK: tl.constexpr
):  # fmt: skip
    """b_y [rows, outputs] plus low [rows, rank] times the transpose of the group's b."""
    o_r = tl.arange(0, RANK)
    m_r = o_r < rank
    b_low = tl.load(
        p_low + o_m[:, None] * rank + o_r[None, :], mask=m_m[:, None] & m_r[None, :], other=0.0
    )
    b_b = tl.load(
        p_b + o_n[None, :] * s_bn + o_r[:, None] * s_br,
        mask=m_n[None, :] & m_r[:, None],
        other=0.0,
    )
    return tl.dot(b_low, b_b, b_y, input_precision="ieee")


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
        wide = group.to(tl.int64)
        o_m = begin.to(tl.int64) + tl.arange(0, ROWS)
        m_m = o_m < end
        o_n = (tile % across) * OUTPUTS + tl.arange(0, OUTPUTS)
        m_n = o_n < outputs
        o_k = tl.arange(0, DEPTH)
        p_rows = p_x + o_m[:, None] * depth
        p_columns = p_w + wide * s_wg + o_n[None, :] * s_wn
        b_y = tl.zeros([ROWS, OUTPUTS], dtype=tl.float32)
        for i in range(0, depth, DEPTH):
            m_x, m_w = m_m[:, None], m_n[None, :]
            if not EVEN:
                m_x = m_x & (o_k < depth - i)[None, :]
                m_w = m_w & (o_k < depth - i)[:, None]
            b_x = tl.load(p_rows + (i + o_k)[None, :], mask=m_x, other=0.0)
            b_w = tl.load(p_columns + (i + o_k)[:, None] * s_wk, mask=m_w, other=0.0)
            b_y = tl.dot(b_x, b_w, b_y, input_precision="ieee")
        if RANK > 0:
            p_own = p_b + wide * s_bg
            b_y = _add_term(b_y, p_low, p_own, o_m, m_m, o_n, m_n, rank, s_bn, s_br, RANK)
        o_y = o_m[:, None] * outputs + o_n[None, :]
        tl.store(p_out + o_y, b_y.to(p_out.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])


@jit
def _weights(
    p_words,
    p_absmax,
    p_scale,
    p_offset,
    p_levels,
    p_map,
    o_run,
    mask,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    DOUBLE: tl.constexpr,
    DECODE: tl.constexpr,
    UNSCALE: tl.constexpr,
    dtype: tl.constexpr,
):
    """The weights [N, K] of a matrix at the runs o_run [N, K / WIDTH], in `dtype`."""
    WORDS: tl.constexpr = WIDTH // WORD
    o_block = o_run // (BLOCK // WIDTH)
    b_absmax = _absmax(p_absmax, p_scale, p_offset, p_map, o_block, mask, DOUBLE)
    b_absmax = (b_absmax * UNSCALE)[:, :, None]
    o_w = o_run[:, :, None] * WORDS + tl.arange(0, WORDS)[None, None, :]
    b_words = tl.load(p_words + o_w, mask=mask[:, :, None], other=0)
    if DECODE is None:
        b_0, b_1, b_2, b_3, b_4, b_5, b_6, b_7 = _codes(b_words, p_levels)
    else:
        b_0, b_1, b_2, b_3, b_4, b_5, b_6, b_7 = _levels(b_words, p_levels, DECODE)
    b_04 = tl.join((b_0 * b_absmax).to(dtype), (b_4 * b_absmax).to(dtype))
    b_15 = tl.join((b_1 * b_absmax).to(dtype), (b_5 * b_absmax).to(dtype))
    b_26 = tl.join((b_2 * b_absmax).to(dtype), (b_6 * b_absmax).to(dtype))
    b_37 = tl.join((b_3 * b_absmax).to(dtype), (b_7 * b_absmax).to(dtype))
    b_w = tl.join(tl.join(b_04, b_26), tl.join(b_15, b_37))
    return tl.reshape(b_w, (N, K))


@jit
def _nf4_kernel(
    p_x,
    p_words,
    p_absmax,
    p_scale,
    p_offset,
    p_levels,
    p_map,
    p_low,
    p_b,
    p_out,
    p_offsets,
    groups,
    outputs,
    runs,
    rank,
    s_words,
    s_absmax,
    s_scale,
    s_bg,
    s_bn,
    s_br,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    RUNS: tl.constexpr,
    RANK: tl.constexpr,
    DOUBLE: tl.constexpr,
    DECODE: tl.constexpr,
    UNSCALE: tl.constexpr,
):
    # `outputs` rows of `runs` runs of WIDTH weights a group; x has runs * WIDTH values a row.
    group, begin, end = _place(p_offsets, groups, tl.program_id(1), GROUPS, ROWS)
    if group < groups:
        wide = group.to(tl.int64)
        p_words += wide * s_words
        p_absmax += wide * s_absmax
        if DOUBLE:
            p_scale += wide * s_scale
            p_offset += group
        dtype: tl.constexpr = p_x.dtype.element_ty
        o_m = begin.to(tl.int64) + tl.arange(0, ROWS)
        m_m = o_m < end
        o_n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
        m_n = o_n < outputs
        p_rows = p_x + o_m[:, None] * (runs * WIDTH)
        b_y = tl.zeros([OUTPUTS, ROWS], dtype=tl.float32)
        for i in range(0, runs, RUNS):
            o_run = i + tl.arange(0, RUNS)
            o_k = i * WIDTH + tl.arange(0, RUNS * WIDTH)
            m_x = m_m[:, None] & (o_k < runs * WIDTH)[None, :]
            b_x = tl.load(p_rows + o_k[None, :], mask=m_x, other=0.0)
            b_w = _weights(
                p_words,
                p_absmax,
                p_scale,
                p_offset,
                p_levels,
                p_map,
                o_n[:, None] * runs + o_run[None, :],
                m_n[:, None] & (o_run < runs)[None, :],
                BLOCK,
                WIDTH,
                OUTPUTS,
                RUNS * WIDTH,
                DOUBLE,
                DECODE,
                UNSCALE,
                dtype,
            )
            b_y = tl.dot(b_w, tl.trans(b_x), b_y, input_precision="ieee")
        b_y = tl.trans(b_y)
        if RANK > 0:
            p_b += wide * s_bg
            b_y = _add_term(b_y, p_low, p_b, o_m, m_m, o_n, m_n, rank, s_bn, s_br, RANK)
        o_y = o_m[:, None] * outputs + o_n[None, :]
        tl.store(p_out + o_y, b_y.to(p_out.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])


@jit
def _nf4_turned_kernel(
    p_x,
    p_words,
    p_absmax,
    p_scale,
    p_offset,
    p_levels,
    p_map,
    p_low,
    p_b,
    p_out,
    p_offsets,
    groups,
    depth,
    runs,
    rank,
    s_words,
    s_absmax,
    s_scale,
    s_bg,
    s_bn,
    s_br,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    RUNS: tl.constexpr,
    RANK: tl.constexpr,
    DOUBLE: tl.constexpr,
    DECODE: tl.constexpr,
    UNSCALE: tl.constexpr,
):
    # `depth` rows of `runs` runs of WIDTH weights a group, summed over the rows: runs * WIDTH
    # outputs.
    group, begin, end = _place(p_offsets, groups, tl.program_id(1), GROUPS, ROWS)
    if group < groups:
        wide = group.to(tl.int64)
        p_words += wide * s_words
        p_absmax += wide * s_absmax
        if DOUBLE:
            p_scale += wide * s_scale
            p_offset += group
        dtype: tl.constexpr = p_x.dtype.element_ty
        o_m = begin.to(tl.int64) + tl.arange(0, ROWS)
        m_m = o_m < end
        o_run = tl.program_id(0) * RUNS + tl.arange(0, RUNS)
        m_run = o_run < runs
        o_n = tl.program_id(0) * (RUNS * WIDTH) + tl.arange(0, RUNS * WIDTH)
        m_n = o_n < runs * WIDTH
        p_rows = p_x + o_m[:, None] * depth
        b_y = tl.zeros([ROWS, RUNS * WIDTH], dtype=tl.float32)
        for i in range(0, depth, DEPTH):
            o_k = i + tl.arange(0, DEPTH)
            m_k = o_k < depth
            b_x = tl.load(p_rows + o_k[None, :], mask=m_m[:, None] & m_k[None, :], other=0.0)
            b_w = _weights(
                p_words,
                p_absmax,
                p_scale,
                p_offset,
                p_levels,
                p_map,
                o_k[:, None] * runs + o_run[None, :],
                m_k[:, None] & m_run[None, :],
                BLOCK,
                WIDTH,
                DEPTH,
                RUNS * WIDTH,
                DOUBLE,
                DECODE,
                UNSCALE,
                dtype,
            )
            b_y = tl.dot(b_x, b_w, b_y, input_precision="ieee")
        if RANK > 0:
            p_b += wide * s_bg
            b_y = _add_term(b_y, p_low, p_b, o_m, m_m, o_n, m_n, rank, s_bn, s_br, RANK)
        o_y = o_m[:, None] * (runs * WIDTH) + o_n[None, :]
        tl.store(p_out + o_y, b_y.to(p_out.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])


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


def _tiles(rows: int, groups: int, tile: int) -> int:
    """How many tiles any offsets can need: every group may end in one that is not full."""
    return rows // tile + min(groups, rows)


@functools.cache
def _gpu(device: torch.device) -> tuple[int, int]:
    """(multiprocessors, major compute capability)."""
    if device.type != "cuda":
        return NO_GPU
    found = torch.cuda.get_device_properties(device)
    return found.multi_processor_count, found.major


def _programs(device: torch.device, config: Config) -> int:
    """As many as a device runs at once: one of the large tiles a multiprocessor, four of others."""
    return _gpu(device)[0] * (1 if config.num_warps > 4 else 4)


def _term(low: Tensor | None, b: Tensor | None, dtype: torch.dtype) -> tuple[list[Tensor], ...]:
    """low and b as the kernels take them, and b's strides with its rank."""
    if low is None or b is None:
        return [None, None], [0, 0, 0, 0]  # type: ignore[list-item]
    low, b = low.to(dtype).contiguous(), b.to(dtype)
    return [low, b], [b.shape[2], b.stride(0), b.stride(1), b.stride(2)]  # type: ignore[list-item]


def _rank(b: Tensor | None) -> int:
    return 0 if b is None else max(16, power_of_two(b.shape[2]))


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
    "grouped_nf4(Tensor x, Tensor packed, Tensor absmax, Tensor? absmax_scale,"
    " Tensor? absmax_offset, Tensor offsets, Tensor? low, Tensor? b, int outputs, int depth,"
    " int block, str kind, bool turned) -> Tensor",
    fake=lambda x, packed, absmax, scale, offset, offsets, low, b, outputs, depth, *rest: (
        x.new_empty((x.shape[0], depth if rest[2] else outputs))
    ),
)
def _launch_nf4(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    absmax_scale: Tensor | None,
    absmax_offset: Tensor | None,
    offsets: Tensor,
    low: Tensor | None,
    b: Tensor | None,
    outputs: int,
    depth: int,
    block: int,
    kind: str,
    turned: bool,
) -> Tensor:
    rows, groups = x.shape[0], packed.shape[0]
    unit = min(block, UNIT)
    capability = _gpu(x.device)[1]
    config = nf4_config(rows, groups, outputs, depth, block, x.dtype, turned, capability)
    levels, _, dynamic, *_ = codebook.device_tables(x.device, kind)
    wide = x.dtype == torch.float32
    if not wide:
        levels = nf4_decode.table(kind, torch.float16, x.device)
    out = x.new_empty((rows, depth if turned else outputs))
    runs = depth // unit
    term, strides = _term(low, b, x.dtype)
    words = _aligned(packed).view(torch.int32)
    tensors = (x.contiguous(), words, absmax, absmax_scale, absmax_offset, levels, dynamic)
    shape = (outputs, runs, strides[0], words.shape[1], absmax.shape[1])
    options = {
        "BLOCK": block,
        "WIDTH": unit,
        "GROUPS": power_of_two(groups),
        "ROWS": config.rows,
        "RANK": _rank(b),
        "DOUBLE": absmax_scale is not None,
        "DECODE": None if wide else nf4_decode.DECODE,
        "UNSCALE": 1.0 if wide else 1.0 / nf4_decode.SCALES[kind, torch.float16],
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    tiles = _tiles(rows, groups, config.rows)
    scales = 0 if absmax_scale is None else absmax_scale.shape[1]
    args = (*tensors, *term, out, offsets, groups, *shape, scales, *strides[1:])
    if turned:
        taken = config.outputs // unit
        grid = (ceil_div(runs, taken), tiles)
        _nf4_turned_kernel(grid, *args, DEPTH=config.depth, RUNS=taken, **options)
    else:
        grid = (ceil_div(outputs, config.outputs), tiles)
        _nf4_kernel(grid, *args, OUTPUTS=config.outputs, RUNS=config.depth // unit, **options)
    return out


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
