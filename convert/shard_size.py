"""How large the files of a checkpoint may be, as transformers' `max_shard_size` says it."""

import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from ..errors import ArgumentError

T = TypeVar("T")
SINGLE = "model.safetensors"
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)", re.IGNORECASE)


def to_bytes(size: Any) -> int:
    """5_000_000_000 or "5GB" (10^9 bytes) or "5GiB" (2^30) in bytes; ArgumentError for others."""
    found = _SIZE.fullmatch(size) if isinstance(size, str) else None
    made = int(float(found[1]) * _UNITS[found[2].upper()]) if found else size
    if type(made) is not int or made < 1:
        raise ArgumentError(
            f"max_shard_size is {size!r:.60}, expected bytes or a text like '5GB' or '500MB'"
        )
    return made


def split(items: Sequence[T], size_of: Callable[[T], int], limit: int) -> dict[str, list[T]]:
    """The items in their order, in files of at most `limit` bytes, named as transformers names
    them. One that is larger has a file of its own.
    """
    shards: list[list[T]] = []
    room = 0
    for item in items:
        size = size_of(item)
        if not shards or size > room:
            shards.append([])
            room = limit
        shards[-1].append(item)
        room -= size
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    count = len(shards)
    return {f"model-{i:05d}-of-{count:05d}.safetensors": s for i, s in enumerate(shards, start=1)}
