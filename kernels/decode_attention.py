"""Attention of one new token a row over a cache of keys: split along the keys, then combined.

Flash decoding (Dao et al., 2023): with one query a row there are too few heads to fill a GPU, so
programs share a row's keys; each keeps the running maximum and sum of its part in fp32, and a
second launch joins the parts. Which keys a row sees is a span on the device, so that nothing
depends on the host: the keys outside of it are not read. A row's keys stand side by side, or, as in
PagedAttention (Kwon et al., 2023), in pages that a table names. Forward only.
"""

# Kernels are written in Triton's language: they have no Python types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import KernelError
from .launch import ceil_div, jit, on_gpu, operator, ops, power_of_two
from .launch import language as tl

# Programs that fill a GPU of 132 multiprocessors twice.
ENOUGH = 264
PIECE = 64  # features of a head that a program of the second launch joins


class Config(NamedTuple):
    """How a launch is cut: heads of a program (padded), keys of a step, warps, steps in flight."""

    rows: int
    block: int
    num_warps: int
    num_stages: int


def config_for(groups: int, dim: int, dtype: torch.dtype) -> Config:
    """The cut for heads of `dim` features, `groups` of them to a head of keys."""
    block, stages = 64 if dim <= 128 else 32, 2
    if dtype == torch.float32:  # more spills, at 256 features and over a cache in fp8
        block, stages = block // 2, 1
    warps = 8 if dim > 256 else 4  # in which 512 features would spill
    return Config(max(16, power_of_two(groups)), block, warps, stages)


def decode_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    first: Tensor,
    end: Tensor,
    table: Tensor | None = None,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """softmax(scale q k^T) v over keys first..end of each row; [b, h, d] in the dtype of q.

    q [b, h, d]; keys and values [b, capacity, k, d] of its dtype or e4m3, h a multiple of k; first
    and end [b] int64, 0 <= first <= end <= capacity: a row without keys gives zeros. With a table
    [b, pages] int64 keys and values are [n, page, k, d]: key j of row i is
    keys[table[i, j // page], j % page], and the capacity is pages * page. softcap c: scores become
    c tanh(score / c). bias fp32 [h, n], n at least the longest span: what is added to the score of
    a row's j-th key. sinks [h]: logits of keys without a value. Raises KernelError for shapes that
    do not fit and for inputs that need a gradient.
    """
    b, h, d = q.shape
    rows = keys.shape[0] if table is None else b
    if keys.shape != values.shape or (rows, keys.shape[3]) != (b, d) or h % keys.shape[2]:
        raise KernelError(
            f"q {list(q.shape)}, keys {list(keys.shape)}, values {list(values.shape)}: expected "
            "[b, h, d] and twice [b, capacity, k, d], h a multiple of k"
        )
    if first.shape != (b,) or end.shape != (b,):
        raise KernelError(f"first {list(first.shape)}, end {list(end.shape)}: expected [{b}]")
    if table is not None and (table.ndim != 2 or table.shape[0] != b):
        raise KernelError(f"table {list(table.shape)}: expected [{b}, pages]")
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, keys, values)):
        raise KernelError("q, keys or values need a gradient: decoding has none")
    if on_gpu(q, keys, values, first, end, table):
        out: Tensor = ops.decode_attention(
            q, keys, values, first, end, table, sinks, bias, scale, softcap or 0.0
        )
        return out
    return decode_attention_reference(
        q, keys, values, first, end, table, scale=scale, softcap=softcap, sinks=sinks, bias=bias
    )


def side_by_side(pages: Tensor, table: Tensor) -> Tensor:
    """pages [n, page, ...] in the order of table [b, m]: [b, m * page, ...], copied."""
    return pages[table].flatten(1, 2)


def decode_attention_reference(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    first: Tensor,
    end: Tensor,
    table: Tensor | None = None,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Plain torch for `decode_attention`; on the CPU, where asking is free, it reads no key past
    the last that a row sees."""
    b, h, d = q.shape
    if table is not None:
        if end.device.type == "cpu":
            table = table[:, : ceil_div(int(end.max()), keys.shape[1])]
        keys, values = side_by_side(keys, table), side_by_side(values, table)
    if end.device.type == "cpu":
        low, high = int(first.min()), int(end.max())
        keys, values = keys[:, low:high], values[:, low:high]
        first, end = first - low, end - low
    keys, values = keys.to(q.dtype), values.to(q.dtype)
    column = torch.arange(keys.shape[1], device=keys.device)
    seen = (column >= first[:, None]) & (column < end[:, None])
    wide = torch.promote_types(q.dtype, torch.float32)
    grouped = q.reshape(b, keys.shape[2], -1, d)
    scores = torch.einsum("bkgd,bjkd->bkgj", grouped, keys).to(wide) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    if bias is not None:
        place = (column - first[:, None]).clamp(0, bias.shape[1] - 1)
        scores = scores + bias[:, place].transpose(0, 1).view(scores.shape).to(wide)
    scores = scores.masked_fill(~seen[:, None, None], float("-inf"))
    if sinks is not None:
        grouped_sinks = sinks.to(wide).view(1, keys.shape[2], -1, 1).expand(b, -1, -1, -1)
        scores = torch.cat([scores, grouped_sinks], -1)
    # A row without keys: zeros instead of NaN; a NaN among scores stays one.
    weights = scores.softmax(-1)[..., : keys.shape[1]]
    weights = weights.masked_fill(~seen[:, None, None], 0.0).to(q.dtype)
    return torch.einsum("bkgj,bjkd->bkgd", weights, values).reshape(b, h, d)


def splits_for(batch: int, kv_heads: int, capacity: int, block: int) -> int:
    """How many programs share the keys of a row and head: a power of two."""
    wanted = min(ceil_div(ENOUGH, batch * kv_heads), ceil_div(capacity, block), 64)
    return power_of_two(wanted)


@jit
def _split_kernel(
    p_q,
    p_k,
    p_v,
    p_first,
    p_end,
    p_part,
    p_max,
    p_sum,
    p_bias,
    p_table,
    capacity,
    heads_k,
    columns,
    pages,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BIASED: tl.constexpr,
    PAGE: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
):
    row = tl.program_id(0)
    head = tl.program_id(1)
    split = tl.program_id(2)
    first = tl.load(p_first + row)
    end = tl.load(p_end + row)
    share = tl.cdiv(tl.cdiv(end - first, SPLITS), BLOCK) * BLOCK
    begin = first + split * share
    stop = tl.minimum(begin + share, end)
    o_g = tl.arange(0, ROWS)
    o_d = tl.arange(0, WIDTH)
    m_d = o_d < DIM
    m_g = o_g < GROUPS
    o_head = (row * heads_k + head) * GROUPS + o_g
    m_q = m_g[:, None] & m_d[None, :]
    b_q = tl.load(p_q + o_head[:, None] * DIM + o_d[None, :], mask=m_q, other=0.0)
    b_max = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([ROWS], dtype=tl.float32)
    b_out = tl.zeros([ROWS, WIDTH], dtype=tl.float32)
    o_row = row.to(tl.int64) * capacity
    for i in range(begin, stop, BLOCK):
        o_n = i + tl.arange(0, BLOCK)
        m_n = o_n < stop
        if PAGE > 0:
            b_page = tl.load(p_table + row * pages + o_n // PAGE, mask=m_n, other=0)
            o_key = b_page.to(tl.int64) * PAGE + o_n % PAGE
        else:
            o_key = o_row + o_n
        o_k = (o_key * heads_k + head)[:, None] * DIM + o_d[None, :]
        m_k = m_n[:, None] & m_d[None, :]
        b_k = tl.load(p_k + o_k, mask=m_k, other=0.0).to(b_q.dtype)
        b_v = tl.load(p_v + o_k, mask=m_k, other=0.0).to(b_q.dtype)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * SCALE
        if SOFTCAP > 0:
            # tanh of the size, from an exponential that cannot overflow.
            b_e = tl.exp(-2.0 * tl.abs(b_s) / SOFTCAP)
            b_t = (1.0 - b_e) / (1.0 + b_e) * SOFTCAP
            b_s = tl.where(b_s < 0, -b_t, b_t)
        if BIASED:
            o_bias = (head * GROUPS + o_g)[:, None] * columns + (o_n - first)[None, :]
            b_s += tl.load(p_bias + o_bias, mask=m_g[:, None] & m_n[None, :], other=0.0)
        b_s = tl.where(m_n[None, :], b_s, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, axis=1))
        b_scale = tl.exp(b_max - b_new)
        b_p = tl.exp(b_s - b_new[:, None])
        b_sum = b_sum * b_scale + tl.sum(b_p, axis=1)
        b_out = b_out * b_scale[:, None]
        b_out = tl.dot(b_p.to(b_v.dtype), b_v, b_out, input_precision="ieee")
        b_max = b_new
    o_part = o_head * SPLITS + split
    tl.store(p_max + o_part, b_max, mask=m_g)
    tl.store(p_sum + o_part, b_sum, mask=m_g)
    tl.store(p_part + o_part[:, None] * DIM + o_d[None, :], b_out, mask=m_q)


@jit
def _join_kernel(
    p_part,
    p_max,
    p_sum,
    p_sinks,
    p_out,
    heads,
    SINKS: tl.constexpr,
    DIM: tl.constexpr,
    PIECE: tl.constexpr,
    SPLITS: tl.constexpr,
):
    # PIECE features of a head.
    o_head = tl.program_id(0)
    o_s = o_head * SPLITS + tl.arange(0, SPLITS)
    o_d = tl.program_id(1) * PIECE + tl.arange(0, PIECE)
    m_d = o_d < DIM
    b_max = tl.load(p_max + o_s)
    b_sum = tl.load(p_sum + o_s)
    o_part = o_s[:, None] * DIM + o_d[None, :]
    b_part = tl.load(p_part + o_part, mask=m_d[None, :], other=0.0)
    # A part without keys has sum 0 and maximum -inf, and so has a row without any.
    b_top = tl.max(b_max, axis=0)
    if SINKS:
        b_sink = tl.load(p_sinks + o_head % heads)
        b_top = tl.maximum(b_top, b_sink)
    b_weight = tl.where(b_max == float("-inf"), 0.0, tl.exp(b_max - b_top))
    b_total = tl.sum(b_weight * b_sum, axis=0)
    if SINKS:
        b_total += tl.exp(b_sink - b_top)
    b_out = tl.sum(b_weight[:, None] * b_part, axis=0) / tl.where(b_total == 0, 1.0, b_total)
    tl.store(p_out + o_head * DIM + o_d, b_out.to(p_out.dtype.element_ty), mask=m_d)


@operator(
    "decode_attention(Tensor q, Tensor keys, Tensor values, Tensor first, Tensor end,"
    " Tensor? table, Tensor? sinks, Tensor? bias, float scale, float softcap) -> Tensor",
    fake=lambda q, *_: q.new_empty(q.shape),
)
def _launch(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    first: Tensor,
    end: Tensor,
    table: Tensor | None,
    sinks: Tensor | None,
    bias: Tensor | None,
    scale: float,
    softcap: float,
) -> Tensor:
    b, h, d = q.shape
    capacity, kv_heads = keys.shape[1:3]
    page, pages = (0, 0) if table is None else (capacity, table.shape[1])
    if table is not None:
        capacity *= pages
    groups = h // kv_heads
    config = config_for(groups, d, q.dtype)
    splits = splits_for(b, kv_heads, capacity, config.block)
    part = q.new_empty((b, h, splits, d), dtype=torch.float32)
    top, total = q.new_empty((2, b, h, splits), dtype=torch.float32).unbind(0)
    out = q.new_empty((b, h, d))
    width = max(16, power_of_two(d))
    _split_kernel(
        (b, kv_heads, splits),
        q.contiguous(),
        keys.contiguous(),
        values.contiguous(),
        first.contiguous(),
        end.contiguous(),
        part,
        top,
        total,
        bias,
        None if table is None else table.contiguous(),
        capacity,
        kv_heads,
        0 if bias is None else bias.shape[1],
        pages,
        SCALE=scale,
        SOFTCAP=softcap,
        BIASED=bias is not None,
        PAGE=page,
        GROUPS=groups,
        ROWS=config.rows,
        DIM=d,
        WIDTH=width,
        BLOCK=config.block,
        SPLITS=splits,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    piece = min(width, PIECE)
    _join_kernel(
        (b * h, ceil_div(d, piece)),
        part,
        top,
        total,
        None if sinks is None else sinks.float(),
        out,
        h,
        SINKS=sinks is not None,
        DIM=d,
        PIECE=piece,
        SPLITS=splits,
        num_warps=4,
    )
    return out
