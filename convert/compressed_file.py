"""Weights that llm-compressor stored (compressed-tensors) in few bits, read by dequantizing.

"pack-quantized": a weight [out, in] lies in `weight_packed` int32 [out, ceil(in * bits / 32)],
unsigned fields along the inputs, 2^(bits - 1) more than the numbers they stand for. `weight_scale`
is [out, groups], [out, 1] or [1]; `weight_zero_point`, where there is one, int32 [ceil(out * bits /
32), groups], packed alike along the outputs; `weight_shape` int64 [2]. `weight_g_idx` int32 [in]
tells which group an input belongs to where groups are no runs of them (negative: it does not).
"int-quantized" and "naive-quantized": `weight` int8 [out, in], scales alike, zero points int8 of
their shape, or fp8. A value is (number - zero point) * scale. "nvfp4-pack-quantized" and
"mxfp4-pack-quantized": 4-bit floats, fp4_file.py. "mixed-precision": any of these by module.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError
from . import fp4_file, fp8_file
from .encoded import SCALES, Encoded, Format, Found, encoded, expect, unpacked, wrong
from .safetensors_file import TensorInfo
from .shards import read

_BITS = (2, 4, 8)
_LAYOUTS = tuple(
    "pack-quantized int-quantized naive-quantized nvfp4-pack-quantized mxfp4-pack-quantized "
    "mixed-precision".split()
)
# What computing with quantized inputs needs beside the weights.
_BESIDE = (*fp8_file.BESIDE, ".input_zero_point", ".input_global_scale", ".output_zero_point")


def _is_of(stored: Mapping[str, Any], file: Path) -> bool:
    layout = stored.get("format")
    if stored.get("quant_method") != "compressed-tensors" or layout == "float-quantized":
        return False
    sparse = stored.get("sparsity_config")
    if isinstance(sparse, dict) and sparse.get("format", "dense") != "dense":
        layout = f"sparse {sparse['format']!r:.40}"
    if layout not in _LAYOUTS:
        raise ConfigError(
            f"compressed-tensors' weights are in the format {layout!r:.60}; read are "
            f"'float-quantized', {', '.join(map(repr, _LAYOUTS))}; load the 16-bit original",
            file=file,
        )
    return True


def _find(tensors: Mapping[str, TensorInfo], stored: Mapping[str, Any]) -> Found:
    made, beside = fp8_file.find(tensors, stored)
    for name, info in tensors.items():
        module, _, part = name.rpartition(".")
        if part == "weight_packed" and info.dtype == torch.uint8:
            scale, whole = (tensors.get(f"{module}.weight{e}") for e in ("_scale", "_global_scale"))
            made.append(fp4_file.weight(f"{module}.weight", info, scale, whole, divides=True))
        elif part == "weight_packed":
            one, further = _packed(tensors, module, info, _widths(stored))
            made.append(one)
            beside |= further
        elif part == "weight" and info.dtype == torch.int8:
            made.append(_whole(tensors, module, info))
    return made, beside | {name for name in tensors if name.endswith(_BESIDE)}


def _widths(stored: Mapping[str, Any]) -> list[int]:
    """The bits that the config's groups of modules have."""
    groups = stored.get("config_groups")
    weights = [
        group.get("weights") for group in (groups.values() if isinstance(groups, dict) else ())
        if isinstance(group, dict)
    ]  # fmt: skip
    found = [w.get("num_bits") for w in weights if isinstance(w, dict)]
    bits = [b for b in found if type(b) is int and b in _BITS]
    return sorted(set(bits or _BITS))


def _packed(
    tensors: Mapping[str, TensorInfo], module: str, words: TensorInfo, widths: list[int]
) -> tuple[Encoded, set[str]]:
    scale, shape = (
        _sibling(tensors, words, "weight_scale"),
        _sibling(tensors, words, "weight_shape"),
    )
    if shape.shape != (2,) or shape.dtype not in (torch.int64, torch.int32):
        raise wrong(shape, f"found {shape.dtype} {list(shape.shape)}, expected int64 [2]")
    rows, columns = (int(n) for n in read(shape))
    bits = next((b for b in widths if words.shape == (rows, -(-columns * b // 32))), None)
    if bits is None:
        raise wrong(
            words,
            f"found {list(words.shape)} words for a weight [{rows}, {columns}] of "
            f"{' or '.join(map(str, widths))} bits",
        )
    expect(words, words.shape, torch.int32)
    count = _groups(scale, rows, columns)
    parts, place = [words, scale], tensors.get(f"{module}.weight_g_idx")
    zero = tensors.get(f"{module}.weight_zero_point")
    if zero is not None:
        expect(zero, (-(-rows * bits // 32), count), torch.int32)
        parts.append(zero)
    if place is not None:
        expect(place, (columns,), torch.int32)
        parts.append(place)
    decode = partial(
        _decoded, columns=columns, bits=bits, has_zero=zero is not None, scale_info=scale
    )
    weight = encoded(f"{module}.weight", (rows, columns), scale.dtype, parts, decode)
    return weight, {shape.name}


def _whole(tensors: Mapping[str, TensorInfo], module: str, codes: TensorInfo) -> Encoded:
    scale = _sibling(tensors, codes, "weight_scale")
    if len(codes.shape) != 2:
        raise wrong(codes, f"found shape {list(codes.shape)}, expected two dimensions")
    _groups(scale, *codes.shape)
    parts, zero = [codes, scale], tensors.get(f"{module}.weight_zero_point")
    if zero is not None:
        expect(zero, scale.shape, torch.int8)
        parts.append(zero)
    return encoded(codes.name, codes.shape, scale.dtype, parts, _scaled)


def _sibling(tensors: Mapping[str, TensorInfo], info: TensorInfo, part: str) -> TensorInfo:
    found = tensors.get(f"{info.name.rpartition('.')[0]}.{part}")
    if found is None:
        raise wrong(info, f"{part} of the same module missing")
    return found


def _groups(scale: TensorInfo, rows: int, columns: int) -> int:
    """How many scales a row has."""
    one = scale.shape in ((), (1,), (rows,))
    count = 1 if one else scale.shape[-1]
    if rows < 1 or count < 1 or columns % count:
        raise wrong(scale, f"{columns} inputs do not make {count} groups")
    expect(scale, scale.shape if one else (rows, count), *SCALES)
    return count


def _decoded(
    words: torch.Tensor,
    scale: torch.Tensor,
    *more: torch.Tensor,
    columns: int,
    bits: int,
    has_zero: bool,
    scale_info: TensorInfo,
) -> torch.Tensor:
    numbers = _numbers(words, bits)[:, :columns]
    zero, groups = None, more[-1] if len(more) > has_zero else None
    if has_zero:
        zero = _numbers(more[0].T, bits)[:, : len(words)].T
    if groups is None or bool((groups < 0).any()):
        return _scaled(numbers, scale, zero)
    count = scale.shape[-1] if scale.ndim == 2 else 1
    if int(groups.max()) >= count:
        raise wrong(scale_info, f"there are {count} groups, and an input is of {int(groups.max())}")
    order = groups.long().argsort(stable=True)
    if not torch.equal(groups.long().bincount(minlength=count), _even(columns, count, groups)):
        raise wrong(scale_info, "the groups of inputs are of unequal sizes")
    made = _scaled(numbers[:, order], scale, zero)
    out = torch.empty_like(made)
    out[:, order] = made
    return out


def _even(columns: int, count: int, like: torch.Tensor) -> torch.Tensor:
    return torch.full((count,), columns // count, device=like.device)


def _numbers(words: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [n, m] -> the numbers that its rows stand for, fp32 [n, m * 32 / bits]."""
    return unpacked(words.T.contiguous(), bits).flatten(0, 1).T.float() - float(2 ** (bits - 1))


def _scaled(
    numbers: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None = None
) -> torch.Tensor:
    """numbers [out, in] less zero points, times scales, each of a run of inputs -> fp32."""
    scale = scale.float() if scale.ndim == 2 else scale.float().reshape(-1, 1)
    grouped = numbers.float().reshape(len(numbers), scale.shape[1], -1)
    if zero is not None:
        grouped = grouped - zero.float().reshape(*scale.shape)[..., None]
    return (grouped * scale[..., None]).flatten(1)


COMPRESSED = Format("compressed-tensors", ("weight_packed",), _is_of, _find)
