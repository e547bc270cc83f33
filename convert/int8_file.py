"""Weights that bitsandbytes stored in 8 bits a row (LLM.int8), read as they are or dequantized.

`w` int8 [out, in] has beside it `SCB` fp32 [out], each row's largest magnitude, and `weight_format`
uint8 [], which is 0 for rows; a value is code * SCB / 127, as in our Int8 leaf.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError
from ..quant import int8
from ..quant.int8 import Int8
from .encoded import Encoded, Format, Found, encoded, expect, wrong
from .safetensors_file import TensorInfo
from .shards import read


def _is_of(stored: Mapping[str, Any], file: Path) -> bool:
    eight = stored.get("load_in_8bit", stored.get("_load_in_8bit")) is True
    four = stored.get("load_in_4bit", stored.get("_load_in_4bit"))
    method = stored.get("quant_method", "bitsandbytes")
    if not eight or four or method != "bitsandbytes":
        return False
    threshold = _threshold(stored)
    if type(threshold) not in (int, float) or not 0 <= threshold < 1e30:
        raise ConfigError(
            f"llm_int8_threshold is {threshold!r:.60}, expected a number that is not negative",
            file=file,
        )
    return True


def _threshold(stored: Mapping[str, Any]) -> Any:
    return stored.get("llm_int8_threshold", 6.0)


def _find(tensors: Mapping[str, TensorInfo], stored: Mapping[str, Any]) -> Found:
    threshold = float(_threshold(stored))
    made: list[Encoded] = []
    layouts: set[str] = set()
    for name, info in tensors.items():
        module, _, part = name.rpartition(".")
        if part != "weight" or info.dtype != torch.int8:
            continue
        scale, layout = tensors.get(f"{module}.SCB"), tensors.get(f"{module}.weight_format")
        if scale is None or len(info.shape) != 2:
            raise wrong(info, "an int8 weight needs two dimensions and SCB, its rows' largest")
        expect(scale, info.shape[:1], torch.float32)
        if layout is not None:
            expect(layout, (), torch.uint8)
            if int(read(layout)):
                raise wrong(layout, "found a layout other than rows, which is not read")
            layouts.add(layout.name)
        leaf = partial(_leaf, threshold=threshold, info=info)
        made.append(
            encoded(name, info.shape, torch.bfloat16, [info, scale], _dequantize,
                    kept_as=("int8",), leaf=leaf)
        )  # fmt: skip
    return made, layouts


def _leaf(
    codes: torch.Tensor,
    scale: torch.Tensor,
    dtype: torch.dtype,
    *,
    threshold: float,
    info: TensorInfo,
) -> Int8:
    if not bool((scale.abs() <= torch.finfo(dtype).max).all()):
        raise wrong(
            info, f"SCB has values that are NaN, infinite or too large for {dtype}; repair it"
        )
    return Int8(codes, scale, dtype, threshold)


def _dequantize(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return int8.dequantize(Int8(codes, scale, torch.float32))


INT8 = Format("8 bits by bitsandbytes", (".SCB",), _is_of, _find)
