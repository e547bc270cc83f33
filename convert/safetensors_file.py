"""Reading one safetensors file: a strict header parser, and reads of one tensor at a time.

Nothing is memory-mapped: a file that is cut while mapped kills the process, and mapped pages would
count as ours. Each read opens the file again, checks that it is the one that was described, and
fills one buffer. The parser accepts nothing that the safetensors library refuses.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import torch

from ..errors import CheckpointError
from .json_file import MIB, parse_json
from .local_file import open_regular

MAX_HEADER_BYTES = 16 * MIB
MAX_TENSORS = 200_000
_MAX_DIMS = 64
_MAX_COUNT = 2**63 - 1

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "BOOL": torch.bool,
        "U8": torch.uint8,
        "I8": torch.int8,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
        "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
        "F8_E8M0": torch.float8_e8m0fnu,
        "U16": torch.uint16,
        "I16": torch.int16,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "U32": torch.uint32,
        "I32": torch.int32,
        "F32": torch.float32,
        "U64": torch.uint64,
        "I64": torch.int64,
        "F64": torch.float64,
        "C64": torch.complex64,
    }
)

# What is found under the name of a safetensors file when it is none.
_OTHER_FORMATS = (
    (b"PK\x03\x04", "a zip archive, as torch.save writes; pickles are never loaded"),
    (b"\x80\x02", "a Python pickle; pickles are never loaded"),
    (b"version https://git-lfs", "a Git LFS pointer; run `git lfs pull` in the repository"),
    (b"<", "a web page; download the file again"),
    (b"GGUF", "a GGUF file"),
)


@dataclass(frozen=True)
class FileStamp:
    """What a file looked like when its header was read."""

    size: int
    modified_ns: int


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `nbytes` bytes from byte `offset` of `file`, row-major."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    stamp: FileStamp


def parse_header(
    content: bytes, data_bytes: int, *, file: Path | None = None
) -> tuple[dict[str, tuple[torch.dtype, tuple[int, ...], int, int]], dict[str, str]]:
    """Tensors as name -> (dtype, shape, first byte, end byte within the data), and the metadata.

    `content` is the JSON header alone and `data_bytes` the number of bytes behind it, which the
    tensors must cover without hole or overlap. Raises CheckpointError, naming `file`.
    """
    if not content.startswith(b"{"):
        raise CheckpointError(f"the header must begin with '{{', found {content[:8]!r}", file=file)
    # Counted first as text: parsing millions of entries would take seconds and gigabytes.
    if content.count(b'"data_offsets"') > MAX_TENSORS:
        raise CheckpointError(f"the header has more than {MAX_TENSORS} tensors", file=file)
    try:
        header: dict[str, Any] = parse_json(content, max_depth=8, naturals=True)
    except ValueError as problem:
        raise CheckpointError(f"the header is not valid: {problem}", file=file) from None
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError("the header's __metadata__ must map strings to strings", file=file)
    if len(header) > MAX_TENSORS:
        raise CheckpointError(
            f"the header has {len(header)} tensors, more than {MAX_TENSORS}", file=file
        )
    tensors = {name: _entry(name, entry, file) for name, entry in header.items()}
    spans = sorted((first, end, name) for name, (_, _, first, end) in tensors.items())
    for (_, end, _), (first, _, name) in pairwise([(0, 0, ""), *spans]):
        if first != end:
            raise CheckpointError(
                f"data_offsets begin at {first}, but the tensor before ends at {end}",
                tensor=name[:200],
                file=file,
            )
    covered = spans[-1][1] if spans else 0
    if covered != data_bytes:
        state = "cut short" if covered > data_bytes else "followed by other bytes"
        raise CheckpointError(
            f"the tensors take {covered} bytes, the file has {data_bytes} behind its header: "
            f"it is {state}; download or copy it again",
            file=file,
        )
    return tensors, metadata


def _entry(
    name: str, entry: object, file: Path | None
) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(
            "expected dtype, shape and data_offsets", tensor=name[:200], file=file
        )
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    dtype = DTYPES.get(kind) if isinstance(kind, str) else None
    if dtype is None:
        raise CheckpointError(
            f"unknown dtype {str(kind)[:40]!r}; known are {', '.join(DTYPES)}",
            tensor=name[:200],
            file=file,
        )
    if not _naturals(shape) or len(shape) > _MAX_DIMS:
        raise CheckpointError(
            f"shape must be a list of at most {_MAX_DIMS} natural numbers",
            tensor=name[:200],
            file=file,
        )
    if not _naturals(offsets) or len(offsets) != 2:
        raise CheckpointError(
            "data_offsets must be two natural numbers", tensor=name[:200], file=file
        )
    # Zeros are left out: 2^64-1 x 0 holds nothing, and is still no shape that anyone can use.
    if math.prod(max(1, dim) for dim in shape) * dtype.itemsize > _MAX_COUNT:
        raise CheckpointError(f"shape {shape} is too large", tensor=name[:200], file=file)
    nbytes = math.prod(shape) * dtype.itemsize
    first, end = offsets
    if end - first != nbytes:
        raise CheckpointError(
            f"shape {shape} of {kind} takes {nbytes} bytes, data_offsets [{first}, {end}] "
            f"hold {end - first}",
            tensor=name[:200],
            file=file,
        )
    return dtype, tuple(shape), first, end


def _naturals(value: object) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n <= _MAX_COUNT for n in value)


def read_header(
    path: Path, *, max_header_bytes: int = MAX_HEADER_BYTES
) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors and the metadata of one safetensors file; raises CheckpointError naming it."""
    file, size = open_regular(path)
    with file:
        stamp = FileStamp(size, os.fstat(file.fileno()).st_mtime_ns)
        try:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > size - 8:
                raise CheckpointError(_not_safetensors(start, file.read(24), size), file=path)
            if length > max_header_bytes:
                raise CheckpointError(
                    f"the header has {length} bytes, more than the {max_header_bytes} allowed",
                    file=path,
                )
            content = bytearray(length)
            _fill(memoryview(content), file, path)
        except OSError as problem:
            raise CheckpointError(f"cannot be read: {problem.strerror}", file=path) from problem
    base = 8 + length
    entries, metadata = parse_header(bytes(content), size - base, file=path)
    tensors = {
        name: TensorInfo(name, path, dtype, shape, base + first, end - first, stamp)
        for name, (dtype, shape, first, end) in entries.items()
    }
    return tensors, metadata


def _not_safetensors(start: bytes, more: bytes, size: int) -> str:
    begin = start + more
    for magic, what in _OTHER_FORMATS:
        if begin.startswith(magic):
            return f"expected a safetensors file, found {what}"
    if size < 8:
        return f"a safetensors file has at least 8 bytes, this one has {size}"
    length = int.from_bytes(start, "little")
    return (
        f"the first 8 bytes announce a header of {length} bytes, the file has {size}: it is cut "
        "short or no safetensors file; download or copy it again"
    )


def read(info: TensorInfo, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """The tensor `info`, on the CPU, in memory of its own or in `out`.

    `out` must be a contiguous CPU tensor of the same dtype and shape. Raises CheckpointError when
    the file is not the one that was described (shorter, longer, changed) and for a BOOL tensor
    with bytes other than 0 and 1.
    """
    if out is None:
        out = torch.empty(info.shape, dtype=info.dtype)
    elif (
        out.dtype != info.dtype
        or out.shape != info.shape
        or out.device.type != "cpu"
        or not out.is_contiguous()
    ):
        raise CheckpointError(
            f"out must be a contiguous CPU tensor of {info.dtype} {list(info.shape)}, found "
            f"{out.dtype} {list(out.shape)} on {out.device}",
            tensor=info.name,
        )
    data = out.reshape(-1).view(torch.uint8)
    with opened(info) as file:
        read_at(file, info, 0, data)
    if info.dtype == torch.bool and info.nbytes and int(data.max()) > 1:
        raise CheckpointError(
            "a BOOL tensor holds bytes other than 0 and 1", file=info.file, tensor=info.name
        )
    return out


def read_into(info: TensorInfo, buffer: torch.Tensor) -> torch.Tensor:
    """The tensor `info` as a view of the front of `buffer`: uint8 [>= info.nbytes] on the CPU.

    One buffer serves a whole checkpoint, so that host memory stays at its largest tensor. The view
    is valid until the buffer is filled again.
    """
    if buffer.dtype != torch.uint8 or buffer.dim() != 1 or buffer.numel() < info.nbytes:
        raise CheckpointError(
            f"buffer must be uint8 with at least {info.nbytes} elements, found {buffer.dtype} "
            f"{list(buffer.shape)}",
            tensor=info.name,
        )
    return read(info, out=buffer[: info.nbytes].view(info.dtype).view(info.shape))


@contextmanager
def opened(info: TensorInfo) -> Iterator[BinaryIO]:
    """The file of `info`, open for reading and still the one that was described."""
    file, size = open_regular(info.file)
    with file:
        stamp = FileStamp(size, os.fstat(file.fileno()).st_mtime_ns)
        if stamp != info.stamp:
            raise CheckpointError(
                f"the file changed since it was opened ({info.stamp.size} bytes then, {size} now); "
                "load again",
                file=info.file,
                tensor=info.name,
            )
        yield file


def read_at(file: BinaryIO, info: TensorInfo, begin: int, out: torch.Tensor) -> None:
    """Fill `out`, uint8 on the CPU, with the tensor's bytes from `begin` on; `file` as `opened`."""
    try:
        file.seek(info.offset + begin)
        _fill(out.numpy().data, file, info.file)
    except OSError as problem:
        raise CheckpointError(
            f"the file cannot be read: {problem.strerror}", file=info.file, tensor=info.name
        ) from problem


def _fill(view: memoryview, file: Any, path: Path) -> None:
    done = 0
    while done < len(view):
        # One read returns at most 2 GiB on Linux, and may return less anywhere.
        count = file.readinto(view[done : done + (1 << 30)])
        if not count:
            raise CheckpointError(
                f"the file ended {len(view) - done} bytes early while it was read", file=path
            )
        done += count
