"""What a tokenizer call returns: a dict of lists or tensors that remembers its encodings.

It matches the interface of transformers' `BatchEncoding`, and is a real `dict`, so `model(**batch)`
and every collator take it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy
import torch

from ..errors import ArgumentError, InputError


class BatchEncoding(dict[str, Any]):
    """`input_ids` [b, s] and what goes with them, under names that are attributes too.

    Made by calling a tokenizer it also knows how tokens and characters correspond
    (`char_to_token`, `word_ids`, ...); such a question asked of any other raises `ArgumentError`.
    """

    def __init__(
        self,
        data: dict[str, Any] | None = None,
        encodings: Sequence[Any] | None = None,
        *,
        tensor_type: str | None = None,
    ) -> None:
        super().__init__(data or {})
        self._encodings = None if encodings is None else list(encodings)
        self.convert_to_tensors(tensor_type)

    def __getattr__(self, name: str) -> Any:
        if name in self and not name.startswith("_"):
            return self[name]
        raise AttributeError(f"this batch has no {name!r}; it has {sorted(self)}")

    def __getitem__(self, item: Any) -> Any:
        """A value by its name, the encoding of a row by its number, a part of each by a slice."""
        if isinstance(item, int):
            return self._rows()[item]
        if isinstance(item, slice):
            return {name: value[item] for name, value in self.items()}
        return super().__getitem__(item)

    @property
    def data(self) -> dict[str, Any]:
        return self

    @property
    def is_fast(self) -> bool:
        return self._encodings is not None

    @property
    def encodings(self) -> list[Any] | None:
        return self._encodings

    @property
    def n_sequences(self) -> int | None:
        return self._encodings[0].n_sequences if self._encodings else None

    def tokens(self, batch_index: int = 0) -> list[str]:
        return list(self._rows()[batch_index].tokens)

    def sequence_ids(self, batch_index: int = 0) -> list[int | None]:
        return list(self._rows()[batch_index].sequence_ids)

    def word_ids(self, batch_index: int = 0) -> list[int | None]:
        return list(self._rows()[batch_index].word_ids)

    def char_to_token(
        self, batch_or_char_index: int, char_index: int | None = None, sequence_index: int = 0
    ) -> int | None:
        """The token that holds a character of the row's text, or None where no token does."""
        row, char = _row_and(batch_or_char_index, char_index)
        token: int | None = self._rows()[row].char_to_token(char, sequence_index)
        return token

    def token_to_chars(
        self, batch_or_token_index: int, token_index: int | None = None
    ) -> tuple[int, int] | None:
        """The characters [start, end) of a token, or None for one that came from no text."""
        row, token = _row_and(batch_or_token_index, token_index)
        found = self._rows()[row].token_to_chars(token)
        return None if found is None else (found[0], found[1])

    def token_to_word(
        self, batch_or_token_index: int, token_index: int | None = None
    ) -> int | None:
        row, token = _row_and(batch_or_token_index, token_index)
        word: int | None = self._rows()[row].word_ids[token]
        return word

    def token_to_sequence(
        self, batch_or_token_index: int, token_index: int | None = None
    ) -> int | None:
        row, token = _row_and(batch_or_token_index, token_index)
        sequence: int | None = self._rows()[row].token_to_sequence(token)
        return sequence

    def convert_to_tensors(self, tensor_type: str | None = None) -> BatchEncoding:
        """Every value as a tensor of `tensor_type` ("pt", "np"), in place; None changes nothing.

        Raises `InputError` for rows of different lengths.
        """
        if tensor_type is None:
            return self
        kind = str(getattr(tensor_type, "value", tensor_type))
        if kind not in ("pt", "np"):
            raise ArgumentError(f"return_tensors is {kind!r}; expected 'pt', 'np' or None")
        for name, value in self.items():
            try:
                self[name] = _as_torch(value) if kind == "pt" else _as_numpy(value)
            except (ValueError, TypeError) as problem:
                raise InputError(
                    f"{name!r} makes no tensor ({problem}); rows of different lengths need "
                    "padding=True or truncation=True"
                ) from None
        return self

    def to(self, device: Any, *, non_blocking: bool = False) -> BatchEncoding:
        """This batch with its tensors on `device`, in place, and itself, as transformers does."""
        if not isinstance(device, str | int | torch.device):
            raise ArgumentError(f"to() moves a batch to a device, not to {device!r}")
        for name, value in self.items():
            if isinstance(value, torch.Tensor):
                self[name] = value.to(device, non_blocking=non_blocking)
        return self

    def _rows(self) -> list[Any]:
        if self._encodings is None:
            raise ArgumentError(
                "this batch was not made by calling a tokenizer, so it does not know its text"
            )
        return self._encodings


def _row_and(first: int, second: int | None) -> tuple[int, int]:
    return (0, first) if second is None else (first, second)


def _as_torch(value: Any) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, list) and value and isinstance(value[0], numpy.ndarray | torch.Tensor):
        return torch.stack([torch.as_tensor(row) for row in value])
    tensor = torch.as_tensor(value)
    return tensor if tensor.numel() else tensor.long()


def _as_numpy(value: Any) -> Any:
    array = numpy.asarray(value)
    return array if array.size else array.astype(numpy.int64)
