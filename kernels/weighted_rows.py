"""What stands around the products of experts: a token's rows summed by weight, and the weights'
gradients, which are inner products of rows.
"""

# Kernels are written in Triton's language: they have no Python types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..errors import KernelError
from .launch import ceil_div, jit, on_gpu, operator, ops
from .launch import language as tl

COLUMNS, WARPS = 1024, 4
DOT_ROWS, DOT_COLUMNS = 8, 256
# Rows whose fp32 copies plain torch makes at a time.
CHUNK = 1 << 14


def weighted_sum(rows: Tensor, places: Tensor, weights: Tensor | None = None) -> Tensor:
    """rows [m, e], places int64 [t, k] -> [t, e]: for each token the sum of its k rows, times their
    weights [t, k] if there are any.

    Summed in fp32 (wider if rows or weights are) and rounded once to the dtype of rows. Not
    differentiable. Raises KernelError.
    """
    if rows.dim() != 2 or places.dim() != 2 or places.dtype != torch.int64:
        raise KernelError(
            f"rows {list(rows.shape)} and places {places.dtype} {list(places.shape)}: expected "
            "[m, e] and int64 [t, k]"
        )
    if weights is not None and weights.shape != places.shape:
        raise KernelError(f"weights {list(weights.shape)}: expected {list(places.shape)}")
    if on_gpu(rows, places, weights):
        made: Tensor = ops.weighted_sum(rows, places, weights)
        return made
    return weighted_sum_reference(rows, places, weights)


def weighted_sum_reference(rows: Tensor, places: Tensor, weights: Tensor | None = None) -> Tensor:
    """Plain torch for `weighted_sum`, in chunks of tokens."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    made = [rows[:0]]
    for own, w in _chunks(places, weights):
        each = rows.index_select(0, own.flatten()).view(*own.shape, -1)
        each = each.to(wide) if w is None else each * w[..., None].to(wide)
        made.append(each.sum(1).to(rows.dtype))
    return torch.cat(made)


def _chunks(places: Tensor, weights: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    step = max(1, CHUNK // places.shape[1])
    for i in range(0, len(places), step):
        yield places[i : i + step], None if weights is None else weights[i : i + step]


def row_dots(a: Tensor, b: Tensor) -> Tensor:
    """a and b [m, f] of one dtype -> the inner product of each pair of rows [m], fp32 or wider.

    Not differentiable. Raises KernelError.
    """
    if a.dim() != 2 or a.shape != b.shape or a.dtype != b.dtype:
        raise KernelError(
            f"a {a.dtype} {list(a.shape)} and b {b.dtype} {list(b.shape)}: expected the same [m, f]"
        )
    if on_gpu(a, b):
        made: Tensor = ops.row_dots(a, b)
        return made
    return row_dots_reference(a, b)


def row_dots_reference(a: Tensor, b: Tensor) -> Tensor:
    """Plain torch for `row_dots`, in chunks of rows."""
    wide = torch.promote_types(a.dtype, torch.float32)
    pairs = zip(torch.split(a, CHUNK), torch.split(b, CHUNK), strict=True)
    return torch.cat([(x.to(wide) * y.to(wide)).sum(-1) for x, y in pairs])


@jit
def _sum_kernel(
    p_rows,
    p_places,
    p_weights,
    p_out,
    width,
    ACTIVE: tl.constexpr,
    WEIGHED: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    o = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = o < width
    b_sum = tl.zeros([COLUMNS], dtype=tl.float32)
    for i in range(ACTIVE):
        row = tl.load(p_places + token * ACTIVE + i)
        b_row = tl.load(p_rows + row * width + o, mask=mask, other=0.0).to(tl.float32)
        if WEIGHED:
            b_row *= tl.load(p_weights + token * ACTIVE + i).to(tl.float32)
        b_sum += b_row
    tl.store(p_out + token * width + o, b_sum.to(p_out.dtype.element_ty), mask=mask)


@jit
def _dots_kernel(p_a, p_b, p_out, rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_row = o_row < rows
    b_sum = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for i in range(0, width, COLUMNS):
        o_col = i + tl.arange(0, COLUMNS)
        o = o_row[:, None] * width + o_col[None, :]
        mask = m_row[:, None] & (o_col < width)[None, :]
        b_a = tl.load(p_a + o, mask=mask, other=0.0).to(tl.float32)
        b_b = tl.load(p_b + o, mask=mask, other=0.0).to(tl.float32)
        b_sum += b_a * b_b
    tl.store(p_out + o_row, tl.sum(b_sum, axis=1), mask=m_row)


@operator(
    "weighted_sum(Tensor rows, Tensor places, Tensor? weights) -> Tensor",
    fake=lambda rows, places, weights: rows.new_empty((len(places), rows.shape[1])),
)
def _launch_sum(rows: Tensor, places: Tensor, weights: Tensor | None) -> Tensor:
    (tokens, active), width = places.shape, rows.shape[1]
    out = rows.new_empty((tokens, width))
    _sum_kernel(
        (tokens, ceil_div(width, COLUMNS)),
        rows.contiguous(),
        places.contiguous(),
        None if weights is None else weights.contiguous(),
        out,
        width,
        ACTIVE=active,
        WEIGHED=weights is not None,
        COLUMNS=COLUMNS,
        num_warps=WARPS,
    )
    return out


@operator(
    "row_dots(Tensor a, Tensor b) -> Tensor",
    fake=lambda a, b: a.new_empty(len(a), dtype=torch.float32),
)
def _launch_dots(a: Tensor, b: Tensor) -> Tensor:
    rows, width = a.shape
    out = a.new_empty(rows, dtype=torch.float32)
    _dots_kernel(
        (ceil_div(rows, DOT_ROWS),),
        a.contiguous(),
        b.contiguous(),
        out,
        rows,
        width,
        ROWS=DOT_ROWS,
        COLUMNS=DOT_COLUMNS,
        num_warps=WARPS,
    )
    return out
