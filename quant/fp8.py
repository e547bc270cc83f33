"""The Fp8 leaf: a frozen weight in e4m3, with one scale a row or one a block of 128 x 128.

The bytes are those of transformers' fine-grained fp8 (block scales, DeepSeek-V3, arXiv 2412.19437,
section 3.3) and of compressed-tensors' "float-quantized" (row scales): scale = the largest
magnitude / 448, and a weight is its code times its scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import KernelError
from ..kernels.fp8 import E4M3, scale_of
from ..kernels.nf4 import FLOATS

BLOCK = 128


@dataclass(frozen=True, eq=False)
class Fp8:
    """A weight [out, in]: codes e4m3 of that shape; scale fp32 [out], or of its blocks,
    [ceil(out/128), ceil(in/128)].

    `dtype` is what it dequantizes to by default. Where its products are in fp8 too
    (quant/fp8_product.py), `fp8_rows` [out] and `fp8_columns` [in] are the scales for that. A
    torch pytree node whose leaves are its tensors.
    """

    codes: Tensor
    scale: Tensor
    dtype: torch.dtype
    fp8_rows: Tensor | None = None
    fp8_columns: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def ndim(self) -> int:
        return self.codes.ndim

    @property
    def blocks(self) -> bool:
        """Whether the scales are of blocks."""
        return self.scale.ndim == 2

    def numel(self) -> int:
        """The number of weights it stands for."""
        return self.codes.numel()

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Its tensors, absent ones left out."""
        every = (self.codes, self.scale, self.fp8_rows, self.fp8_columns)
        return tuple(part for part in every if part is not None)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Fp8:
        """The same weight on another device; no dtype of its parts ever changes."""
        moved = [part.to(device, non_blocking=non_blocking) for part in self.tensors]
        return _join(moved, self.dtype)


def _join(parts: Any, dtype: torch.dtype) -> Fp8:
    codes, scale, *product = parts
    return Fp8(codes, scale, dtype, *product)


pytree.register_pytree_node(
    Fp8,
    lambda leaf: (list(leaf.tensors), leaf.dtype),
    _join,
    serialized_type_name="purelm.Fp8",
)


def quantize(w: Tensor, *, blocks: bool = False, name: str | None = None) -> Fp8:
    """`w` [out, in] (bf16, fp16 or fp32) in e4m3, a scale a row or a block of 128 x 128.

    Raises KernelError for another dtype or shape, and for NaN or infinite weights, naming `name`
    and their count.
    """
    if w.dim() != 2 or w.numel() == 0 or w.dtype not in FLOATS:
        raise KernelError(
            f"tensor {name!r} is {w.dtype} {list(w.shape)}: fp8 takes bfloat16, float16 or "
            "float32 [out, in]"
        )
    wide = w.detach().float()
    size = wide.abs()
    if blocks:
        rows, columns = w.shape
        size = torch.nn.functional.pad(size, (0, -columns % BLOCK, 0, -rows % BLOCK))
        size = size.view(size.shape[0] // BLOCK, BLOCK, -1, BLOCK).amax((1, 3))
    else:
        size = size.amax(1)
    scale = scale_of(size)
    if not bool(torch.isfinite(scale).all()):
        count = int((~torch.isfinite(w)).sum())
        raise KernelError(
            f"tensor {name!r} {list(w.shape)}: {count} of {w.numel()} values are NaN or infinite; "
            "fp8 needs finite weights, so load it without quantization or repair the checkpoint"
        )
    return Fp8(_scaled(wide, scale.reciprocal()).to(E4M3), scale, w.dtype)


def _scaled(w: Tensor, scale: Tensor) -> Tensor:
    """w [out, in] fp32 or wider times the scales of its rows or blocks."""
    if scale.ndim == 1:
        return w * scale[:, None]
    rows, columns = w.shape
    wide = scale.repeat_interleave(BLOCK, 1)[:, :columns]
    return w * wide.repeat_interleave(BLOCK, 0)[:rows]


def dequantize(leaf: Fp8, dtype: torch.dtype | None = None) -> Tensor:
    """The weight as a dense tensor [out, in] in `dtype` (default the leaf's own): the product of
    code and scale, rounded once.
    """
    dtype = dtype or leaf.dtype
    if dtype in (torch.bfloat16, torch.float16) and not leaf.blocks:
        # Each code is a number of these dtypes too; the product in place is computed in fp32.
        return leaf.codes.to(dtype).mul_(leaf.scale[:, None])
    wide = torch.promote_types(dtype, torch.float32)
    return _scaled(leaf.codes.to(wide), leaf.scale.to(wide)).to(dtype)


def nbytes(leaf: Fp8) -> int:
    """Bytes that the leaf's tensors occupy."""
    return sum(part.numel() * part.element_size() for part in leaf.tensors)
