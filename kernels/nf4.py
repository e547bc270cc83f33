"""NF4 and FP4: blocks of weights to 4-bit codes and back, plain or double-quantized block maxima.

Layout: the weights in storage order, block after block; code 2i in the high nibble of byte i,
code 2i+1 in the low one; one fp32 absmax a block, the last block may be short. Double
quantization (arXiv 2305.14314, section 3) stores absmax minus its mean as 8-bit codes of the
dynamic map, in groups of 256 with one fp32 scale each.

The rule, byte for byte bitsandbytes' on the CPU: the number of level midpoints below `w * (1 /
absmax)` is the code (in FP4, the rank of its value among the sixteen in ascending order), with
`w / absmax` in a short last block and absmax no smaller than 1e-38 in either. Dequantized: level *
absmax in fp32, then one rounding to the output dtype. absmax of a double-quantized weight:
map[code] * scale, rounded, + offset, rounded.

The references here define the format; the Triton launches are in nf4_launch.py and
nf4_quantize_launch.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import KernelError
from . import codebook
from . import nf4_launch as nf4_launch  # which defines the launch
from .codebook import GROUP
from .launch import ceil_div, on_gpu, ops
from .nf4_quantize_launch import TINY

BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
# Weights the reference handles at a time, so that it needs little memory of its own.
REFERENCE_CHUNK = 1 << 20
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def check_block(block: int) -> None:
    if block not in BLOCKS:
        raise KernelError(f"block size {block}: expected one of {', '.join(map(str, BLOCKS))}")


def check_kind(kind: str) -> None:
    if kind not in codebook.LEVELS:
        raise KernelError(f"4-bit kind {kind!r}: expected one of {', '.join(codebook.LEVELS)}")


def quantize(w: Tensor, block: int = 64, kind: str = "nf4") -> tuple[Tensor, Tensor]:
    """(packed uint8 [ceil(n/2)], absmax fp32 [ceil(n/block)]) of the n values of `w` in C order.

    `w` is bf16, fp16, fp32 (or fp64, taken as fp32). A block with a NaN or an infinity gets a
    non-finite absmax, so that a look at absmax tells; its codes mean nothing. An odd count ends
    in the code of zero. Raises KernelError.
    """
    check_block(block)
    check_kind(kind)
    if not w.is_floating_point() or w.dtype not in (*FLOATS, torch.float64):
        raise KernelError(f"dtype {w.dtype}: NF4 quantizes bfloat16, float16, float32 or float64")
    if w.numel() == 0:
        raise KernelError(f"a tensor of shape {tuple(w.shape)} has nothing to quantize")
    flat = w.detach().contiguous().view(-1)
    if on_gpu(flat):
        packed, absmax = ops.nf4_quantize(flat, block, kind)
        return packed, absmax
    return quantize_reference(flat, block, kind)


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(codes uint8 [m], scale fp32 [ceil(m/256)], offset fp32 []) of the fp32 `absmax` [m]."""
    if absmax.dtype != torch.float32 or absmax.dim() != 1 or absmax.numel() == 0:
        raise KernelError(
            f"absmax is {absmax.dtype} of shape {tuple(absmax.shape)}: expected float32 [blocks]"
        )
    if on_gpu(absmax):
        codes, scale, offset = ops.nf4_quantize_absmax(absmax)
        return codes, scale, offset
    offset = absmax.mean()
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
    kind: str = "nf4",
) -> Tensor:
    """The `count` values, flat, as `dtype`; absmax is fp32 codes' maxima, or uint8 with its scale
    and offset.

    With `out` (contiguous, `count` values) they are written there and `out` is returned. Raises
    KernelError when the parts do not fit each other.
    """
    check_block(block)
    check_kind(kind)
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
            ops.nf4_dequantize_into(*parts, out, block, kind)
            return out
        values: Tensor = ops.nf4_dequantize(*parts, count, block, dtype, kind)
        return values
    values = dequantize_reference(*parts, count, block, dtype, kind)
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
    if not all(t is None or t.is_contiguous() for t in (packed, absmax, absmax_scale)):
        raise KernelError("packed, absmax and absmax_scale: expected contiguous tensors")


def quantize_reference(flat: Tensor, block: int, kind: str = "nf4") -> tuple[Tensor, Tensor]:
    """Plain torch for `quantize`, a few million weights at a time."""
    thresholds = codebook.thresholds_of(kind, flat.device)
    order = None if kind == "nf4" else codebook.order_of(kind, flat.device)
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
        if order is not None:
            codes = order[codes.int()]
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
    kind: str = "nf4",
) -> Tensor:
    """Plain torch for `dequantize`."""
    levels = codebook.levels_of(kind, packed.device)
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
