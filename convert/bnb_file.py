"""Weights that bitsandbytes stored in 4 bits: found among a checkpoint's tensors, read, laid out.

A weight `w` of n values lies in `w` (uint8 [ceil(n/2), 1], first code in the high nibble),
`w.absmax`, `w.quant_map` (the 16 levels), `w.quant_state.bitsandbytes__nf4` (JSON in uint8; or
`__fp4`) and,
double-quantized, `w.nested_absmax` and `w.nested_quant_map` (bitsandbytes' `QuantState.as_dict`).
These are the parts of our NF4 leaf, which takes them as they are.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, ConfigError
from ..kernels import codebook
from ..kernels.codebook import GROUP
from ..kernels.nf4 import BLOCKS, block_absmax
from ..quant import nf4
from ..quant.nf4 import NF4
from .encoded import Encoded
from .gguf_file import GGUFTensor, read_tensor
from .json_file import parse_json
from .shards import Checkpoint, TensorInfo, read

_PART = re.compile(
    r"(.+)\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__\w+)"
)
_KINDS = ("nf4", "fp4")
_STATE = "quant_state.bitsandbytes__"
_PLAIN = {"absmax", "quant_map"}
_NESTED = {"nested_absmax", "nested_quant_map"}
_FIELDS = {"quant_type", "blocksize", "dtype", "shape"}
_NESTED_FIELDS = {"nested_blocksize", "nested_dtype", "nested_offset"}
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# The JSON is some 170 bytes long.
_MAX_STATE_BYTES = 4096
_MAX_DIMS = 8


@dataclass(frozen=True)
class Packed:
    """One weight in 4 bits: `shape` and `dtype` are those it dequantizes to, `nbytes` all parts."""

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    block: int
    codes: TensorInfo
    absmax: TensorInfo
    absmax_scale: TensorInfo | None
    absmax_offset: float | None
    nbytes: int
    kind: str = "nf4"


Entry = TensorInfo | Packed


def check_config(stored: Any, file: Path) -> None:
    """Raise ConfigError for a `quantization_config` other than bitsandbytes' 4 bits."""
    method = stored
    if isinstance(stored, dict):
        four = stored.get("load_in_4bit", stored.get("_load_in_4bit"))
        eight = stored.get("load_in_8bit", stored.get("_load_in_8bit"))
        method = stored.get("quant_method", "bitsandbytes" if four or eight else "unknown")
        if method == "bitsandbytes" and four is True and not eight:
            kind = stored.get("bnb_4bit_quant_type", "nf4")
            storage = stored.get("bnb_4bit_quant_storage", "uint8")
            if kind in _KINDS and storage in ("uint8", "torch.uint8"):
                return
            method = f"bitsandbytes 4-bit, {kind!s:.20} in {storage!s:.20}"
    raise ConfigError(
        f"the checkpoint is stored quantized ({method!s:.60}), which is not read; "
        "bitsandbytes' 4 and 8 bits, fp8, GPTQ, AWQ, AutoRound, compressed-tensors, MXFP4 and "
        "NVFP4 are. Load the 16-bit original, which purelm quantizes while loading",
        file=file,
    )


def entries(checkpoint: Checkpoint) -> list[Entry]:
    """The weights of a checkpoint in file order, the parts of each 4-bit one taken together.

    Reads the small parts, and raises CheckpointError for a part that is missing, has another
    length, dtype or level than bitsandbytes writes, or is no strict JSON.
    """
    parts: dict[str, dict[str, TensorInfo]] = {}
    for name, info in checkpoint.tensors.items():
        if found := _PART.fullmatch(name):
            parts.setdefault(found.group(1), {})[found.group(2)] = info
    made: list[Entry] = []
    for info in checkpoint.in_file_order():
        if info.name in parts:
            made.append(_packed(info, parts.pop(info.name)))
        elif not _PART.fullmatch(info.name):
            made.append(info)
    if parts:
        name, alone = next(iter(parts.items()))
        raise CheckpointError(
            f"found {', '.join(sorted(alone))[:200]} of a 4-bit weight that is not there",
            file=next(iter(alone.values())).file,
            tensor=name[:200],
        )
    return made


def _packed(codes: TensorInfo, parts: Mapping[str, TensorInfo]) -> Packed:
    def wrong(message: str, info: TensorInfo = codes) -> CheckpointError:
        return CheckpointError(message, file=info.file, tensor=info.name[:200])

    double = "nested_absmax" in parts or "nested_quant_map" in parts
    kind = "fp4" if f"{_STATE}fp4" in parts else "nf4"
    needed = _PLAIN | (_NESTED if double else set()) | {_STATE + kind}
    if parts.keys() != needed:
        raise wrong(
            f"a 4-bit {kind.upper()} weight is stored with {', '.join(sorted(needed))}; "
            f"found {', '.join(sorted(parts))[:300]}"
        )
    state = parts[_STATE + kind]
    if state.dtype != torch.uint8 or len(state.shape) != 1 or state.nbytes > _MAX_STATE_BYTES:
        raise wrong(
            f"expected uint8 with at most {_MAX_STATE_BYTES} bytes, found {state.dtype} "
            f"{list(state.shape)}",
            state,
        )
    try:
        fields = parse_json(read(state).numpy().tobytes(), max_depth=2)
    except ValueError as problem:
        raise wrong(f"not valid JSON: {problem}", state) from None
    expected = _FIELDS | (_NESTED_FIELDS if double else set())
    if not isinstance(fields, dict) or fields.keys() != expected:
        raise wrong(f"expected an object of {', '.join(sorted(expected))}", state)

    def one_of(name: str, choices: Iterable[Any]) -> Any:
        value = fields[name]
        known = list(choices)
        # True equals 1 and 64.0 equals 64: neither is what is meant.
        if not any(type(value) is type(choice) and value == choice for choice in known):
            raise wrong(
                f"{name} is {value!r:.100}, expected {', '.join(map(str, known))[:100]}", state
            )
        return value

    one_of("quant_type", [kind])
    block = one_of("blocksize", BLOCKS)
    dtype = _DTYPES[one_of("dtype", _DTYPES)]
    shape, offset = fields["shape"], None
    if (
        not isinstance(shape, list)
        or not 0 < len(shape) <= _MAX_DIMS
        or not all(type(n) is int and 0 < n < 2**40 for n in shape)
    ):
        raise wrong(f"shape is {shape!r:.100}, expected a list of positive integers", state)
    if double:
        one_of("nested_blocksize", [GROUP])
        one_of("nested_dtype", ["float32"])
        offset = fields["nested_offset"]
        if not isinstance(offset, float | int) or isinstance(offset, bool) or abs(offset) > 3e38:
            raise wrong(f"nested_offset is {offset!r:.100}, expected a number", state)
    count = math.prod(shape)
    blocks = -(-count // block)
    lengths = {
        "": (codes, torch.uint8, (-(-count // 2), 1)),
        "absmax": (parts["absmax"], torch.uint8 if double else torch.float32, (blocks,)),
        "quant_map": (parts["quant_map"], torch.float32, (16,)),
    }
    if double:
        groups = -(-blocks // GROUP)
        lengths["nested_absmax"] = (parts["nested_absmax"], torch.float32, (groups,))
        lengths["nested_quant_map"] = (parts["nested_quant_map"], torch.float32, (256,))
    for info, needs, size in lengths.values():
        if info.dtype != needs or info.shape != size:
            raise wrong(
                f"found {info.dtype} {list(info.shape)}; a weight of shape {shape} in blocks of "
                f"{block} needs {needs} {list(size)}",
                info,
            )
    for name, levels in (
        ("quant_map", torch.tensor(codebook.LEVELS[kind])),
        ("nested_quant_map", codebook.dynamic_map()),
    ):
        if name in parts and not torch.equal(read(parts[name]), levels):
            raise wrong("the levels are not those of bitsandbytes' format", parts[name])
    return Packed(
        name=codes.name,
        file=codes.file,
        shape=tuple(shape),
        dtype=dtype,
        block=block,
        codes=codes,
        absmax=parts["absmax"],
        absmax_scale=parts["nested_absmax"] if double else None,
        absmax_offset=None if offset is None else float(offset),
        nbytes=codes.nbytes + sum(info.nbytes for info in parts.values()),
        kind=kind,
    )


def read_leaf(
    packed: Packed, dtype: torch.dtype, reader: Callable[[TensorInfo], torch.Tensor] = read
) -> NF4:
    """The weight as our leaf, its bytes untouched, on the device that `reader` reads to.

    Raises CheckpointError for block maxima that are NaN, infinite or too large for `dtype`.
    """
    codes, absmax = reader(packed.codes).view(-1), reader(packed.absmax)
    scale = offset = None
    if packed.absmax_scale is not None:
        scale = reader(packed.absmax_scale)
        offset = torch.tensor(packed.absmax_offset, dtype=torch.float32, device=absmax.device)
    most = block_absmax(absmax, scale, offset).abs()
    bad = int((~(most <= torch.finfo(dtype).max)).sum())
    if bad:
        raise CheckpointError(
            f"{bad} of {most.numel()} block maxima are NaN, infinite or too large for {dtype}; "
            "repair the checkpoint",
            tensor=packed.absmax.name,
            file=packed.absmax.file,
        )
    return NF4(
        codes, absmax, scale, offset, torch.Size(packed.shape), dtype, packed.block, packed.kind
    )


def read_dense(entry: Entry) -> torch.Tensor:
    """A weight on the CPU in its own dtype, dequantized if need be."""
    if isinstance(entry, Packed):
        return nf4.dequantize(read_leaf(entry, entry.dtype))
    if isinstance(entry, Encoded):
        parts = [read(part) for part in entry.parts]
        if not entry.by_matrix:
            return entry.decode(*parts).to(entry.dtype)
        made = torch.empty(entry.shape, dtype=entry.dtype)
        for i in range(len(made)):
            made[i] = entry.decode(*(part[i : i + 1] for part in parts))[0]
        return made
    return read_tensor(entry) if isinstance(entry, GGUFTensor) else read(entry)


def layout(name: str, leaf: NF4) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    """Name, dtype and shape of each part that `parts` makes of a weight like `leaf`."""
    blocks = -(-leaf.numel() // leaf.block)
    double = leaf.absmax_scale is not None
    made: list[tuple[str, torch.dtype, tuple[int, ...]]] = [
        (name, torch.uint8, (-(-leaf.numel() // 2), 1)),
        (f"{name}.absmax", torch.uint8 if double else torch.float32, (blocks,)),
        (f"{name}.quant_map", torch.float32, (16,)),
        (f"{name}.{_STATE}{leaf.kind}", torch.uint8, (len(_state(leaf, 0.0)),)),
    ]
    if double:
        made.append((f"{name}.nested_absmax", torch.float32, (-(-blocks // GROUP),)))
        made.append((f"{name}.nested_quant_map", torch.float32, (256,)))
    return made


def parts(name: str, leaf: NF4) -> dict[str, torch.Tensor]:
    """The tensors, on the CPU, that bitsandbytes stores `leaf` in under the name `name`."""
    offset = None if leaf.absmax_offset is None else leaf.absmax_offset.item()
    made = {
        name: leaf.packed.view(-1, 1),
        f"{name}.absmax": leaf.absmax,
        f"{name}.quant_map": torch.tensor(codebook.LEVELS[leaf.kind]),
        f"{name}.{_STATE}{leaf.kind}": torch.frombuffer(_state(leaf, offset), dtype=torch.uint8),
    }
    if leaf.absmax_scale is not None:
        made[f"{name}.nested_absmax"] = leaf.absmax_scale
        made[f"{name}.nested_quant_map"] = codebook.dynamic_map()
    return {part: tensor.detach().cpu() for part, tensor in made.items()}


def _state(leaf: NF4, offset: float | None) -> bytearray:
    """The quant_state, as long for one offset as for any other: a header tells it in advance."""
    fields: dict[str, Any] = {
        "quant_type": leaf.kind,
        "blocksize": leaf.block,
        "dtype": str(leaf.dtype).removeprefix("torch."),
        "shape": list(leaf.shape),
    }
    length = len(json.dumps(fields))
    if leaf.absmax_scale is not None:
        nested = {"nested_blocksize": GROUP, "nested_dtype": "float32", "nested_offset": offset}
        fields |= nested
        # 24 characters are the longest float64.
        length = len(json.dumps({**fields, "nested_offset": 0})) + 24
    return bytearray(json.dumps(fields).ljust(length).encode())


def config_fields(leaves: Iterable[NF4], skipped: Iterable[str]) -> dict[str, Any]:
    """The `quantization_config` of a model with these weights, `skipped` modules in 16 bits."""
    leaves = list(leaves)
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": leaves[0].kind,
        "bnb_4bit_use_double_quant": any(leaf.absmax_scale is not None for leaf in leaves),
        "bnb_4bit_compute_dtype": str(leaves[0].dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": sorted(skipped),
        "llm_int8_threshold": 6.0,
    }
