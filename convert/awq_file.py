"""Weights in AWQ's "gemm" format (AutoAWQ, AutoRound), read by dequantizing.

A weight [out, in] lies in `qweight` int32 [in, out / 8], eight 4-bit fields along the outputs, of
which field i is output ORDER[i] of its eight. Groups of inputs have a scale and a zero point for
each output: `scales` [groups, out] and `qzeros` int32 [groups, out / 8] in the same order. A value
is (field - zero) * scale.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError
from .encoded import SCALES, Format, Found, encoded, expect, siblings, unpacked, wrong
from .safetensors_file import TensorInfo

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
# AutoRound's name of the layout.
_ROUND = "auto_round:auto_awq"
_PLACE = [ORDER.index(output) for output in range(8)]


def _is_of(stored: Mapping[str, Any], file: Path) -> bool:
    of_round = stored.get("packing_format") == _ROUND
    if stored.get("quant_method") != ("auto-round" if of_round else "awq"):
        return False
    bits = stored.get("bits", stored.get("w_bit", 4))
    layout = "gemm" if of_round else stored.get("version", stored.get("format", "gemm"))
    four = type(bits) is int and bits == 4
    if not four or str(layout).lower() != "gemm" or stored.get("zero_point", True) is not True:
        raise ConfigError(
            f"AWQ weights have {bits!r:.20} bits in version {layout!r:.40} with zero_point "
            f"{stored.get('zero_point', True)!r:.20}; read is version 'gemm' of 4 bits with zero "
            "points",
            file=file,
        )
    return True


def _find(tensors: Mapping[str, TensorInfo], stored: Mapping[str, Any]) -> Found:
    made = []
    for module, parts in siblings(tensors, "qweight", ["qzeros", "scales"]):
        words, zeros, scales = parts
        if len(words.shape) != 2 or len(scales.shape) != 2:
            raise wrong(words, f"found shape {list(words.shape)}, expected two dimensions")
        columns, rows, count = words.shape[0], words.shape[1] * 8, scales.shape[0]
        if not count or columns % count:
            raise wrong(scales, f"{columns} inputs do not make {count} groups")
        expect(words, (columns, rows // 8), torch.int32)
        expect(scales, (count, rows), *SCALES)
        expect(zeros, (count, rows // 8), torch.int32)
        made.append(encoded(f"{module}.weight", (rows, columns), scales.dtype, parts, dequantize))
    return made, set()


def dequantize(words: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The weight [out, in] in fp32."""
    fields, zero = _outputs(words), _outputs(zeros)
    each = len(fields) // len(scales)
    grouped = fields.view(len(scales), each, -1).float() - zero[:, None].float()
    return (grouped * scales[:, None].float()).flatten(0, 1).T.contiguous()


def _outputs(words: torch.Tensor) -> torch.Tensor:
    """int32 [n, out / 8] -> uint8 [n, out], in the order of the outputs."""
    return unpacked(words, 4)[:, _PLACE].transpose(1, 2).flatten(1)


AWQ = Format("AWQ", (".qweight",), _is_of, _find)
