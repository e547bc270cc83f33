"""Which base an adapter belongs to: a mark of a checkpoint's weights, in the adapter's header.

It has a half for how they are laid out (names, dtypes, shapes) and one for what they are, by the
first and last bytes of up to 512 tensors. Only checkpoints laid out alike can be told apart: one
that was quantized, or is of another format, may hold the same weights.
"""

import hashlib
import os
from itertools import chain, groupby
from pathlib import Path

import torch

from ..errors import AdapterError, CheckpointError
from .encoded import Encoded
from .safetensors_file import TensorInfo, opened, read_at
from .shards import Checkpoint

KEY = "base"
_TENSORS, _BYTES = 512, 64


def mark(checkpoint: Checkpoint) -> str | None:
    """The mark, or None where the files are no longer those that were loaded."""
    stored = (
        info.parts if isinstance(info, Encoded) else (info,) for info in checkpoint.tensors.values()
    )
    infos = sorted(chain.from_iterable(stored), key=lambda info: info.name)
    layout, content = (hashlib.blake2b(digest_size=16) for _ in range(2))
    for info in infos:
        layout.update(repr((info.name, str(info.dtype), info.shape, info.nbytes)).encode())
    chosen = infos[:: -(-len(infos) // _TENSORS) or 1]
    seen: dict[str, bytes] = {}
    try:
        for _, group in groupby(sorted(chosen, key=_place), key=lambda info: info.file):
            of_file = list(group)
            with opened(of_file[0]) as file:
                for info in of_file:
                    ends = torch.empty(2, min(_BYTES, info.nbytes), dtype=torch.uint8)
                    read_at(file, info, 0, ends[0])
                    read_at(file, info, info.nbytes - ends.shape[1], ends[1])
                    seen[info.name] = ends.numpy().tobytes()
    except CheckpointError:
        return None
    for name in sorted(seen):
        content.update(name.encode() + seen[name])
    return f"{layout.hexdigest()}:{content.hexdigest()}"


def _place(info: TensorInfo) -> tuple[str, int]:
    return os.fspath(info.file), info.offset


def check(told: str | None, checkpoint: Checkpoint, folder: Path) -> None:
    """Raise AdapterError where `told` is the mark of other weights, laid out as these are."""
    if told is None:
        return
    have = mark(checkpoint)
    layout, _, content = told.partition(":")
    if have is not None and have.startswith(f"{layout}:") and have != f"{layout}:{content}":
        raise AdapterError(
            f"the adapter was trained on other weights than those in {checkpoint.folder}, which "
            "have the same names and shapes; load the base that it was trained on, or put it on "
            "these by model.load_adapter(..., check_base=False)",
            file=folder,
        )
