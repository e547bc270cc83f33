"""Strict JSON from files that somebody else wrote: bounded in size and depth, nothing ambiguous.

RFC 8259 and no more: NaN and Infinity, numbers beyond float64, duplicate names, lone surrogates
and a byte order mark are refused, since readers that differ on them see different files.
"""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any, NoReturn

from ..errors import ConfigError, LoadError
from .local_file import locate, read_bytes

MIB = 1 << 20

# A string that does not end runs to the end of the text, which keeps the scan linear.
_STRING = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_NOT_BRACKET = re.compile(r"[^\[\]{}]++")


def read_json(
    path: str | os.PathLike[str],
    *,
    max_bytes: int = 16 * MIB,
    max_depth: int = 64,
    error: type[LoadError] = ConfigError,
) -> dict[str, Any]:
    """The JSON object in the file `path`, which may not be a link out of its folder.

    Raises `error`, with the file, for an absent or too large file, for anything that is not strict
    JSON nested at most `max_depth` deep, and for a document that is not an object.
    """
    path = Path(path)
    real = locate(path.parent, path.name, error=error)
    content = read_bytes(real, max_bytes=max_bytes, error=error)
    try:
        value = parse_json(content, max_depth=max_depth)
    except ValueError as problem:
        raise error(f"the file is not valid JSON: {problem}", file=path) from None
    if not isinstance(value, dict):
        raise error(f"expected a JSON object, found {type(value).__name__}", file=path)
    return value


def parse_json(content: bytes, *, max_depth: int = 64, naturals: bool = False) -> Any:
    """The value of strict JSON in UTF-8; raises ValueError with what is wrong.

    With `naturals`, every number must be written as a natural number: digits only, no sign.
    """
    text = content.decode("utf-8")
    if text.startswith("\ufeff"):
        raise ValueError("it begins with a byte order mark")
    depth = _depth(text)
    if depth > max_depth:
        raise ValueError(f"it is nested {depth} deep, more than the {max_depth} allowed")
    value = json.loads(
        text,
        object_pairs_hook=_object,
        parse_constant=_constant,
        parse_float=_not_natural if naturals else _float,
        parse_int=_natural if naturals else _int,
    )
    if _SURROGATE.search(text):
        _check_surrogates(value)
    return value


def _depth(text: str) -> int:
    if text.count("[") + text.count("{") == 0:
        return 0
    deepest = depth = 0
    for bracket in _NOT_BRACKET.sub("", _STRING.sub("", text)):
        depth += 1 if bracket in "[{" else -1
        deepest = max(deepest, depth)
    return deepest


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"the name {name[:200]!r} occurs twice in one object")
            seen.add(name)
    return found


def _check_surrogates(value: Any) -> None:
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, str):
            # UnicodeEncodeError is a ValueError: half of a surrogate pair stands alone.
            item.encode("utf-8")
        elif isinstance(item, list):
            pending.extend(item)
        elif isinstance(item, dict):
            pending.extend(item)
            pending.extend(item.values())


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"the number {digits[:40]} is too large")
    return value


def _int(digits: str) -> int:
    if len(digits) > 40:
        raise ValueError(f"the number {digits[:40]}... is too large")
    return int(digits)


def _natural(digits: str) -> int:
    if not digits.isdecimal():
        _not_natural(digits)
    return _int(digits)


def _not_natural(digits: str) -> NoReturn:
    raise ValueError(f"expected a natural number, found {digits[:40]}")
