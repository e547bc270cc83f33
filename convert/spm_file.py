"""SentencePiece models (`tokenizer.model`): the pieces and settings of one, parsed strictly.

The file is one protocol buffer, `ModelProto` of sentencepiece_model.proto, of which few fields
matter here; the others are skipped.
"""

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import TokenizerError
from .json_file import MIB
from .local_file import locate, read_bytes
from .tokenizer_parts import NORMAL, UNKNOWN

NAME = "tokenizer.model"
UNIGRAM, BPE = 1, 2
_MAX_BYTES = 32 * MIB
_MAX_PIECES = 1 << 20
_MAX_PIECE_BYTES = 2048


@dataclass(frozen=True)
class Pieces:
    """A model's pieces with their scores and kinds, by id, and how it normalises text.

    kind: UNIGRAM or BPE. charsmap: the compiled rules that replace characters, empty for none.
    prefix: a space is put before a text. squeeze: runs of spaces become one.
    """

    kind: int
    pieces: tuple[str, ...]
    scores: tuple[float, ...]
    kinds: tuple[int, ...]
    unknown: int
    charsmap: bytes
    prefix: bool
    squeeze: bool


def read_pieces(folder: Path) -> Pieces:
    """The model in `folder`; raises TokenizerError for one that is malformed or not supported."""
    path = folder / NAME
    content = read_bytes(
        locate(folder, NAME, error=TokenizerError), max_bytes=_MAX_BYTES, error=TokenizerError
    )
    try:
        return _parsed(content)
    except (ValueError, struct.error) as problem:
        raise TokenizerError(f"not a SentencePiece model: {problem}", file=path) from None


def _parsed(content: bytes) -> Pieces:
    pieces: list[str] = []
    scores: list[float] = []
    kinds: list[int] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    for number, value in _fields(content):
        if number == 1:
            found = dict(_fields(_message(value)))
            if len(pieces) == _MAX_PIECES:
                raise ValueError(f"it has more than {_MAX_PIECES} pieces")
            raw, score, kind = found.get(1, b""), found.get(2, 0.0), found.get(3, NORMAL)
            if not isinstance(raw, bytes) or len(raw) > _MAX_PIECE_BYTES:
                raise ValueError(f"piece {len(pieces)} is no text of {_MAX_PIECE_BYTES} bytes")
            if not isinstance(score, float) or not math.isfinite(score) or type(kind) is not int:
                raise ValueError(f"piece {len(pieces)} has a score or a kind that is none")
            pieces.append(raw.decode("utf-8"))
            scores.append(score)
            kinds.append(kind)
        elif number == 2:
            trainer.update(_fields(_message(value)))
        elif number == 3:
            normalizer.update(_fields(_message(value)))
    kind, unknown = trainer.get(3, UNIGRAM), trainer.get(40, 0)
    if kind not in (UNIGRAM, BPE):
        raise ValueError(f"its kind is {kind!r}, known are 1 (unigram) and 2 (BPE)")
    if not pieces or len(set(pieces)) != len(pieces):
        raise ValueError("it has no pieces, or one twice")
    if type(unknown) is not int or not 0 <= unknown < len(pieces) or kinds[unknown] != UNKNOWN:
        raise ValueError(f"its unknown piece is {unknown!r} of {len(pieces)}, which is not one")
    if trainer.get(24, 0):
        raise ValueError("spaces are at the end of its pieces, which is not supported")
    if not normalizer.get(5, 1):
        raise ValueError("it does not escape spaces, which is not supported")
    return Pieces(
        kind,
        tuple(pieces),
        tuple(scores),
        tuple(kinds),
        unknown,
        _message(normalizer.get(2, b"")),
        bool(normalizer.get(3, 1)),
        bool(normalizer.get(4, 1)),
    )


def _message(value: Any) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a number where a text or message belongs")
    return value


def _fields(content: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, value) of a protocol buffer: an int, a float or bytes; groups are refused."""
    at = 0
    while at < len(content):
        key, at = _varint(content, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(content, at)
            yield number, value
            continue
        if wire == 2:
            size, at = _varint(content, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")
        part = content[at : at + size]
        if len(part) != size:
            raise ValueError("it is cut short")
        at += size
        yield number, part if wire == 2 else struct.unpack("<d" if wire == 1 else "<f", part)[0]


def _varint(content: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(content):
            raise ValueError("it is cut short")
        byte = content[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError("a number of more than 64 bits")
