"""Weights in GPTQ's format (AutoGPTQ, GPTQModel), read by dequantizing.

A weight [out, in] lies in `qweight` int32 [in * bits / 32, out], fields of `bits` along the inputs;
input i belongs to the group `g_idx[i]`, which has a scale and a zero point for each output:
`scales` [groups, out] and `qzeros` int32 [groups, out * bits / 32]. A value is (field - zero) *
scale. The format "gptq" stores zero - 1, "gptq_v2" the zero itself.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError
from .encoded import SCALES, Format, Found, encoded, expect, siblings, unpacked, wrong
from .safetensors_file import TensorInfo

_BITS = (2, 4, 8)
_ZERO_BELOW = {"gptq": 1, "gptq_v2": 0}


def _is_of(stored: Mapping[str, Any], file: Path) -> bool:
    if stored.get("quant_method") != "gptq":
        return False
    bits, layout = stored.get("bits"), stored.get("checkpoint_format", "gptq")
    known = isinstance(layout, str) and layout in _ZERO_BELOW
    if type(bits) is not int or bits not in _BITS or not known:
        raise ConfigError(
            f"GPTQ weights have {bits!r:.20} bits in format {layout!r:.40}; read are 2, 4 and 8 "
            "bits in 'gptq' and 'gptq_v2'",
            file=file,
        )
    return True


def _find(tensors: Mapping[str, TensorInfo], stored: Mapping[str, Any]) -> Found:
    bits, made = stored["bits"], []
    below = _ZERO_BELOW[stored.get("checkpoint_format", "gptq")]
    per_word = 32 // bits
    for module, parts in siblings(tensors, "qweight", ["qzeros", "scales", "g_idx"]):
        words, zeros, scales, groups = parts
        if len(words.shape) != 2 or len(scales.shape) != 2:
            raise wrong(words, f"found shape {list(words.shape)}, expected two dimensions")
        columns, rows = words.shape[0] * per_word, words.shape[1]
        expect(words, (columns // per_word, rows), torch.int32)
        expect(scales, (scales.shape[0], rows), *SCALES)
        expect(zeros, (scales.shape[0], -(-rows // per_word)), torch.int32)
        expect(groups, (columns,), torch.int32, torch.int64)
        decode = partial(_decoded, place=groups, bits=bits, below=below)
        made.append(encoded(f"{module}.weight", (rows, columns), scales.dtype, parts, decode))
    return made, set()


def _decoded(
    words: torch.Tensor,
    zeros: torch.Tensor,
    scales: torch.Tensor,
    groups: torch.Tensor,
    *,
    place: TensorInfo,
    bits: int,
    below: int,
) -> torch.Tensor:
    count = len(scales)
    if not 0 <= int(groups.min()) <= int(groups.max()) < count:
        raise wrong(place, f"it names groups outside the {count} that there are")
    return dequantize(words, zeros, scales, groups, bits=bits, below=below)


def dequantize(
    words: torch.Tensor,
    zeros: torch.Tensor,
    scales: torch.Tensor,
    groups: torch.Tensor,
    *,
    bits: int,
    below: int,
) -> torch.Tensor:
    """The weight [out, in] in fp32; `below` is what the stored zero points lack."""
    rows = scales.shape[1]
    zero = unpacked(zeros.T.contiguous(), bits).flatten(0, 1)[:rows].T.float() + below
    fields, groups = unpacked(words, bits).flatten(0, 1), groups.long()
    return ((fields - zero[groups]) * scales.float()[groups]).T.contiguous()


GPTQ = Format("GPTQ", (".qweight",), _is_of, _find)
