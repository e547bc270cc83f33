"""The Triton launch behind grouped.py for stacked 4-bit weights, decoded tile by tile."""

# Kernels are written in Triton's language: they have no Python types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False

from __future__ import annotations

import torch
from torch import Tensor

from . import codebook, nf4_decode
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
from .nf4_decode import _weights
from .nf4_launch import UNIT
from .nf4_products import _aligned


def takes(shape: tuple[int, ...], block: int) -> bool:
    """Whether 4-bit matrices of `shape` (out, in) can be multiplied packed."""
    return len(shape) == 2 and shape[1] % min(block, UNIT) == 0


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


@jit
def _matrix(
    group, p_words, p_absmax, p_scale, p_offset, s_words, s_absmax, s_scale, DOUBLE: tl.constexpr
):
    """The parts of one group's matrix in the stack; what stands for the last two without DOUBLE is
    not read, as a function cannot return None.
    """
    wide = group.to(tl.int64)
    p_words += wide * s_words
    p_absmax += wide * s_absmax
    if DOUBLE:
        return p_words, p_absmax, p_scale + wide * s_scale, p_offset + group
    else:
        return p_words, p_absmax, p_absmax, p_absmax


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
    TURNED: tl.constexpr,
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
    # A group's matrix has `outputs` rows of `runs` runs of WIDTH weights, and is taken in tiles of
    # OUTPUTS x RUNS runs. The product sums over its columns, TURNED over its rows.
    group, begin, end = _place(p_offsets, groups, tl.program_id(1), GROUPS, ROWS)
    if group < groups:
        dtype: tl.constexpr = p_x.dtype.element_ty
        p_own, p_own_absmax, p_own_scale, p_own_offset = _matrix(
            group, p_words, p_absmax, p_scale, p_offset, s_words, s_absmax, s_scale, DOUBLE
        )
        o_m = begin.to(tl.int64) + tl.arange(0, ROWS)
        m_m = o_m < end
        width = runs * WIDTH
        depth = outputs if TURNED else width
        N: tl.constexpr = RUNS * WIDTH if TURNED else OUTPUTS
        STEP: tl.constexpr = OUTPUTS if TURNED else RUNS
        o_n = tl.program_id(0) * N + tl.arange(0, N)
        m_n = o_n < (width if TURNED else outputs)
        p_rows = p_x + o_m[:, None] * depth
        b_y = tl.zeros([ROWS, N] if TURNED else [N, ROWS], dtype=tl.float32)
        for i in range(0, outputs if TURNED else runs, STEP):
            o_row = (i if TURNED else tl.program_id(0) * OUTPUTS) + tl.arange(0, OUTPUTS)
            o_run = (tl.program_id(0) * RUNS if TURNED else i) + tl.arange(0, RUNS)
            m_row = o_row < outputs
            o_k = o_row if TURNED else i * WIDTH + tl.arange(0, RUNS * WIDTH)
            m_x = m_m[:, None] & (o_k < depth)[None, :]
            b_x = tl.load(p_rows + o_k[None, :], mask=m_x, other=0.0)
            b_w = _weights(
                p_own,
                p_own_absmax,
                p_own_scale,
                p_own_offset,
                p_levels,
                p_map,
                o_row[:, None] * runs + o_run[None, :],
                m_row[:, None] & (o_run < runs)[None, :],
                BLOCK,
                WIDTH,
                OUTPUTS,
                RUNS * WIDTH,
                DOUBLE,
                DECODE,
                UNSCALE,
                dtype,
            )
            if TURNED:
                b_y = tl.dot(b_x, b_w, b_y, input_precision="ieee")
            else:
                b_y = tl.dot(b_w, tl.trans(b_x), b_y, input_precision="ieee")
        if not TURNED:
            b_y = tl.trans(b_y)
        many = width if TURNED else outputs
        _finish(
            b_y, p_low, p_b, p_out, group, o_m, m_m, o_n, m_n, many, rank, s_bg, s_bn, s_br, RANK
        )  # fmt: skip


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
    # Of a tile the summed side is the config's depth.
    rows_taken, columns = (config.depth, config.outputs)[:: 1 if turned else -1]
    across = ceil_div(runs, columns // unit) if turned else ceil_div(outputs, rows_taken)
    tile = {"TURNED": turned, "OUTPUTS": rows_taken, "RUNS": columns // unit}
    _nf4_kernel((across, tiles), *args, **tile, **options)
    return out
