"""Weights in GPTQ's format (AutoGPTQ, GPTQModel, AutoRound), read by dequantizing.

A weight [out, in] lies in `qweight` int32 [in * bits / 32, out], fields of `bits` along the inputs;
input i belongs to the group `g_idx[i]`, or where no module has that to group i // group_size, which
has a scale and a zero point for each output: `scales` [groups, out] and `qzeros` int32 [groups, out
* bits / 32]. A value is (field - zero) * scale. The format "gptq" stores zero - 1, "gptq_v2" the
zero itself. Modules may differ in their bits (GPTQModel's `dynamic`); their shapes tell.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError
from .encoded import SCALES, Format, Found, encoded, expect, siblings, unpacked, wrong
from .safetensors_file import TensorInfo

_BITS = (2, 3, 4, 8)
_ZERO_BELOW = {"gptq": 1, "gptq_v2": 0}
# AutoRound's name of the layout.
_ROUND = "auto_round:auto_gptq"


def _is_of(stored: Mapping[str, Any], file: Path) -> bool:
    is_round = stored.get("quant_method") == "auto-round" and stored.get("packing_format") == _ROUND
    if stored.get("quant_method") != "gptq" and not is_round:
        return False
    bits, layout = stored.get("bits"), stored.get("checkpoint_format", "gptq")
    known = isinstance(layout, str) and layout in _ZERO_BELOW
    if stored.get("is_marlin_format"):
        known, layout = False, "marlin"
    if type(bits) is not int or bits not in _BITS or not known:
        raise ConfigError(
            f"GPTQ weights have {bits!r:.20} bits in format {layout!r:.40}; read are 2, 3, 4 and 8 "
            "bits in 'gptq' and 'gptq_v2'",
            file=file,
        )
    size = stored.get("group_size", -1)
    if type(size) is not int or size < -1 or size == 0:
        raise ConfigError(f"group_size is {size!r:.40}, expected a number or -1", file=file)
    return True


def _find(tensors: Mapping[str, TensorInfo], stored: Mapping[str, Any]) -> Found:
    made = []
    below = _ZERO_BELOW[stored.get("checkpoint_format", "gptq")]
    has_index = stored.get("desc_act") or any(name.endswith(".g_idx") for name in tensors)
    others = ["qzeros", "scales", *(["g_idx"] if has_index else [])]
    for module, parts in siblings(tensors, "qweight", others):
        words, zeros, scales, *index = parts
        groups = index[0] if index else None
        if len(words.shape) != 2 or len(scales.shape) != 2:
            raise wrong(words, f"found shape {list(words.shape)}, expected two dimensions")
        rows = words.shape[1]
        known = groups.shape[0] if groups is not None and len(groups.shape) == 1 else None
        # Where modules differ, the config says so by patterns of names; their shapes say it too.
        widths = _BITS if stored.get("dynamic") or stored.get("extra_config") else ()
        bits = _bits(words, zeros, known, (stored["bits"], *widths))
        columns = words.shape[0] * 32 // bits
        if 32 % bits and (words.shape[0] % bits or zeros.shape[-1:] and zeros.shape[-1] % bits):
            raise wrong(words, f"{bits} bits are packed 32 in {bits} words, of which some lack")
        expect(words, (columns * bits // 32, rows), torch.int32)
        expect(scales, (scales.shape[0], rows), *SCALES)
        expect(zeros, (scales.shape[0], -(-rows * bits // 32)), torch.int32)
        size = columns
        if groups is not None:
            expect(groups, (columns,), torch.int32, torch.int64)
        else:
            size = stored.get("group_size", -1)
            size = columns if size == -1 else size
            if scales.shape[0] != -(-columns // size):
                raise wrong(
                    scales,
                    f"{columns} inputs in groups of {size} do not make {scales.shape[0]} groups",
                )
        decode = partial(_decoded, place=groups, bits=bits, below=below, size=size)
        made.append(encoded(f"{module}.weight", (rows, columns), scales.dtype, parts, decode))
    return made, set()


def _bits(
    words: TensorInfo, zeros: TensorInfo, columns: int | None, widths: tuple[int, ...]
) -> int:
    """The first of `widths` that the shapes of a module's parts fit; the first if none does."""
    for bits in widths:
        fits = columns is None or words.shape[0] * 32 == columns * bits
        if fits and zeros.shape[-1:] == (-(-words.shape[1] * bits // 32),):
            return bits
    return widths[0]


def _decoded(
    words: torch.Tensor,
    zeros: torch.Tensor,
    scales: torch.Tensor,
    groups: torch.Tensor | None = None,
    *,
    place: TensorInfo | None,
    bits: int,
    below: int,
    size: int,
) -> torch.Tensor:
    count = len(scales)
    if groups is None:
        columns = words.shape[0] * 32 // bits
        groups = torch.arange(columns, device=words.device) // size
    elif not 0 <= int(groups.min()) <= int(groups.max()) < count:
        assert place is not None
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
