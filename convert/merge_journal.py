"""How far a merge came: what a killed one wrote and checked, the next need not make again.

The journal lies in the unfinished folder, and says of each file that is whole there, on the disk
and checked, what it was made of and the fingerprint of each of its tensors.
"""

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from .json_file import read_json
from .leftovers import JOURNAL, flush
from .merge_plan import Tensor
from .merge_tensor import digest
from .safetensors_file import read, read_header

# File name -> what it was made of, and the fingerprints of its tensors.
Done = dict[str, tuple[str, dict[str, bytes]]]

_MAX_BYTES = 256 << 20
# Raised when a merge makes other bytes of the same things.
_VERSION = 1


def made_of(tensors: Sequence[Tensor], settings: Any, known: dict[int, bytes]) -> str:
    """A fingerprint of everything that decides on the bytes of a file of `tensors`.

    Stored tensors count by name, place, size and time of their file; what is in memory, by its
    bytes. settings: what else decides. known: fingerprints of what several files are made of, by
    id, for as long as that lives.
    """
    whole = hashlib.blake2b(repr((_VERSION, settings)).encode(), digest_size=16)
    for tensor in tensors:
        whole.update(repr((tensor.name, tensor.dtype, tensor.shape)).encode())
        for part in (tensor.info, tensor.change, *tensor.made_from):
            whole.update(_fingerprint(part, known))
    return whole.hexdigest()


def _fingerprint(value: Any, known: dict[int, bytes]) -> bytes:
    if isinstance(value, torch.Tensor):
        text = repr((value.dtype, tuple(value.shape))).encode() + digest(value)
    elif dataclasses.is_dataclass(value):
        if id(value) in known:
            return known[id(value)]
        fields = (getattr(value, field.name) for field in dataclasses.fields(value))
        text = type(value).__qualname__.encode() + b"".join(_fingerprint(x, known) for x in fields)
    elif isinstance(value, tuple | list):
        text = b"".join(_fingerprint(x, known) for x in value)
    elif isinstance(value, partial):
        # What reads a stored weight, with what the quantization_config said of it.
        text = _fingerprint((value.func, value.args, sorted(value.keywords.items())), known)
    elif callable(value) and not isinstance(value, type):
        text = value.__qualname__.encode()
    else:
        text = repr(value).encode()
    made = hashlib.blake2b(text, digest_size=16).digest()
    if dataclasses.is_dataclass(value):
        known[id(value)] = made
    return made


def taken_up(folder: Path, plan: Mapping[str, str]) -> dict[str, dict[str, bytes]]:
    """What `folder` holds whole of `plan`, file name -> what it is to be made of: fingerprints.

    Each tensor is read again. Everything else there is removed.
    """
    done = _read(folder)
    found = {}
    for name, key in plan.items():
        made, tensors = done.get(name, ("", {}))
        if made == key and _holds(folder / name, tensors):
            found[name] = tensors
    for path in folder.iterdir():
        if path.name not in (*found, JOURNAL):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    return found


def note(folder: Path, plan: Mapping[str, str], done: Mapping[str, dict[str, bytes]]) -> None:
    """Have the last file of `done` on the disk, and then the journal that tells of all."""
    flush(folder / list(done)[-1])
    text = json.dumps(
        {
            name: [plan[name], {tensor: mark.hex() for tensor, mark in tensors.items()}]
            for name, tensors in done.items()
        }
    )
    part = folder / f"{JOURNAL}.part"
    part.write_text(text, encoding="utf-8")
    flush(part)
    os.replace(part, folder / JOURNAL)
    flush(folder)


def close(folder: Path) -> None:
    """Remove the journal: what is in `folder` is finished."""
    (folder / JOURNAL).unlink(missing_ok=True)


def _read(folder: Path) -> Done:
    """What a journal says; nothing, if it is none."""
    if not (folder / JOURNAL).is_file():
        return {}
    try:
        stored = read_json(folder / JOURNAL, max_bytes=_MAX_BYTES, error=CheckpointError)
        return {
            name: (str(made), {tensor: bytes.fromhex(mark) for tensor, mark in tensors.items()})
            for name, (made, tensors) in stored.items()
        }
    except (CheckpointError, AttributeError, TypeError, ValueError):
        return {}


def _holds(file: Path, tensors: Mapping[str, bytes]) -> bool:
    if file.is_symlink():
        return False
    try:
        infos, _ = read_header(file)
        return infos.keys() == tensors.keys() and all(
            digest(read(info)) == tensors[name] for name, info in infos.items()
        )
    except (CheckpointError, OSError):
        return False
