"""Weights in NVFP4 (NVIDIA's ModelOpt, llm-compressor) and llm-compressor's MXFP4, dequantized.

A weight [out, in] lies in uint8 [out, in / 2], two e2m1 values a byte with the lower nibble first.
NVFP4 has a scale e4m3 for each 16 inputs, [out, in / 16], and one in fp32 for all: ModelOpt
multiplies by both (`weight`, `weight_scale`, `weight_scale_2`), llm-compressor divides by the one
for all (`weight_packed`, `weight_scale`, `weight_global_scale`). Its MXFP4 has an exponent (e8m0,
bias 127) for each 32 inputs, uint8, alone.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .encoded import SCALES, Encoded, Format, Found, encoded, expect, wrong
from .fp8_file import BESIDE
from .mxfp4_file import LEVELS
from .safetensors_file import TensorInfo

NV_GROUP, MX_GROUP = 16, 32


def _is_of(stored: Mapping[str, Any], file: Path) -> bool:
    return stored.get("quant_method") == "modelopt" and stored.get("quant_algo") == "NVFP4"


def _find(tensors: Mapping[str, TensorInfo], stored: Mapping[str, Any]) -> Found:
    made = []
    for name, info in tensors.items():
        if name.endswith(".weight") and info.dtype == torch.uint8:
            whole = tensors.get(f"{name}_scale_2")
            if whole is None:
                raise wrong(info, f"{name}_scale_2 missing, the scale of the whole weight")
            made.append(weight(name, info, tensors.get(f"{name}_scale"), whole, divides=False))
    return made, {name for name in tensors if name.endswith(BESIDE)}


def weight(
    name: str,
    codes: TensorInfo,
    scale: TensorInfo | None,
    whole: TensorInfo | None,
    *,
    divides: bool,
) -> Encoded:
    """The weight `name` of its parts; without `whole`, a scale of all, it is MXFP4.

    divides: by that scale. Raises CheckpointError for parts that do not fit.
    """
    if len(codes.shape) != 2 or scale is None:
        raise wrong(codes, "4-bit floats need two dimensions and a weight_scale")
    rows, columns = codes.shape[0], 2 * codes.shape[1]
    group = MX_GROUP if whole is None else NV_GROUP
    if columns % group:
        raise wrong(codes, f"{columns} inputs are no whole number of groups of {group}")
    kinds = (torch.uint8, torch.float8_e8m0fnu) if whole is None else (torch.float8_e4m3fn,)
    expect(scale, (rows, columns // group), *kinds)
    parts = [codes, scale]
    if whole is not None:
        expect(whole, () if whole.shape == () else (1,), *SCALES)
        parts.append(whole)
    decode = partial(dequantize, divides=divides)
    return encoded(name, (rows, columns), torch.bfloat16, parts, decode)


def dequantize(
    codes: torch.Tensor,
    scale: torch.Tensor,
    whole: torch.Tensor | None = None,
    *,
    divides: bool = False,
) -> torch.Tensor:
    """codes [out, in / 2] times scales [out, groups] -> fp32 [out, in].

    An exponent of 255 is NaN.
    """
    if whole is None:
        exponent = scale.view(torch.uint8)
        step = torch.pow(2.0, exponent.double() - 127.0).float()
        step = step.masked_fill(exponent == 255, torch.nan)
    elif divides:
        step = scale.float() / whole.float()
    else:
        step = scale.float() * whole.float()
    levels = torch.tensor(LEVELS, device=codes.device)
    values = torch.stack([levels[(codes & 15).int()], levels[(codes >> 4).int()]], -1)
    grouped = values.view(*step.shape, -1)
    return (grouped * step[..., None]).view(len(codes), -1)


NVFP4 = Format("NVFP4", ("_scale_2",), _is_of, _find)
