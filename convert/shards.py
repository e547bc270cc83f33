"""The weights in one folder: a single safetensors file, or shards and the index that names them.

Only headers are read here; `read` and `read_into` fetch one tensor at a time.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from ..errors import CheckpointError
from .json_file import MIB, read_json
from .local_file import locate
from .safetensors_file import MAX_TENSORS, TensorInfo, read, read_header, read_into

__all__ = [
    "Checkpoint",
    "TensorInfo",
    "open_checkpoint",
    "read",
    "read_index",
    "read_into",
    "shard_names",
]

SHARD_NAME = re.compile(r"[A-Za-z0-9._-]+\.safetensors")
_MAX_INDEX_BYTES = 64 * MIB


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of one folder's safetensors files, by name; no tensor's data is held.

    placed: the plain name of the file that each is in, where `files` may be blobs of a cache.
    """

    folder: Path
    files: tuple[Path, ...]
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    placed: Mapping[str, str] = field(default_factory=dict)

    def in_file_order(self) -> Iterator[TensorInfo]:
        """Every tensor, in the order that reads the files from front to back."""
        order = {file: position for position, file in enumerate(self.files)}
        return iter(sorted(self.tensors.values(), key=lambda t: (order[t.file], t.offset)))


def open_checkpoint(folder: str | os.PathLike[str], *, stem: str = "model") -> Checkpoint:
    """The checkpoint in `folder`: `<stem>.safetensors`, or the shards that its index names.

    The single file wins where both are there, as in transformers; `stem` is "adapter_model" for
    PEFT adapters. Only headers are read. Raises CheckpointError for malformed, cut, missing or
    surplus files and tensors, and for names and links that lead out of the folder.
    """
    folder = Path(folder)
    single, index = f"{stem}.safetensors", f"{stem}.safetensors.index.json"
    if os.path.lexists(folder / single):
        path = locate(folder, single)
        tensors, metadata = read_header(path)
        placed = dict.fromkeys(tensors, single)
        return Checkpoint(
            folder,
            (path,),
            MappingProxyType(tensors),
            MappingProxyType(metadata),
            MappingProxyType(placed),
        )
    if os.path.lexists(folder / index):
        return _open_sharded(folder, index)
    raise CheckpointError(_no_weights(folder, stem), file=folder)


def read_index(path: Path) -> dict[str, str]:
    """The `weight_map` of an index file: tensor name -> shard name, checked to be a plain name."""
    weight_map = read_json(path, max_bytes=_MAX_INDEX_BYTES, error=CheckpointError).get(
        "weight_map"
    )
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError("expected a weight_map from tensor names to file names", file=path)
    if len(weight_map) > MAX_TENSORS:
        raise CheckpointError(
            f"the index has {len(weight_map)} tensors, more than {MAX_TENSORS}", file=path
        )
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not SHARD_NAME.fullmatch(shard):
            raise CheckpointError(
                f"{str(shard)[:200]!r} is not the plain name of a .safetensors file in the same "
                "folder",
                file=path,
                tensor=name[:200],
            )
    return weight_map


def shard_names(path: Path) -> list[str]:
    """The shards that the index file `path` names, in order, each a plain name."""
    return sorted(set(read_index(path).values()))


def _open_sharded(folder: Path, index: str) -> Checkpoint:
    weight_map = read_index(folder / index)
    files: list[Path] = []
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    for shard in sorted(set(weight_map.values())):
        path = locate(folder, shard)
        found, its_metadata = read_header(path)
        twice = sorted(found.keys() & tensors.keys())
        if twice:
            raise CheckpointError(f"tensors are in two shards: {_some(twice)}", file=path)
        # Against the map of this shard alone, so that a tensor in the wrong shard shows as both.
        named = {name for name, where in weight_map.items() if where == shard}
        _same_names(named, set(found), path)
        files.append(path)
        tensors.update(found)
        metadata.update(its_metadata)
    return Checkpoint(
        folder,
        tuple(files),
        MappingProxyType(tensors),
        MappingProxyType(metadata),
        MappingProxyType(weight_map),
    )


def _same_names(named: set[str], found: set[str], path: Path) -> None:
    missing, extra = sorted(named - found), sorted(found - named)
    if missing or extra:
        parts = []
        if missing:
            parts.append(f"the index places tensors here that are missing: {_some(missing)}")
        if extra:
            parts.append(f"the file has tensors that the index does not place here: {_some(extra)}")
        raise CheckpointError("; ".join(parts), file=path)


def _some(names: list[str]) -> str:
    shown = ", ".join(name[:200] for name in names[:8])
    return shown if len(names) <= 8 else f"{shown} and {len(names) - 8} more"


def _no_weights(folder: Path, stem: str) -> str:
    try:
        names = sorted(os.listdir(folder))
    except OSError as problem:
        return f"the folder cannot be read: {problem.strerror}"
    pickles = [n for n in names if n.endswith((".bin", ".pt", ".pth", ".ckpt")) and "args" not in n]
    wanted = f"{stem}.safetensors or {stem}.safetensors.index.json"
    if pickles:
        return (
            f"expected {wanted}, found only pickled weights ({_some(pickles)}), which are never "
            "loaded because a pickle can run code; convert them to safetensors where you trust them"
        )
    return f"expected {wanted}, found {_some(names) or 'an empty folder'}"
