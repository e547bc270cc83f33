"""The NF4 leaf: a frozen weight in 4 bits (NF4, or FP4 as a kind of it) with everything needed to
read it back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import KernelError
from ..kernels import nf4 as kernel


@dataclass(frozen=True, eq=False)
class NF4:
    """A weight of `shape` in NF4 (arXiv 2305.14314), its values in C order.

    packed uint8 [ceil(n/2)], first code in the high nibble; absmax fp32 [ceil(n/block)], or under
    double quantization uint8 of that length with absmax_scale fp32 [ceil(blocks/256)] and
    absmax_offset fp32 []. `dtype` is what it dequantizes to by default. `kind` names the
    sixteen values: "nf4" or "fp4". Where its products are in fp8 (quant/fp8_product.py), `fp8_rows`
    [out] and `fp8_columns` [in] are the scales for that. A torch pytree node whose leaves are its
    tensors.
    """

    packed: Tensor
    absmax: Tensor
    absmax_scale: Tensor | None
    absmax_offset: Tensor | None
    shape: torch.Size
    dtype: torch.dtype
    block: int
    kind: str = "nf4"
    fp8_rows: Tensor | None = None
    fp8_columns: Tensor | None = None

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def numel(self) -> int:
        """The number of weights it stands for."""
        return math.prod(self.shape)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Its tensors, absent ones left out."""
        parts = (self.packed, self.absmax, self.absmax_scale, self.absmax_offset)
        every = (*parts, self.fp8_rows, self.fp8_columns)
        return tuple(part for part in every if part is not None)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> NF4:
        """The same weight on another device; no dtype of its parts ever changes."""
        return _join(
            [part.to(device, non_blocking=non_blocking) for part in self.tensors], _static(self)
        )


def _static(leaf: NF4) -> tuple[bool, torch.Size, torch.dtype, int, str]:
    return leaf.absmax_scale is not None, leaf.shape, leaf.dtype, leaf.block, leaf.kind


def _split(leaf: NF4) -> tuple[list[Any], Any]:
    return list(leaf.tensors), _static(leaf)


def _join(parts: Any, static: Any) -> NF4:
    packed, absmax, *rest = parts
    double, shape, dtype, block, kind = static
    scale, offset, *rest = rest if double else (None, None, *rest)
    return NF4(packed, absmax, scale, offset, shape, dtype, block, kind, *rest)


pytree.register_pytree_node(NF4, _split, _join, serialized_type_name="purelm.NF4")


def quantize(
    w: Tensor,
    *,
    block: int = 64,
    double: bool = True,
    name: str | None = None,
    kind: str = "nf4",
) -> NF4:
    """`w` (bf16, fp16 or fp32, any shape) in NF4 or FP4, its maxima double-quantized by default.

    Bytes are bitsandbytes' CPU path's (and on a GPU the same but for the order of one mean).
    Raises KernelError for another dtype or block size, and for NaN or infinite weights, naming
    `name` and their count.
    """
    packed, absmax = kernel.quantize(w, block, kind)
    scale = offset = None
    maxima = absmax
    if double:
        absmax, scale, offset = kernel.quantize_absmax(maxima)
    # One number tells (a mean may overflow without cause, then all are looked at).
    sign = maxima.amax() if offset is None else offset
    if not math.isfinite(float(sign)) and not bool(torch.isfinite(maxima).all()):
        count = int((~torch.isfinite(w)).sum())
        raise KernelError(
            f"tensor {name!r} {list(w.shape)}: {count} of {w.numel()} values are NaN or infinite; "
            f"{kind.upper()} needs finite weights, so load it without quantization or repair the "
            "checkpoint"
        )
    return NF4(packed, absmax, scale, offset, w.shape, w.dtype, block, kind)


def dequantize(leaf: NF4, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
    """The weight as a dense tensor of `leaf.shape`, in `dtype` (default the leaf's own).

    `out`, if given, is a contiguous tensor of that shape which receives it; its dtype counts
    then. Raises KernelError.
    """
    if out is not None and out.shape != leaf.shape:
        raise KernelError(f"out has shape {tuple(out.shape)}: the weight has {tuple(leaf.shape)}")
    flat = kernel.dequantize(
        leaf.packed,
        leaf.absmax,
        leaf.absmax_scale,
        leaf.absmax_offset,
        leaf.numel(),
        leaf.block,
        dtype or leaf.dtype,
        out,
        leaf.kind,
    )
    return flat.view(leaf.shape)


def nbytes(leaf: NF4) -> int:
    """Bytes that the leaf's tensors occupy."""
    return sum(part.numel() * part.element_size() for part in leaf.tensors)
