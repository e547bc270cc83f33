"""Weights in MXFP4 (OCP Microscaling Formats v1.0), as GPT-OSS stores its experts, dequantized.

A stack of matrices `w` [x, in, out] lies transposed in `w_blocks` uint8 [x, out, in / 32, 16], two
e2m1 values a byte with the lower nibble first, and `w_scales` uint8 [x, out, in / 32], the exponent
(e8m0, bias 127) of each 32 values.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .encoded import Format, Found, encoded, expect, wrong
from .safetensors_file import TensorInfo

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# The values of e2m1 by their four bits.
LEVELS = (*_MAGNITUDES, *(-m for m in _MAGNITUDES))
_BLOCK = 32


def _is_of(stored: Mapping[str, Any], file: Path) -> bool:
    return stored.get("quant_method") == "mxfp4"


def _find(tensors: Mapping[str, TensorInfo], stored: Mapping[str, Any]) -> Found:
    made = []
    for name, blocks in tensors.items():
        if not name.endswith("_blocks"):
            continue
        whole = name.removesuffix("_blocks")
        scales = tensors.get(f"{whole}_scales")
        if scales is None or len(blocks.shape) != 4:
            raise wrong(blocks, "MXFP4 blocks need four dimensions and scales beside them")
        count, rows, groups, _ = blocks.shape
        expect(blocks, (count, rows, groups, _BLOCK // 2), torch.uint8)
        expect(scales, (count, rows, groups), torch.uint8)
        shape = (count, groups * _BLOCK, rows)
        parts = [blocks, scales]
        made.append(encoded(whole, shape, torch.bfloat16, parts, dequantize, by_matrix=True))
    return made, set()


def dequantize(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The stack [x, in, out] in fp32; an exponent of 255 stands for NaN."""
    levels = torch.tensor(LEVELS, device=blocks.device)
    # In fp32 2^-127 is a denormal, and exact.
    step = torch.pow(2.0, scales.to(torch.float64) - 127.0).float()
    step = step.masked_fill(scales == 255, torch.nan)
    out = torch.empty(*scales.shape, _BLOCK, device=blocks.device)
    out[..., 0::2] = levels[(blocks & 15).long()] * step[..., None]
    out[..., 1::2] = levels[(blocks >> 4).long()] * step[..., None]
    return out.flatten(2).transpose(1, 2).contiguous()


MXFP4 = Format("MXFP4", ("_blocks",), _is_of, _find)
