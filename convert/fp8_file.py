"""Weights stored as fp8 (e4m3) with scales, as their publishers write them, dequantized or kept.

A weight `w` [out, in] has one scale beside it, `w_scale_inv` or `w_scale`: one number for each
block ([ceil(out / 128), ceil(in / 128)]), for each row, or for all. It multiplies the stored
values, whatever its name says. Who writes what: transformers' fine-grained fp8 (DeepSeek, Qwen)
blocks, or one number (Ministral); compressed-tensors' "float-quantized" rows, blocks or one number;
FBGEMM rows; AutoFP8 and NVIDIA's ModelOpt one number. Scales of inputs and of the cache belong to
computing in fp8 and are left.
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
# Scales of inputs, outputs and the cache.
BESIDE = tuple(
    ".input_scale .input_activation_scale .activation_scale .output_scale .k_scale .v_scale "
    ".q_scale .input_scale_ub".split()
)
_SCALES = (*SCALES, torch.float8_e8m0fnu)


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
    algorithm = stored.get("quant_algo") if method == "modelopt" else None
    if method == "modelopt" and algorithm not in ("FP8", "NVFP4"):
        raise ConfigError(
            f"ModelOpt's weights are {algorithm!r:.40}, read are 'FP8' and 'NVFP4'; load the "
            "16-bit original",
            file=file,
        )
    if method == "fbgemm_fp8" or algorithm == "FP8":
        return True
    return method == "compressed-tensors" and stored.get("format") == "float-quantized"


def find(tensors: Mapping[str, TensorInfo], stored: Mapping[str, Any]) -> Found:
    """The fp8 weights among `tensors`, and what belongs to them beside."""
    made: list[Encoded] = []
    for name, info in tensors.items():
        # 4-bit floats have scales in fp8.
        if info.dtype != torch.float8_e4m3fn or name.endswith("_scale"):
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
        allowed = [blocks, (rows, 1), (rows,), (1,), (), (1, 1)]
        if scale.shape not in allowed or scale.dtype not in _SCALES:
            raise wrong(
                scale,
                f"found scales {scale.dtype} {list(scale.shape)} of a weight {list(info.shape)}, "
                f"expected float {' or '.join(str(list(shape)) for shape in allowed)}",
            )
        made.append(
            encoded(name, info.shape, torch.bfloat16, [info, scale], dequantize,
                    kept_as=("fp8", "fp8_block"), leaf=partial(_leaf, scale_info=scale))
        )  # fmt: skip
    return made, {name for name in tensors if name.endswith(BESIDE)}


def _leaf(
    codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, *, scale_info: TensorInfo
) -> Fp8:
    """The stored codes [out, in] and scales as they are; one scale alone becomes that of each row.

    `dtype` is what it dequantizes to. Raises CheckpointError for a code that is NaN or a scale that
    is not finite.
    """
    rows, scale = codes.shape[0], scale.float()
    if not _of_blocks(codes, scale):
        scale = scale.reshape(-1).expand(rows).contiguous()
    finite = scale.isfinite().all() and not codes.to(torch.bfloat16).isnan().any()
    if not bool(finite):
        raise wrong(
            scale_info,
            "codes or scales of an fp8 weight are NaN or infinite; repair the checkpoint",
        )
    return Fp8(codes, scale, dtype)


def _of_blocks(codes: torch.Tensor, scale: torch.Tensor) -> bool:
    """Whether the scales are of blocks."""
    rows, columns = codes.shape
    return scale.shape == (-(-rows // BLOCK), -(-columns // BLOCK))


def dequantize(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """codes [out, in] e4m3 times scales [out / 128, in / 128], [out, 1], [out] or one -> fp32."""
    out, scale = codes.float(), scale.float()
    if _of_blocks(codes, scale):
        for index, row in enumerate(scale):
            wide = row.repeat_interleave(BLOCK)[: out.shape[1]]
            out[index * BLOCK : (index + 1) * BLOCK] *= wide
        return out
    return out.mul_(scale.view(-1, 1))


FP8 = Format("fp8", ("_scale_inv", "_scale"), _is_of, find)
