"""What grouped launches share: how rows are cut into tiles, and where a tile's group and rows are.

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

from .launch import ceil_div, jit, power_of_two
from .launch import language as tl

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


def _rows_of(rows: int, groups: int, most: int) -> int:
    """Rows of a tile: a power of two that most groups do not exceed, if rows spread evenly."""
    return min(most, max(16, power_of_two(ceil_div(3 * rows, 2 * groups))))


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
def _finish(
    b_y,
    p_low,
    p_b,
    p_out,
    group,
    o_m,
    m_m,
    o_n,
    m_n,
    outputs,
    rank,
    s_bg,
    s_bn,
    s_br,
    RANK: tl.constexpr,
):
    """Stores b_y [rows, outputs], plus low [rows, rank] times the transpose of the group's b."""
    if RANK > 0:
        p_b += group.to(tl.int64) * s_bg
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
        b_y = tl.dot(b_low, b_b, b_y, input_precision="ieee")
    o_y = o_m[:, None] * outputs + o_n[None, :]
    tl.store(p_out + o_y, b_y.to(p_out.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])


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


def _term(low: Tensor | None, b: Tensor | None, dtype: torch.dtype) -> tuple[list[Tensor], ...]:
    """low and b as the kernels take them, and b's strides with its rank."""
    if low is None or b is None:
        return [None, None], [0, 0, 0, 0]  # type: ignore[list-item]
    low, b = low.to(dtype).contiguous(), b.to(dtype)
    return [low, b], [b.shape[2], b.stride(0), b.stride(1), b.stride(2)]  # type: ignore[list-item]


def _rank(b: Tensor | None) -> int:
    return 0 if b is None else max(16, power_of_two(b.shape[2]))
