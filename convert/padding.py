"""Rows of token ids made one length, by the rules of transformers' `pad`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ArgumentError, InputError, TokenizerError
from .batch_encoding import BatchEncoding

# A model_max_length beyond this says that the tokenizer states none.
_LARGE = int(1e20)
_TRUNCATIONS = ("longest_first", "only_first", "only_second", "do_not_truncate")


def padding_kind(padding: Any) -> str:
    """One of "longest", "max_length", "do_not_pad" for what a caller may give."""
    value = getattr(padding, "value", padding)
    kind = {True: "longest", False: "do_not_pad", None: "do_not_pad"}.get(value, value)
    if kind not in ("longest", "max_length", "do_not_pad"):
        raise ArgumentError(
            f"padding is {padding!r}; expected True, False, 'longest', 'max_length' or 'do_not_pad'"
        )
    return str(kind)


def strategies(
    padding: Any, truncation: Any, max_length: int | None, longest: int, multiple: int | None
) -> tuple[str, str, int | None]:
    """How to pad, how to truncate, and to what length, for what a caller may give.

    `longest` is the tokenizer's `model_max_length`; where it states none, "max_length" without a
    number does nothing, as in transformers. A `max_length` alone truncates.
    """
    if max_length is not None and padding is False and truncation is None:
        truncation = "longest_first"
    value = getattr(truncation, "value", truncation)
    cut = {True: "longest_first", False: "do_not_truncate", None: "do_not_truncate"}.get(
        value, value
    )
    if cut not in _TRUNCATIONS:
        raise ArgumentError(
            f"truncation is {truncation!r}; expected True, False or one of {_TRUNCATIONS}"
        )
    kind = padding_kind(padding)
    if max_length is None:
        if longest <= _LARGE:
            if kind == "max_length" or cut != "do_not_truncate":
                max_length = longest
        else:
            kind = "do_not_pad" if kind == "max_length" else kind
            cut = "do_not_truncate"
    both = cut != "do_not_truncate" and kind != "do_not_pad"
    if both and multiple and max_length is not None and max_length % multiple:
        raise ArgumentError(
            f"max_length {max_length} is no multiple of pad_to_multiple_of {multiple}"
        )
    return kind, str(cut), max_length


def check_side(side: str, name: str, file: Path | None = None) -> str:
    """`side`, which must be "left" or "right"; `name` and `file` say where it was found."""
    if side in ("left", "right"):
        return side
    message = f"{name} is {side!r}; expected 'left' or 'right'"
    raise TokenizerError(message, file=file) if file is not None else ArgumentError(message)


def pad_batch(
    encoded: Any,
    kind: str,
    *,
    name: str,
    pad_id: int | None,
    max_length: int | None,
    multiple: int | None,
    side: str,
    mask: bool,
    tensor_type: str | None,
) -> BatchEncoding:
    """A copy of `encoded` with rows of `name`, their masks and type ids padded at `side`.

    `encoded` is a list of rows (dicts), a dict of lists of rows, or one row. Other entries are kept
    as they are. Raises `InputError` where `name` is absent or rows lack an entry that others have.
    """
    if isinstance(encoded, list | tuple):
        if not encoded:
            raise InputError("there is no row to pad")
        try:
            encoded = {key: [row[key] for row in encoded] for key in encoded[0]}
        except (KeyError, TypeError) as problem:
            raise InputError(f"the rows to pad have different entries: {problem}") from None
    if not isinstance(encoded, Mapping) or name not in encoded:
        found = list(encoded) if isinstance(encoded, Mapping) else type(encoded).__name__
        raise InputError(f"pad needs {name!r}, found {found}")
    plain = {key: _plain(value) for key, value in encoded.items()}
    if tensor_type is None:
        tensor_type = _tensor_type(encoded[name])
    rows = plain[name]
    if not rows:
        return BatchEncoding({**plain, "attention_mask": []} if mask else plain)
    single = not isinstance(rows[0], list)
    if single:
        plain = {key: [value] for key, value in plain.items()}
        rows = plain[name]
    if any(len(value) != len(rows) for value in plain.values()):
        sizes = {key: len(value) for key, value in plain.items()}
        raise InputError(f"the entries to pad have different numbers of rows: {sizes}")
    if mask and "attention_mask" not in plain:
        plain["attention_mask"] = [[1] * len(row) for row in rows]
    if kind == "longest":
        max_length = max(len(row) for row in rows)
    if kind != "do_not_pad" and max_length is not None:
        if multiple:
            max_length = -(-max_length // multiple) * multiple
        fill = {name: pad_id, "attention_mask": 0, "token_type_ids": 0, "special_tokens_mask": 1}
        short = [max_length - len(row) for row in rows]
        for key in fill.keys() & plain.keys():
            plain[key] = [
                row + [fill[key]] * n if side == "right" else [fill[key]] * n + row
                for row, n in zip(plain[key], short, strict=True)
            ]
    if single:
        plain = {key: value[0] for key, value in plain.items()}
    return BatchEncoding(plain, tensor_type=tensor_type)


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _tensor_type(value: Any) -> str | None:
    first = value[0] if isinstance(value, list | tuple) and len(value) else value
    if not hasattr(first, "tolist"):
        return None
    return "pt" if type(first).__module__.startswith("torch") else "np"
