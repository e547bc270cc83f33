"""Grouped products: rows sorted by group, each times its own group's matrix (experts).

`offsets` int32 [x + 1] says on the device where each group's rows begin: group i has rows
offsets[i] to offsets[i + 1]. Offsets start at 0 and end at the number of rows, unless stated
otherwise; no product waits for them. A low-rank term, low [m, r] times the transpose of b [x, out,
r], is added inside. All sums are in fp32 and rounded once.

4-bit weights are x matrices, each with the parts of `nf4.dequantize`, stacked: packed uint8
[x, n/2], absmax [x, blocks], absmax_scale [x, ceil(blocks/256)] and absmax_offset [x]. They are
decoded in registers, tile by tile, and never lie in memory in 16 bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import KernelError
from . import (
    codebook,
    grouped_dense_launch,  # noqa: F401 (its launches are called by name)
    nf4,
)
from .codebook import GROUP
from .grouped_nf4_launch import takes
from .launch import ceil_div, on_gpu, ops
from .nf4_launch import UNIT

# With more rows than this for each matrix, 4-bit ones are dequantized in PARTS parts instead
# (examples/measurements/grouped_h100.md).
PACKED_ROWS = 640
PARTS = 6


def matmul(
    x: Tensor,
    w: Tensor,
    offsets: Tensor,
    low: Tensor | None = None,
    b: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """x [m, k] times the transpose of its group's w [x, n, k]: [m, n] in the dtype of x.

    w may be any view, so `w.mT` multiplies by the matrices themselves. With `out` (contiguous) the
    rows of the groups are written there and the others stay: `offsets` may then be a part of a
    longer one, with the matrices of these groups alone. Not differentiable. Raises KernelError.
    """
    _check_rows(x, offsets)
    if w.dim() != 3 or w.dtype != x.dtype or w.shape[2] != x.shape[1]:
        raise KernelError(
            f"w is {w.dtype} {list(w.shape)}: expected {x.dtype} [groups, out, {x.shape[1]}]"
        )
    groups, outputs, _ = w.shape
    _check_groups(offsets, groups)
    _check_term(x, groups, outputs, low, b)
    whole = out is None
    if out is None:
        out = x.new_empty((len(x), outputs))
    elif out.shape != (len(x), outputs) or out.dtype != x.dtype or not out.is_contiguous():
        raise KernelError(f"out is {out.dtype} {list(out.shape)}: expected {x.dtype}")
    if on_gpu(x, w, offsets, low, b, out):
        ops.grouped_dense(x, w, offsets, low, b, out)
        return out
    return matmul_reference(x, w, offsets, low, b, None if whole else out)


def matmul_nf4(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    absmax_scale: Tensor | None,
    absmax_offset: Tensor | None,
    offsets: Tensor,
    shape: tuple[int, int],
    block: int,
    kind: str = "nf4",
    low: Tensor | None = None,
    b: Tensor | None = None,
    *,
    turned: bool = False,
) -> Tensor:
    """x [m, in] times the transpose of its group's 4-bit matrix of `shape` (out, in): [m, out].

    turned: x [m, out] times the matrix itself: [m, in], which is what a backward pass needs; b is
    then [x, in, r]. Not differentiable. Raises KernelError, also for an `in` that is not whole runs
    of min(block, 64).
    """
    outputs, width = shape
    _check_rows(x, offsets)
    nf4.check_block(block)
    nf4.check_kind(kind)
    groups = len(packed)
    _check_groups(offsets, groups)
    wanted = outputs if turned else width
    if x.shape[1] != wanted or not takes(shape, block):
        raise KernelError(
            f"x {list(x.shape)} and matrices {list(shape)} in blocks of {block}: expected "
            f"[rows, {wanted}], and matrices of a multiple of {min(block, UNIT)} columns"
        )
    parts = (packed, absmax, absmax_scale, absmax_offset)
    _check_stack(*parts, outputs * width, block)
    _check_term(x, groups, width if turned else outputs, low, b)
    if on_gpu(x, *parts, offsets, low, b):
        if (
            x.dtype != torch.float32
            and len(x) > PACKED_ROWS * groups
            and not width * outputs % block
        ):
            return _in_parts(x, parts, offsets, shape, block, kind, low, b, turned)
        y: Tensor = ops.grouped_nf4(x, *parts, offsets, low, b, outputs, width, block, kind, turned)
        return y
    return matmul_nf4_reference(x, *parts, offsets, shape, block, kind, low, b, turned=turned)


def _in_parts(
    x: Tensor,
    parts: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    offsets: Tensor,
    shape: tuple[int, int],
    block: int,
    kind: str,
    low: Tensor | None,
    b: Tensor | None,
    turned: bool,
) -> Tensor:
    """`matmul_nf4` through one buffer for a PARTS-th of the matrices, which are dequantized into it
    by turns: with many rows each, decoding a matrix once beats decoding it for every tile of rows.
    """
    packed, groups = parts[0], len(parts[0])
    maxima = _block_absmax(*parts[1:])
    each = ceil_div(groups, PARTS)
    out = x.new_empty((len(x), shape[1] if turned else shape[0]))
    buffer = x.new_empty((each, *shape))
    for i in range(0, groups, each):
        own = slice(i, min(i + each, groups))
        weight = buffer[: own.stop - i]
        flat = packed[own].view(-1), maxima[own].view(-1)
        nf4.dequantize(*flat, None, None, weight.numel(), block, out=weight, kind=kind)
        weight = weight.mT if turned else weight
        matmul(x, weight, offsets[i : own.stop + 1], low, None if b is None else b[own], out)
    return out


def _block_absmax(absmax: Tensor, scale: Tensor | None, offset: Tensor | None) -> Tensor:
    """The fp32 maxima [x, blocks] of stacked matrices, from either form, as `nf4.block_absmax`."""
    if scale is None or offset is None:
        return absmax
    values = codebook.device_tables(absmax.device, "nf4").dynamic[absmax.int()]
    scales = scale.repeat_interleave(GROUP, dim=1)[:, : absmax.shape[1]]
    return values.mul_(scales).add_(offset[:, None])


def outer(dy: Tensor, x: Tensor, offsets: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """For each group the sum over its rows of dy [m, p] (outer) x [m, q]: [x, p, q] in `dtype`.

    What the gradient of a group's matrix is; zeros for a group without rows. dtype: default that
    of x.
    """
    _check_rows(x, offsets)
    if dy.dim() != 2 or dy.dtype != x.dtype or len(dy) != len(x):
        raise KernelError(f"dy is {dy.dtype} {list(dy.shape)}: expected {x.dtype} [{len(x)}, p]")
    dtype = dtype or x.dtype
    if on_gpu(dy, x, offsets):
        made: Tensor = ops.grouped_outer(dy, x, offsets, dtype)
        return made
    return outer_reference(dy, x, offsets, dtype)


def offsets_of(ids: Tensor, groups: int) -> Tensor:
    """Where each group's rows begin, int32 [groups + 1], from the sorted ids [m]; no wait."""
    wanted = torch.arange(groups + 1, device=ids.device, dtype=ids.dtype)
    return torch.searchsorted(ids, wanted, out_int32=True)


def matmul_reference(
    x: Tensor,
    w: Tensor,
    offsets: Tensor,
    low: Tensor | None = None,
    b: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Plain torch for `matmul`: one product a group in fp32 (fp64 for fp64), rounded once."""
    wide = torch.promote_types(x.dtype, torch.float32)
    made = x.new_zeros((len(x), w.shape[1])) if out is None else out
    for i, rows in _slices(offsets):
        y = x[rows].to(wide) @ w[i].to(wide).mT
        if low is not None and b is not None:
            y = y + low[rows].to(wide) @ b[i].to(wide).mT
        made[rows] = y.to(x.dtype)
    return made


def matmul_nf4_reference(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    absmax_scale: Tensor | None,
    absmax_offset: Tensor | None,
    offsets: Tensor,
    shape: tuple[int, int],
    block: int,
    kind: str = "nf4",
    low: Tensor | None = None,
    b: Tensor | None = None,
    *,
    turned: bool = False,
) -> Tensor:
    """Plain torch for `matmul_nf4`, one dequantized matrix at a time."""
    wide = torch.promote_types(x.dtype, torch.float32)
    made = x.new_zeros((len(x), shape[1] if turned else shape[0]))
    for i, rows in _slices(offsets):
        parts = [None if t is None else t[i] for t in (packed, absmax, absmax_scale, absmax_offset)]
        assert parts[0] is not None and parts[1] is not None
        w = nf4.dequantize_reference(
            parts[0], parts[1], parts[2], parts[3], shape[0] * shape[1], block, wide, kind
        ).view(shape)
        y = x[rows].to(wide) @ (w if turned else w.mT)
        if low is not None and b is not None:
            y = y + low[rows].to(wide) @ b[i].to(wide).mT
        made[rows] = y.to(x.dtype)
    return made


def outer_reference(dy: Tensor, x: Tensor, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    """Plain torch for `outer`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    made = x.new_zeros((len(offsets) - 1, dy.shape[1], x.shape[1]), dtype=dtype)
    for i, rows in _slices(offsets):
        made[i] = (dy[rows].to(wide).mT @ x[rows].to(wide)).to(dtype)
    return made


def _slices(offsets: Tensor) -> list[tuple[int, slice]]:
    """(group, its rows) of every group that has any; waits for the device."""
    ends = offsets.tolist()
    return [(i, slice(a, b)) for i, (a, b) in enumerate(zip(ends, ends[1:], strict=False)) if a < b]


def _check_rows(x: Tensor, offsets: Tensor) -> None:
    if x.dim() != 2 or x.dtype not in (*nf4.FLOATS, torch.float64):
        raise KernelError(f"x is {x.dtype} {list(x.shape)}: expected floating point [rows, k]")
    if offsets.dim() != 1 or offsets.dtype != torch.int32 or not offsets.is_contiguous():
        raise KernelError(
            f"offsets are {offsets.dtype} {list(offsets.shape)}: expected int32 [groups + 1]"
        )


def _check_groups(offsets: Tensor, groups: int) -> None:
    if len(offsets) != groups + 1 or not groups:
        raise KernelError(f"{groups} matrices and {len(offsets)} offsets: expected one more")


def _check_term(x: Tensor, groups: int, outputs: int, low: Tensor | None, b: Tensor | None) -> None:
    if (low is None) != (b is None):
        raise KernelError("low and b: give both or neither")
    if low is None or b is None:
        return
    rank = low.shape[-1]
    if low.shape != (len(x), rank) or b.shape != (groups, outputs, rank) or not rank:
        raise KernelError(
            f"low {list(low.shape)} and b {list(b.shape)}: expected [{len(x)}, r] and "
            f"[{groups}, {outputs}, r]"
        )


def _check_stack(
    packed: Tensor,
    absmax: Tensor,
    absmax_scale: Tensor | None,
    absmax_offset: Tensor | None,
    count: int,
    block: int,
) -> None:
    """Raise KernelError unless these are the stacked parts of matrices of `count` weights."""
    groups, blocks = len(packed), ceil_div(count, block)
    wanted: dict[str, tuple[Tensor, tuple[int, ...]]] = {
        "packed": (packed, (groups, ceil_div(count, 2))),
        "absmax": (absmax, (groups, blocks)),
    }
    if absmax_scale is not None and absmax_offset is not None:
        wanted["absmax_scale"] = (absmax_scale, (groups, ceil_div(blocks, GROUP)))
        wanted["absmax_offset"] = (absmax_offset, (groups,))
    elif absmax_scale is not None or absmax_offset is not None:
        raise KernelError("absmax_scale and absmax_offset: give both or neither")
    codes = torch.uint8 if absmax_scale is not None else torch.float32
    kinds = {"packed": torch.uint8, "absmax": codes}
    for name, (t, shape) in wanted.items():
        kind = kinds.get(name, torch.float32)
        if t.shape != shape or t.dtype != kind or not t.is_contiguous():
            raise KernelError(
                f"{name} is {t.dtype} {list(t.shape)}: {groups} matrices of {count} weights in "
                f"blocks of {block} need contiguous {kind} {list(shape)}"
            )
