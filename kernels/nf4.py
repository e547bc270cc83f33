"""NF4: blocks of weights to 4-bit codes and back, with plain or double-quantized block maxima.

Layout: the weights in storage order, block after block; code 2i in the high nibble of byte i,
code 2i+1 in the low one; one fp32 absmax a block, the last block may be short. Double
quantization (arXiv 2305.14314, section 3) stores absmax minus its mean as 8-bit codes of the
dynamic map, in groups of 256 with one fp32 scale each.

The rule, byte for byte bitsandbytes' on the CPU: code = the number of level midpoints below `w *
(1 / absmax)`, with `w / absmax` in a short last block and absmax no smaller than 1e-38 in either.
Dequantized: level * absmax in fp32, then one rounding to the output dtype. absmax of a
double-quantized weight: map[code] * scale, rounded, + offset, rounded.
"""

# Kernels are written in Triton's language: they have no Python types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import KernelError
from . import codebook
from .launch import ceil_div, jit, on_gpu, operator
from .launch import language as tl

BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
GROUP = 256  # absmax values that share one scale under double quantization
ABSMAX_ROWS = 4  # groups that a program of the second quantization takes
TINY = 1e-38  # what an absmax below it counts as
UNIT = 64  # weights of one row of a dequantizing tile; they share their absmax
REFERENCE_CHUNK = (
    1 << 20
)  # weights the reference handles at a time, so that it needs little memory of its own


class Config(NamedTuple):
    """How a launch is cut: rows of a tile, tiles a program does one after the other, warps."""

    rows: int
    turns: int
    num_warps: int


def quantize_config(block: int) -> Config:
    """Tiles of 4096 weights or one block: 32 weights a thread."""
    return Config(max(1, 4096 // block), 1, 4)


def dequantize_config(block: int) -> Config:
    """Tiles of 4096 weights, one a program."""
    return Config(4096 // min(block, UNIT), 1, 4)


FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def check_block(block: int) -> None:
    if block not in BLOCKS:
        raise KernelError(f"block size {block}: expected one of {', '.join(map(str, BLOCKS))}")


def quantize(w: Tensor, block: int = 64) -> tuple[Tensor, Tensor]:
    """(packed uint8 [ceil(n/2)], absmax fp32 [ceil(n/block)]) of the n values of `w` in C order.

    `w` is bf16, fp16, fp32 (or fp64, taken as fp32). A block with a NaN or an infinity gets a
    non-finite absmax, so that a look at absmax tells; its codes mean nothing. An odd count ends
    in the code of zero. Raises KernelError.
    """
    check_block(block)
    if not w.is_floating_point() or w.dtype not in (*FLOATS, torch.float64):
        raise KernelError(f"dtype {w.dtype}: NF4 quantizes bfloat16, float16, float32 or float64")
    if w.numel() == 0:
        raise KernelError(f"a tensor of shape {tuple(w.shape)} has nothing to quantize")
    flat = w.detach().contiguous().view(-1)
    if on_gpu(flat):
        packed, absmax = torch.ops.purelm.nf4_quantize(flat, block)
        return packed, absmax
    return quantize_reference(flat, block)


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(codes uint8 [m], scale fp32 [ceil(m/256)], offset fp32 []) of the fp32 `absmax` [m]."""
    if absmax.dtype != torch.float32 or absmax.dim() != 1 or absmax.numel() == 0:
        raise KernelError(
            f"absmax is {absmax.dtype} of shape {tuple(absmax.shape)}: expected float32 [blocks]"
        )
    offset = absmax.mean()
    if on_gpu(absmax):
        codes, scale = torch.ops.purelm.nf4_quantize_absmax(absmax.contiguous(), offset)
        return codes, scale, offset
    return *quantize_absmax_reference(absmax, offset), offset


def dequantize(
    packed: Tensor,
    absmax: Tensor,
    absmax_scale: Tensor | None,
    absmax_offset: Tensor | None,
    count: int,
    block: int,
    dtype: torch.dtype = torch.bfloat16,
    out: Tensor | None = None,
) -> Tensor:
    """The `count` values, flat, as `dtype`; absmax is fp32 codes' maxima, or uint8 with its scale
    and offset.

    With `out` (contiguous, `count` values) they are written there and `out` is returned. Raises
    KernelError when the parts do not fit each other.
    """
    check_block(block)
    _check_parts(packed, absmax, absmax_scale, absmax_offset, count, block)
    if out is not None:
        if out.numel() != count or not out.is_contiguous():
            raise KernelError(
                f"out has shape {tuple(out.shape)}, strides {out.stride()}: "
                f"expected a contiguous tensor of {count} values"
            )
        dtype = out.dtype
    if dtype not in (*FLOATS, torch.float64):
        raise KernelError(
            f"dtype {dtype}: NF4 dequantizes to bfloat16, float16, float32 or float64"
        )
    parts = (packed, absmax, absmax_scale, absmax_offset)
    if dtype != torch.float64 and on_gpu(*parts, out):
        if out is not None:
            torch.ops.purelm.nf4_dequantize_into(*parts, out, block)
            return out
        values: Tensor = torch.ops.purelm.nf4_dequantize(*parts, count, block, dtype)
        return values
    values = dequantize_reference(*parts, count, block, dtype)
    if out is not None:
        out.view(-1).copy_(values)
        return out
    return values


def _kind(t: Tensor) -> str:
    return f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}"


def _check_parts(
    packed: Tensor,
    absmax: Tensor,
    absmax_scale: Tensor | None,
    absmax_offset: Tensor | None,
    count: int,
    block: int,
) -> None:
    if packed.dtype != torch.uint8 or packed.shape != (ceil_div(count, 2),):
        raise KernelError(
            f"packed is {_kind(packed)}: {count} values need uint8 [{ceil_div(count, 2)}]"
        )
    blocks = ceil_div(count, block)
    double = absmax_scale is not None
    if absmax.dtype != (torch.uint8 if double else torch.float32) or absmax.shape != (blocks,):
        raise KernelError(
            f"absmax is {_kind(absmax)}: {count} values in blocks of {block} need "
            f"{'uint8 (it has a scale)' if double else 'float32'} [{blocks}]"
        )
    if (absmax_offset is None) == double:
        raise KernelError("absmax_scale and absmax_offset: give both or neither")
    if absmax_scale is not None and absmax_offset is not None:
        groups = ceil_div(blocks, GROUP)
        if absmax_scale.dtype != torch.float32 or absmax_scale.shape != (groups,):
            raise KernelError(f"absmax_scale is {_kind(absmax_scale)}: expected float32 [{groups}]")
        if absmax_offset.dtype != torch.float32 or absmax_offset.numel() != 1:
            raise KernelError(f"absmax_offset is {_kind(absmax_offset)}: expected one float32")
    if not packed.is_contiguous() or not absmax.is_contiguous():
        raise KernelError("packed and absmax: expected contiguous tensors")


# The references, which define the format.


def quantize_reference(flat: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Plain torch for `quantize`, a few million weights at a time."""
    thresholds = codebook.midpoints(codebook.nf4_levels(flat.device))
    packed, absmax = [], []
    for start in range(0, flat.numel(), REFERENCE_CHUNK):
        piece = flat[start : start + REFERENCE_CHUNK].float()
        full = piece.numel() // block * block
        rows = piece[:full].view(-1, block)
        most = rows.abs().amax(1)
        scaled = [(rows * (1.0 / most.clamp(min=TINY))[:, None]).view(-1)]
        absmax.append(most)
        if full < piece.numel():
            # bitsandbytes divides in the short block, and stores the maximum that it divided by.
            last = piece[full:].abs().amax().clamp(min=TINY)
            scaled.append(piece[full:] / last)
            absmax.append(last[None])
        if piece.numel() % 2:
            scaled.append(piece.new_zeros(1))
        codes = _count_below(torch.cat(scaled), thresholds)
        packed.append((codes[0::2] << 4) | codes[1::2])
    return torch.cat(packed), torch.cat(absmax)


def _count_below(x: Tensor, thresholds: Tensor) -> Tensor:
    """How many thresholds lie strictly below each value, uint8; three times as fast as bucketize
    for fifteen.
    """
    count = torch.zeros(x.shape, dtype=torch.uint8, device=x.device)
    for threshold in thresholds:
        count += x > threshold
    return count


def quantize_absmax_reference(absmax: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Plain torch for `quantize_absmax`: the nearest map value, looked up at one of 65536 evenly
    spaced points.
    """
    thresholds = codebook.midpoints(codebook.dynamic_map(absmax.device))
    m = absmax.numel()
    rows = torch.nn.functional.pad(absmax - offset, (0, -m % GROUP)).view(-1, GROUP)
    scale = rows.abs().amax(1)
    x = (rows * (1.0 / scale)[:, None]).clamp(-1.0, 1.0).nan_to_num(0.0)
    point = ((x + 1.0) * 0.5 * 65535.0 + 0.5).to(torch.int32)
    codes = torch.bucketize(-1.0 + (2.0 * point) / 65535.0, thresholds, out_int32=True)
    codes = torch.where(scale[:, None] == 0.0, 0, codes).to(torch.uint8)
    return codes.view(-1)[:m].contiguous(), scale


def block_absmax(
    absmax: Tensor, absmax_scale: Tensor | None, absmax_offset: Tensor | None
) -> Tensor:
    """The fp32 absmax of every block, from either form, in plain torch."""
    if absmax_scale is None or absmax_offset is None:
        return absmax
    values = codebook.dynamic_map(absmax.device)[absmax.int()]
    return values * absmax_scale.repeat_interleave(GROUP)[: absmax.numel()] + absmax_offset


def dequantize_reference(
    packed: Tensor,
    absmax: Tensor,
    absmax_scale: Tensor | None,
    absmax_offset: Tensor | None,
    count: int,
    block: int,
    dtype: torch.dtype,
) -> Tensor:
    """Plain torch for `dequantize`."""
    levels = codebook.nf4_levels(packed.device)
    pairs = torch.stack([levels.repeat_interleave(16), levels.repeat(16)], 1)
    most = block_absmax(absmax, absmax_scale, absmax_offset)
    pieces: list[Tensor] = []
    for start in range(0, count, REFERENCE_CHUNK):
        stop = min(start + REFERENCE_CHUNK, count)
        values = pairs.index_select(0, packed[start // 2 : ceil_div(stop, 2)].int()).view(-1)
        values = values[: stop - start]
        full = values.numel() // block * block
        first = start // block
        scaled = [
            (values[:full].view(-1, block) * most[first : first + full // block, None]).view(-1)
        ]
        if full < values.numel():
            scaled.append(values[full:] * most[-1])
        pieces.extend(part.to(dtype) for part in scaled)
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


# The launches.


@jit
def _threshold(p_mid, i: tl.constexpr):
    return tl.load(p_mid + i)


@jit
def _nf4_code(b_x, p_mid):
    """The number of thresholds below each value, by bisection: four comparisons."""
    m_8 = b_x > _threshold(p_mid, 7)
    m_4 = b_x > tl.where(m_8, _threshold(p_mid, 11), _threshold(p_mid, 3))
    b_low = tl.where(m_4, _threshold(p_mid, 5), _threshold(p_mid, 1))
    b_high = tl.where(m_4, _threshold(p_mid, 13), _threshold(p_mid, 9))
    m_2 = b_x > tl.where(m_8, b_high, b_low)
    b_0 = tl.where(m_2, _threshold(p_mid, 2), _threshold(p_mid, 0))
    b_4 = tl.where(m_2, _threshold(p_mid, 6), _threshold(p_mid, 4))
    b_8 = tl.where(m_2, _threshold(p_mid, 10), _threshold(p_mid, 8))
    b_12 = tl.where(m_2, _threshold(p_mid, 14), _threshold(p_mid, 12))
    b_low = tl.where(m_4, b_4, b_0)
    b_high = tl.where(m_4, b_12, b_8)
    m_1 = b_x > tl.where(m_8, b_high, b_low)
    b_code = tl.where(m_8, 8, 0) + tl.where(m_4, 4, 0)
    return b_code + tl.where(m_2, 2, 0) + tl.where(m_1, 1, 0)


@jit
def _quantize_kernel(
    p_w,
    p_packed,
    p_absmax,
    p_mid,
    count,
    blocks,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    o_block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_w = o_block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    b_w = tl.load(p_w + o_w, mask=o_w < count, other=0.0).to(tl.float32)
    # The largest magnitude by its bits: for numbers the same order, and NaN comes out on top.
    b_bits = b_w.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    b_top = tl.max(b_bits, axis=1)
    b_absmax = b_top.to(tl.float32, bitcast=True)
    # A tensor, as the literal, below the normal numbers, would be taken for float64.
    b_tiny = tl.full([ROWS], TINY, dtype=tl.float32)
    b_safe = tl.maximum(b_absmax, b_tiny)
    # A short last block divides by the maximum that it stores, a whole one multiplies by the
    # reciprocal.
    m_short = (o_block + 1) * BLOCK > count
    b_whole = tl.div_rn(tl.full([ROWS], 1.0, dtype=tl.float32), b_safe)
    b_x = b_w * b_whole[:, None]
    if (tl.program_id(0) + 1).to(tl.int64) * ROWS * BLOCK > count:
        b_most = tl.broadcast_to(b_safe[:, None], (ROWS, BLOCK))
        b_x = tl.where(m_short[:, None], tl.div_rn(b_w, b_most), b_x)
        b_absmax = tl.where(m_short & (b_absmax < b_tiny), b_tiny, b_absmax)
    b_code = _nf4_code(b_x, p_mid).to(tl.uint8)
    b_first, b_second = tl.split(tl.reshape(b_code, (ROWS, BLOCK // 2, 2)))
    o_byte = o_block[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    m_byte = o_byte < (count + 1) // 2
    tl.store(p_packed + o_byte, (b_first << 4) | b_second, mask=m_byte)
    tl.store(p_absmax + o_block, b_absmax, mask=o_block < blocks)


@jit
def _quantize_absmax_kernel(
    p_absmax, p_offset, p_mid, p_codes, p_scale, count, groups, ROWS: tl.constexpr
):
    o_group = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o = o_group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    mask = o < count
    b_a = tl.load(p_absmax + o, mask=mask, other=0.0) - tl.load(p_offset)
    b_a = tl.where(mask, b_a, 0.0)
    b_scale = tl.max(tl.abs(b_a), axis=1)
    m_zero = b_scale == 0.0
    b_one = tl.full([ROWS], 1.0, dtype=tl.float32)
    b_x = b_a * tl.div_rn(b_one, tl.where(m_zero, 1.0, b_scale))[:, None]
    b_x = tl.minimum(tl.maximum(b_x, -1.0), 1.0)
    # The nearest of 65536 even points, and the map's code for that point.
    b_point = ((b_x + 1.0) * 0.5 * 65535.0 + 0.5).to(tl.int32)
    b_65535 = tl.full([ROWS, GROUP], 65535.0, dtype=tl.float32)
    b_x = tl.div_rn(2.0 * b_point.to(tl.float32), b_65535) - 1.0
    b_code = tl.zeros([ROWS, GROUP], dtype=tl.int32)
    for i in tl.static_range(8):
        b_try = b_code + (128 >> i)
        b_code = tl.where(b_x > tl.load(p_mid + b_try - 1), b_try, b_code)
    b_code = tl.where(m_zero[:, None], 0, b_code)
    tl.store(p_codes + o, b_code.to(tl.uint8), mask=mask)
    tl.store(p_scale + o_group, b_scale, mask=o_group < groups)


@jit
def _dequantize_kernel(
    p_packed,
    p_absmax,
    p_scale,
    p_offset,
    p_levels,
    p_map,
    p_out,
    count,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    TURNS: tl.constexpr,
    DOUBLE: tl.constexpr,
):
    # A tile is ROWS runs of WIDTH weights, each within one block.
    if DOUBLE:
        b_offset = tl.load(p_offset)
    for i_turn in tl.static_range(TURNS):
        i_tile = tl.program_id(0).to(tl.int64) * TURNS + i_turn
        o_row = i_tile * ROWS + tl.arange(0, ROWS)
        m_row = o_row * WIDTH < count
        o_block = o_row * WIDTH // BLOCK
        if DOUBLE:
            b_code = tl.load(p_absmax + o_block, mask=m_row, other=0).to(tl.int32)
            b_scale = tl.load(p_scale + o_block // GROUP, mask=m_row, other=0.0)
            b_absmax = tl.load(p_map + b_code) * b_scale + b_offset
        else:
            b_absmax = tl.load(p_absmax + o_block, mask=m_row, other=0.0)
        o_byte = o_row[:, None] * (WIDTH // 2) + tl.arange(0, WIDTH // 2)[None, :]
        b_packed = tl.load(p_packed + o_byte, mask=o_byte < (count + 1) // 2, other=0).to(tl.int32)
        b_first = tl.load(p_levels + (b_packed >> 4)) * b_absmax[:, None]
        b_second = tl.load(p_levels + (b_packed & 15)) * b_absmax[:, None]
        b_out = tl.reshape(tl.join(b_first, b_second), (ROWS, WIDTH))
        o = o_row[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        tl.store(p_out + o, b_out.to(p_out.dtype.element_ty), mask=o < count)


@operator(
    "nf4_quantize(Tensor flat, int block) -> (Tensor, Tensor)",
    fake=lambda flat, block: (
        flat.new_empty((flat.shape[0] + 1) // 2, dtype=torch.uint8),
        flat.new_empty((flat.shape[0] + block - 1) // block, dtype=torch.float32),
    ),
)
def _launch_quantize(flat: Tensor, block: int) -> tuple[Tensor, Tensor]:
    count = flat.numel()
    blocks = ceil_div(count, block)
    packed = flat.new_empty(ceil_div(count, 2), dtype=torch.uint8)
    absmax = flat.new_empty(blocks, dtype=torch.float32)
    config = quantize_config(block)
    _quantize_kernel(
        (ceil_div(blocks, config.rows),),
        flat.contiguous(),
        packed,
        absmax,
        codebook.device_tables(flat.device)[1],
        count,
        blocks,
        BLOCK=block,
        ROWS=config.rows,
        num_warps=config.num_warps,
        enable_fp_fusion=False,
    )
    return packed, absmax


@operator(
    "nf4_quantize_absmax(Tensor absmax, Tensor offset) -> (Tensor, Tensor)",
    fake=lambda absmax, offset: (
        absmax.new_empty(absmax.shape, dtype=torch.uint8),
        absmax.new_empty((absmax.shape[0] + GROUP - 1) // GROUP),
    ),
)
def _launch_quantize_absmax(absmax: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    count = absmax.numel()
    groups = ceil_div(count, GROUP)
    codes = absmax.new_empty(count, dtype=torch.uint8)
    scale = absmax.new_empty(groups)
    _quantize_absmax_kernel(
        (ceil_div(groups, ABSMAX_ROWS),),
        absmax.contiguous(),
        offset,
        codebook.device_tables(absmax.device)[3],
        codes,
        scale,
        count,
        groups,
        ROWS=ABSMAX_ROWS,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return codes, scale


def _fill(
    packed: Tensor,
    absmax: Tensor,
    absmax_scale: Tensor | None,
    absmax_offset: Tensor | None,
    out: Tensor,
    block: int,
) -> None:
    levels, _, dynamic, _ = codebook.device_tables(packed.device)
    config = dequantize_config(block)
    width = min(block, UNIT)
    _dequantize_kernel(
        (ceil_div(out.numel(), width * config.rows * config.turns),),
        packed,
        absmax,
        absmax_scale,
        absmax_offset,
        levels,
        dynamic,
        out,
        out.numel(),
        BLOCK=block,
        WIDTH=width,
        ROWS=config.rows,
        TURNS=config.turns,
        DOUBLE=absmax_scale is not None,
        num_warps=config.num_warps,
        enable_fp_fusion=False,
    )


@operator(
    "nf4_dequantize(Tensor packed, Tensor absmax, Tensor? absmax_scale, Tensor? absmax_offset,"
    " int count, int block, ScalarType dtype) -> Tensor",
    fake=lambda packed, absmax, scale, offset, count, block, dtype: packed.new_empty(
        count, dtype=dtype
    ),
)
def _launch_dequantize(
    packed: Tensor,
    absmax: Tensor,
    absmax_scale: Tensor | None,
    absmax_offset: Tensor | None,
    count: int,
    block: int,
    dtype: torch.dtype,
) -> Tensor:
    out = packed.new_empty(count, dtype=dtype)
    _fill(packed, absmax, absmax_scale, absmax_offset, out, block)
    return out


@operator(
    "nf4_dequantize_into(Tensor packed, Tensor absmax, Tensor? absmax_scale,"
    " Tensor? absmax_offset, Tensor(a!) out, int block) -> ()",
    fake=lambda *_: None,
    mutates=("out",),
)
def _launch_dequantize_into(
    packed: Tensor,
    absmax: Tensor,
    absmax_scale: Tensor | None,
    absmax_offset: Tensor | None,
    out: Tensor,
    block: int,
) -> None:
    _fill(packed, absmax, absmax_scale, absmax_offset, out, block)
