"""Writing one safetensors file with one tensor in memory at a time."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from io import FileIO
from pathlib import Path

import torch

from ..errors import SaveError
from .safetensors_file import DTYPES, MAX_HEADER_BYTES, MAX_TENSORS

Entry = tuple[str, torch.dtype, tuple[int, ...], Callable[[], torch.Tensor]]

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# The order in which the safetensors library lays tensors out: widest first, so that every tensor
# is aligned, then by this rank, then by name.
_RANK = {
    name: rank
    for rank, name in enumerate(
        "BOOL U8 I8 F8_E5M2 F8_E4M3 F8_E8M0 F8_E4M3FNUZ F8_E5M2FNUZ I16 U16 F16 BF16 I32 U32 F32 "
        "C64 F64 I64 U64".split()
    )
}


def entry(name: str, tensor: torch.Tensor) -> Entry:
    """The entry of a tensor that exists already."""
    return name, tensor.dtype, tuple(tensor.shape), lambda: tensor


def entry_bytes(entries: Iterable[Entry]) -> int:
    """The bytes that the tensors of `entries` take in a file, headers not counted."""
    return sum(_nbytes(dtype, shape) for _, dtype, shape, _ in entries)


def write_safetensors(
    path: str | os.PathLike[str],
    entries: Iterable[Entry],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write (name, dtype, shape, function that makes the tensor) entries as one safetensors file.

    Each function is called once, when its turn comes, in the order of the file, which is not that
    of `entries`. The bytes are those that `safetensors.torch.save_file` writes. Writes
    `path` in place: call it inside `atomic.folder` or `atomic.file`, which also turn the OSError of
    a full disk into a SaveError. Raises SaveError for repeated names, a dtype the format lacks and
    a tensor that is not as announced.
    """
    path = Path(path)
    ordered = sorted(entries, key=lambda e: (-_rank(e[1], e[0], path), e[0].encode()))
    header = _header(ordered, metadata, path)
    with open(path, "wb", buffering=0) as file:
        _write(file, memoryview(header))
        for name, dtype, shape, make in ordered:
            _write(file, _bytes(make(), name, dtype, shape, path))


def _header(ordered: list[Entry], metadata: Mapping[str, str] | None, path: Path) -> bytes:
    content: dict[str, object] = {}
    if metadata:
        content["__metadata__"] = dict(metadata)
    end = 0
    for name, dtype, shape, _ in ordered:
        if name in content or name == "__metadata__":
            raise SaveError(f"tensor name {name!r} cannot be used twice in one file [file {path}]")
        first, end = end, end + _nbytes(dtype, shape)
        content[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [first, end],
        }
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES or len(ordered) > MAX_TENSORS:
        raise SaveError(
            f"{len(ordered)} tensors with a header of {len(text)} bytes are more than one file "
            f"takes ({MAX_TENSORS} and {MAX_HEADER_BYTES}); write several shards [file {path}]"
        )
    return len(text).to_bytes(8, "little") + text


def _rank(dtype: torch.dtype, name: str, path: Path) -> int:
    if dtype not in _NAMES:
        raise SaveError(f"safetensors has no dtype for {dtype} [tensor {name!r}, file {path}]")
    return _RANK[_NAMES[dtype]]


def _nbytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * dtype.itemsize


def _bytes(
    tensor: torch.Tensor, name: str, dtype: torch.dtype, shape: tuple[int, ...], path: Path
) -> memoryview:
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise SaveError(
            f"expected {dtype} {list(shape)}, found {tensor.dtype} {list(tensor.shape)} "
            f"[tensor {name!r}, file {path}]"
        )
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _write(file: FileIO, data: memoryview) -> None:
    done = 0
    while done < len(data):
        # One write takes at most 2 GiB on Linux, and may take less anywhere.
        done += file.write(data[done : done + (1 << 30)])
