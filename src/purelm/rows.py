"""Training rows as token ids: what is read, what of it is learned, and batches of both.

A row is a conversation (`messages`, learned where the chat template's own spans say that the
assistant speaks), a `prompt` with its `completion` (only the completion is learned), or a `text`
(all of it is). The latter two get the tokenizer's end token. Nothing is cut unless asked for.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import torch

from .convert.assistant_turns import assistant_spans, token_mask
from .convert.tokenizer import Tokenizer
from .errors import DataError, TemplateError
from .nn.loss import IGNORE
from .row_files import RawRow

TooLong = Literal["error", "truncate", "skip"]
_KINDS = {"messages": ("messages",), "prompt": ("prompt", "completion"), "text": ("text",)}
_EXPECTED = "expected messages, prompt and completion, or text"


@dataclass(frozen=True, slots=True)
class Row:
    """Token ids and, at the same places, what is learned: the id itself or -100.

    Raises DataError where they are not as many.
    """

    ids: tuple[int, ...]
    labels: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.labels):
            raise DataError(
                f"a row has {len(self.ids)} ids and {len(self.labels)} labels; expected a label "
                "for each id, -100 where it is not learned"
            )

    @property
    def learned(self) -> int:
        """How many tokens are predicted and learned; nothing predicts the first."""
        return sum(label != IGNORE for label in self.labels[1:])


@dataclass(frozen=True, slots=True)
class Rows:
    """Encoded rows, and how many of the file's were left out or cut because they were too long."""

    rows: tuple[Row, ...]
    skipped: int = 0
    truncated: int = 0


def encode(
    raw: Iterable[RawRow], tokenizer: Tokenizer, *, max_length: int, too_long: TooLong = "error"
) -> Rows:
    """All rows as ids of at most `max_length` tokens.

    Raises DataError, which shows the row, for keys or values that are no row, for rows of more
    than one kind, for a longer row (unless it is to be cut or skipped), and for a row of which
    nothing is left to learn.
    """
    rows, skipped, truncated, kind = [], 0, 0, None
    for one in raw:
        found = _kind(one)
        if kind is not None and found != kind:
            before, now = " and ".join(_KINDS[kind]), " and ".join(_KINDS[found])
            raise one.error(f"the rows before have {before}, this one {now}")
        kind = found
        row = _ENCODERS[kind](one, tokenizer)
        if len(row.ids) > max_length:
            if too_long == "error":
                raise one.error(
                    f"the row has {len(row.ids)} tokens, more than max_seq_length {max_length}; "
                    "raise it, or cut (--truncate) or leave out (--skip-long) such rows"
                )
            if too_long == "skip":
                skipped += 1
                continue
            truncated += 1
            row = Row(row.ids[:max_length], row.labels[:max_length])
        if row.learned == 0:
            raise one.error("nothing is left to learn in this row: every token is masked")
        rows.append(row)
    if not rows:
        raise DataError(f"all {skipped} rows are longer than max_seq_length {max_length}")
    return Rows(tuple(rows), skipped, truncated)


def _kind(raw: RawRow) -> str:
    # A dataset in columns gives every row every column: None is an absent key.
    present = {key for key, value in raw.value.items() if value is not None}
    kinds = [kind for kind, keys in _KINDS.items() if present & set(keys)]
    if len(kinds) != 1:
        found = ", ".join(sorted(present)) or "no keys"
        raise raw.error(
            f"the row has {found}; {_EXPECTED}" + (", only one of them" if kinds else "")
        )
    missing = [key for key in _KINDS[kinds[0]] if key not in present]
    if missing:
        raise raw.error(f"the row has no {missing[0]}; {_EXPECTED}")
    return kinds[0]


def _text(raw: RawRow, key: str) -> str:
    value = raw.value[key]
    if not isinstance(value, str):
        raise raw.error(f"{key} is a {type(value).__name__}, expected a text")
    return value


def _encode_messages(raw: RawRow, tokenizer: Tokenizer) -> Row:
    messages = checked_messages(raw)
    tools = raw.value.get("tools")
    try:
        template = tokenizer.get_chat_template(tools=tools)
        rendered = assistant_spans(
            template, messages, tools=tools, special_tokens=tokenizer.special_tokens_map
        )
    except TemplateError as problem:
        raise raw.error(f"the chat template cannot write this row: {problem}") from None
    encoded = tokenizer(
        rendered.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    ids: list[int] = encoded["input_ids"]
    mask = token_mask(encoded["offset_mapping"], rendered.spans)
    labels = [i if learn else IGNORE for i, learn in zip(ids, mask, strict=True)]
    return Row(tuple(ids), tuple(labels))


def checked_messages(raw: RawRow) -> list[dict[str, Any]]:
    """The row's `messages`; raises DataError where they are no conversation."""
    messages = raw.value["messages"]
    if not isinstance(messages, list) or not messages:
        raise raw.error("messages is not a list with at least one message")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise raw.error(f"message {number} is not an object with a role and a content")
        content = message.get("content")
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise raw.error(
                f"the content of message {number} is a {type(content).__name__}, expected a text"
            )
    return messages


def _encode_completion(raw: RawRow, tokenizer: Tokenizer) -> Row:
    prompt, completion = _text(raw, "prompt"), _text(raw, "completion")
    encoded = tokenizer(prompt + completion, return_offsets_mapping=True, verbose=False)
    ids: list[int] = list(encoded["input_ids"])
    # Tokens of the completion's characters; one that straddles the border is learned too. Special
    # tokens that the tokenizer adds in front have no characters.
    learn = [end > len(prompt) for _, end in encoded["offset_mapping"]]
    labels = [i if learned else IGNORE for i, learned in zip(ids, learn, strict=True)]
    return _ended(ids, labels, tokenizer)


def _encode_text(raw: RawRow, tokenizer: Tokenizer) -> Row:
    ids: list[int] = list(tokenizer(_text(raw, "text"), verbose=False)["input_ids"])
    return _ended(ids, list(ids), tokenizer)


def _ended(ids: list[int], labels: list[int], tokenizer: Tokenizer) -> Row:
    end = tokenizer.eos_token_id
    if end is not None:
        if ids and ids[-1] == end:
            labels[-1] = end
        else:
            ids.append(end)
            labels.append(end)
    return Row(tuple(ids), tuple(labels))


_ENCODERS = {"messages": _encode_messages, "prompt": _encode_completion, "text": _encode_text}


def collate(rows: Sequence[Row], pad_id: int) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask and labels, each [b, s] int64, padded on the right."""
    width = max(len(row.ids) for row in rows)

    def padded(values: Iterable[Sequence[int]], fill: int) -> torch.Tensor:
        return torch.tensor([[*value, *[fill] * (width - len(value))] for value in values])

    return {
        "input_ids": padded((row.ids for row in rows), pad_id),
        "attention_mask": padded(([1] * len(row.ids) for row in rows), 0),
        "labels": padded((row.labels for row in rows), IGNORE),
    }


def pack(rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    """The rows behind one another in one row without padding: input_ids and labels [1, t] int64,
    cu_seqlens [rows + 1] int32. What `collate` gives, for a model that keeps documents apart.
    """
    ends = torch.tensor([0, *(len(row.ids) for row in rows)]).cumsum(0)

    def joined(values: Iterable[Sequence[int]]) -> torch.Tensor:
        return torch.tensor([list(chain.from_iterable(values))])

    return {
        "input_ids": joined(row.ids for row in rows),
        "cu_seqlens": ends.int(),
        "labels": joined(row.labels for row in rows),
    }


def digest(rows: Sequence[Row]) -> str:
    """A sha256 of every id and label in order."""
    total = hashlib.sha256()
    for row in rows:
        total.update(len(row.ids).to_bytes(8, "little"))
        total.update(array("q", (*row.ids, *row.labels)).tobytes())
    return total.hexdigest()


def split(rows: Sequence[Any], fraction: float, seed: int) -> tuple[list[Any], list[Any]]:
    """(rows to train on, rows to evaluate on): `fraction` of them, at least one, drawn by seed."""
    count = max(1, round(len(rows) * fraction))
    if count >= len(rows):
        raise DataError(
            f"an evaluation fraction of {fraction} of {len(rows)} rows leaves none to train on"
        )
    generator = torch.Generator().manual_seed(seed)
    held_out = set(torch.randperm(len(rows), generator=generator)[:count].tolist())
    train = [row for i, row in enumerate(rows) if i not in held_out]
    return train, [row for i, row in enumerate(rows) if i in held_out]
