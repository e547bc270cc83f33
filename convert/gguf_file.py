"""Reading one GGUF file: a strict parser of its header, and reads of one tensor at a time.

The format is that of ggml's `docs/gguf.md`, versions 2 and 3, little-endian. The `gguf` library
knows how quantized blocks are laid out and dequantizes them; its own reader trusts every count in
the file and maps it into memory, so the header is parsed here.
"""

import math
import os
import struct
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from ..errors import ArgumentError, CheckpointError
from .json_file import MIB
from .local_file import open_regular
from .safetensors_file import MAX_TENSORS, FileStamp, TensorInfo, opened, read_at

MAX_HEADER_BYTES = 64 * MIB
_MAX_FIELDS = 65_536
_MAX_DIMS = 4
_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "B",
    10: "Q",
    11: "q",
    12: "d",
}
_DENSE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_QUANTIZED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
# A head has not more pairs of features.
_MAX_DIVISORS = 1 << 12
# Weights that are dequantized at a time.
_CHUNK = 1 << 24


@dataclass(frozen=True)
class GGUFTensor(TensorInfo):
    """A weight in blocks of the ggml type `kind`; `dtype` is what reading gives.

    heads: of how many heads the rows are, each stored with its halves interleaved as llama.cpp's
    rope needs them; 0 for rows that are as they should be. offset_by: what was added to each value
    (norms around 1, whose weights are kept as the difference). decay: the values are
    -exp(what a checkpoint has). stacks: it is made of these two, the keys' [h, r, k] and the
    values' [h, v, r] of latent attention: [h (k + v), r].
    """

    kind: str
    heads: int = 0
    offset_by: float = 0.0
    decay: bool = False
    stacks: tuple["GGUFTensor", ...] = ()


@dataclass(frozen=True)
class GGUF:
    """A parsed header: `fields` as Python values, `tensors` under ggml's names."""

    file: Path
    fields: MappingProxyType[str, Any]
    tensors: MappingProxyType[str, GGUFTensor]


def find(path: Path) -> Path | None:
    """The GGUF file that `path` is, or the only one in that folder if it has no safetensors.

    Raises CheckpointError for a folder with several.
    """
    if path.suffix == ".gguf" and path.is_file():
        return path
    weights = ("model.safetensors", "model.safetensors.index.json", "adapter_config.json")
    if not path.is_dir() or any(os.path.lexists(path / name) for name in weights):
        return None
    found = sorted(entry.name for entry in path.iterdir() if entry.suffix == ".gguf")
    if len(found) > 1:
        raise CheckpointError(
            f"the folder has {len(found)} GGUF files, {', '.join(found)[:400]}; give the path of "
            "the one to load",
            file=path,
        )
    return path / found[0] if found else None


def opened_in(path: Path) -> GGUF | None:
    """The header of the file that `find` finds, None where there is none."""
    file = find(path)
    return None if file is None else open_gguf(file)


def open_gguf(path: Path) -> GGUF:
    """The header of a GGUF file.

    Raises CheckpointError for a file that is cut or malformed: counts beyond its end, tensors that
    overlap or lie outside, types that are not known, names that occur twice.
    """
    file, size = open_regular(path)
    with file:
        stamp = FileStamp(size, os.fstat(file.fileno()).st_mtime_ns)
        try:
            parts, left = [], min(size, MAX_HEADER_BYTES)
            while left and (part := file.read(left)):
                parts.append(part)
                left -= len(part)
        except OSError as problem:
            raise CheckpointError(f"cannot be read: {problem.strerror}", file=path) from problem
    cursor = _Cursor(b"".join(parts), size, path)
    if cursor.take(4) != b"GGUF":
        raise cursor.wrong("expected a GGUF file, found another beginning")
    version, count, num_fields = cursor.unpack("I"), cursor.unpack("Q"), cursor.unpack("Q")
    if version not in (2, 3):
        raise cursor.wrong(f"GGUF version {version}, expected 2 or 3 in little-endian order")
    if count > MAX_TENSORS or num_fields > _MAX_FIELDS:
        raise cursor.wrong(f"the header announces {count} tensors and {num_fields} fields")
    fields: dict[str, Any] = {}
    for _ in range(num_fields):
        name = cursor.text()
        if name in fields:
            raise cursor.wrong(f"the field {name[:100]!r} occurs twice")
        fields[name] = cursor.value(cursor.unpack("I"))
    if fields.get("split.count", 1) not in (0, 1):
        raise cursor.wrong(
            f"it is one of {fields['split.count']!r:.20} pieces of a model; put them together with "
            "llama.cpp's `llama-gguf-split --merge`"
        )
    entries: dict[str, tuple[list[int], int, int]] = {}
    for _ in range(count):
        name, dims = cursor.text(), cursor.unpack("I")
        if name in entries or not 0 < dims <= _MAX_DIMS:
            raise cursor.wrong(f"the tensor {name[:100]!r} occurs twice or has {dims} dimensions")
        shape = [cursor.unpack("Q") for _ in range(dims)]
        entries[name] = shape, cursor.unpack("I"), cursor.unpack("Q")
    align = fields.get("general.alignment", 32)
    if type(align) is not int or align < 1 or align & (align - 1) or align > MIB:
        raise cursor.wrong(f"general.alignment is {align!r:.60}, expected a power of two")
    base = -(-cursor.at // align) * align
    tensors = {n: _tensor(n, *entry, base, align, path, stamp) for n, entry in entries.items()}
    spans = sorted((t.offset, t.offset + t.nbytes, name) for name, t in tensors.items())
    for (_, end, _), (first, _, name) in pairwise([(0, base, ""), *spans]):
        if first < end:
            raise CheckpointError("the tensor overlaps another", tensor=name[:200], file=path)
    if spans and spans[-1][1] > size:
        raise CheckpointError(
            f"the tensors end at byte {spans[-1][1]}, the file has {size}: it is cut short; "
            "download or copy it again",
            tensor=spans[-1][2][:200],
            file=path,
        )
    return GGUF(path, MappingProxyType(fields), MappingProxyType(tensors))


def _tensor(
    name: str,
    dims: list[int],
    type_id: int,
    offset: int,
    base: int,
    align: int,
    path: Path,
    stamp: FileStamp,
) -> GGUFTensor:
    kinds = _kinds()
    if type_id not in kinds:
        raise CheckpointError(
            f"ggml type {type_id} is not read; known are "
            f"{', '.join(kind for kind, _, _ in kinds.values())}",
            tensor=name[:200],
            file=path,
        )
    kind, block, nbytes = kinds[type_id]
    # Zeros are as useless as sizes that no file could hold. Rows are whole blocks.
    if not all(0 < n < 2**40 for n in dims) or dims[0] % block or offset % align:
        raise CheckpointError(
            f"dimensions {dims} at {offset} are not those of {kind} in blocks of {block}",
            tensor=name[:200],
            file=path,
        )
    return GGUFTensor(
        name=name,
        file=path,
        dtype=_DENSE.get(kind, torch.float32),
        # The fastest dimension stands first there.
        shape=tuple(reversed(dims)),
        offset=base + offset,
        nbytes=math.prod(dims) // block * nbytes,
        stamp=stamp,
        kind=kind,
    )


def library() -> Any:
    """The `gguf` package; raises ArgumentError where it is not installed."""
    try:
        import gguf
    except ImportError:
        raise ArgumentError("GGUF files need an extra: pip install 'purelm[gguf]'") from None
    return gguf


def _kinds() -> dict[int, tuple[str, int, int]]:
    """ggml's number of a type -> its name, weights in a block, bytes of a block."""
    gguf = library()
    return {
        int(kind): (kind.name, *gguf.GGML_QUANT_SIZES[kind])
        for kind in gguf.GGMLQuantizationType
        if kind.name in _DENSE or kind.name in _QUANTIZED
    }


class _Cursor:
    """A place in the front of a file; every step is checked against the end."""

    def __init__(self, content: bytes, size: int, file: Path) -> None:
        self.content, self.size, self.file, self.at = content, size, file, 0

    def wrong(self, message: str) -> CheckpointError:
        return CheckpointError(message, file=self.file)

    def take(self, count: int) -> bytes:
        found = self.content[self.at : self.at + count]
        if len(found) < count:
            raise self.wrong(
                f"the header goes on beyond {len(self.content)} bytes, the file has {self.size}: "
                "it is cut short or malformed; download or copy it again"
            )
        self.at += count
        return found

    def unpack(self, code: str) -> int:
        (value,) = struct.unpack(f"<{code}", self.take(struct.calcsize(code)))
        return int(value)

    def text(self) -> str:
        found = self.take(self.unpack("Q"))
        try:
            return found.decode("utf-8")
        except UnicodeDecodeError as problem:
            raise self.wrong(f"a text of the header is not UTF-8: {problem}") from None

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            inner, count = self.unpack("I"), self.unpack("Q")
            # Each text takes eight bytes at least, so that a count cannot outgrow the file.
            if inner == _STRING and count <= len(self.content) // 8:
                return [self.text() for _ in range(count)]
            if inner in _SCALARS and count <= len(self.content):
                return self._scalars(inner, count)
            raise self.wrong(f"an array of {count} values of type {inner} is malformed")
        if kind in _SCALARS:
            return self._scalars(kind, 1)[0]
        raise self.wrong(f"a field has the unknown type {kind}")

    def _scalars(self, kind: int, count: int) -> list[Any]:
        code = f"<{count}{_SCALARS[kind]}"
        values = list(struct.unpack(code, self.take(struct.calcsize(code))))
        if kind == _BOOL:
            if any(value > 1 for value in values):
                raise self.wrong("a boolean is neither 0 nor 1")
            return [bool(value) for value in values]
        return values


def read_tensor(info: GGUFTensor) -> torch.Tensor:
    """The weight on the CPU, dequantized to `info.dtype`, its rows in HF's order.

    Raises CheckpointError when the file is not the one that was described.
    """
    if info.stacks:
        keys, values = map(read_tensor, info.stacks)
        return torch.cat([keys.mT, values], 1).flatten(0, 1)
    gguf = library()
    kind = gguf.GGMLQuantizationType[info.kind]
    out = torch.empty(info.shape, dtype=info.dtype)
    with opened(info) as file:
        if info.kind in _DENSE:
            read_at(file, info, 0, out.reshape(-1).view(torch.uint8))
        else:
            rows = out.view(-1, info.shape[-1])
            row_bytes = info.nbytes // rows.shape[0]
            step = max(1, _CHUNK // rows.shape[1])
            for first in range(0, rows.shape[0], step):
                part = rows[first : first + step]
                buffer = torch.empty(part.shape[0], row_bytes, dtype=torch.uint8)
                read_at(file, info, first * row_bytes, buffer.view(-1))
                # Scales that are not finite show in what comes out.
                with np.errstate(all="ignore"):
                    part.copy_(torch.from_numpy(gguf.quants.dequantize(buffer.numpy(), kind)))
    if info.offset_by:
        out = out - info.offset_by
    if info.decay:
        out = out.neg().log()
    if info.heads:
        out = out.view(info.heads, -1, 2, *info.shape[1:]).transpose(1, 2).reshape(info.shape)
    return out


def read_divisors(info: GGUFTensor) -> torch.Tensor:
    """A scaled rotation's divisors, fp32 [d / 2], which stand in a file as a tensor.

    Raises CheckpointError, before anything is read, for what is no vector of so few.
    """
    if len(info.shape) != 1 or info.shape[0] > _MAX_DIVISORS:
        raise CheckpointError(
            f"found shape {list(info.shape)}, expected a divisor for each pair of features",
            tensor=info.name,
            file=info.file,
        )
    return read_tensor(info).float()
