"""What a caller may give as text: one or many, pairs, words; and what is no text at all."""

from __future__ import annotations

from typing import Any

from ..errors import InputError


def text_inputs(text: Any, pair: Any, words: bool) -> tuple[list[Any], bool]:
    """What the backend takes, and whether the caller gave several texts."""
    if not isinstance(text, str | list | tuple):
        raise InputError(f"expected a text or a list of texts, found {type(text).__name__}")
    batched = isinstance(text, list | tuple)
    if words:
        batched = batched and len(text) > 0 and isinstance(text[0], list | tuple)
        if isinstance(text, str):
            raise InputError("is_split_into_words takes a list of words, found a text")
    if not batched:
        return [(text, pair) if pair else text], False
    if len(text) == 0:
        raise InputError("there is no text: the list is empty")
    if pair is None:
        return list(text), True
    if not isinstance(pair, list | tuple) or len(pair) != len(text):
        raise InputError(f"text_pair must be a list of {len(text)} texts like text")
    return list(zip(text, pair, strict=True)), True


def why_not_text(inputs: list[Any]) -> str:
    """Which input the backend refused: something that is no text, or half of a surrogate pair."""
    pending = [(f"text {index}", value) for index, value in enumerate(inputs)]
    for where, value in pending:
        if isinstance(value, list | tuple):
            pending.extend((where, item) for item in value)
        elif not isinstance(value, str):
            return f"{where} has a {type(value).__name__} where text is expected: {value!r:.100}"
        elif any("\ud800" <= char <= "\udfff" for char in value):
            return f"{where} has a lone surrogate, which no UTF-8 can write: {value[:40]!r}"
    return "the texts have an unusable shape: expected str, (str, str) or lists of words"
