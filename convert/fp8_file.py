"""Weights stored as fp8 (e4m3) with scales, as Qwen3-FP8 and DeepSeek are, dequantized or kept.

A weight `w` [out, in] has beside it `w_scale_inv` (one scale for each 128x128 block, transformers'
`FineGrainedFP8Config`) or `w_scale` (one for each row, or one alone, compressed-tensors'
"float-quantized"). Either multiplies the stored values.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError
from ..quant.fp8 import Fp8
from .encoded import SCALES, Encoded, Format, Found, encoded, wrong
from .safetensors_file import TensorInfo

BLOCK = 128
# Scales of inputs, which are not quantized here.
_INPUTS = (".input_scale", ".input_activation_scale")


def _is_of(stored: Mapping[str, Any], file: Path) -> bool:
    method = stored.get("quant_method")
    if method == "fp8":
        block = stored.get("weight_block_size", [BLOCK, BLOCK])
        if block is not None and block != [BLOCK, BLOCK]:
            raise ConfigError(
                f"fp8 weights have scales for blocks of {block!r:.60}, read are {BLOCK} x {BLOCK}",
                file=file,
            )
        if stored.get("fmt", "e4m3") != "e4m3":
            raise ConfigError(
                f"fp8 weights are {stored['fmt']!r:.40}, expected 'e4m3'; load the 16-bit original",
                file=file,
            )
        return True
    return method == "compressed-tensors" and stored.get("format") == "float-quantized"


def _find(tensors: Mapping[str, TensorInfo], stored: Mapping[str, Any]) -> Found:
    made: list[Encoded] = []
    for name, info in tensors.items():
        if info.dtype != torch.float8_e4m3fn:
            continue
        found = [tensors[name + end] for end in ("_scale_inv", "_scale") if name + end in tensors]
        if len(found) != 1 or len(info.shape) != 2:
            raise wrong(
                info,
                f"an fp8 weight needs two dimensions and one of {name}_scale_inv and {name}_scale; "
                f"found shape {list(info.shape)} and {len(found)} of them",
            )
        scale, (rows, columns) = found[0], info.shape
        blocks = (-(-rows // BLOCK), -(-columns // BLOCK))
        allowed = (
            [blocks] if scale.name.endswith("_inv") else [(rows, 1), (rows,), (1,), (), (1, 1)]
        )
        if scale.shape not in allowed or scale.dtype not in SCALES:
            raise wrong(
                scale,
                f"found scales {scale.dtype} {list(scale.shape)} of a weight {list(info.shape)}, "
                f"expected float {' or '.join(str(list(shape)) for shape in allowed)}",
            )
        made.append(
            encoded(name, info.shape, torch.bfloat16, [info, scale], dequantize,
                    kept_as=("fp8", "fp8_block"), leaf=partial(_leaf, scale_info=scale))
        )  # fmt: skip
    return made, {name for name in tensors if name.endswith(_INPUTS)}


def _leaf(
    codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, *, scale_info: TensorInfo
) -> Fp8:
    """The stored codes [out, in] and scales as they are; one scale alone becomes that of each row.

    `dtype` is what it dequantizes to. Raises CheckpointError for a code that is NaN or a scale that
    is not finite.
    """
    rows, scale = codes.shape[0], scale.float()
    blocks = scale_info.name.endswith("_inv")
    scale = scale if blocks else scale.reshape(-1).expand(rows).contiguous()
    finite = scale.isfinite().all() and not codes.to(torch.bfloat16).isnan().any()
    if not bool(finite):
        raise wrong(
            scale_info,
            "codes or scales of an fp8 weight are NaN or infinite; repair the checkpoint",
        )
    return Fp8(codes, scale, dtype)


def dequantize(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """codes [out, in] e4m3 times scales [out / 128, in / 128], [out, 1] or one -> fp32."""
    out, scale = codes.float(), scale.float()
    rows, columns = out.shape
    if scale.shape == (-(-rows // BLOCK), -(-columns // BLOCK)) and scale.numel() > 1:
        for index, row in enumerate(scale):
            wide = row.repeat_interleave(BLOCK)[:columns]
            out[index * BLOCK : (index + 1) * BLOCK] *= wide
        return out
    return out.mul_(scale.view(-1, 1))


FP8 = Format("fp8", ("_scale_inv", "_scale"), _is_of, _find)
