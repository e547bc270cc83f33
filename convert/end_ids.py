"""Which tokens end an answer: what the call says, or all that a model's files name."""

from pathlib import Path
from typing import Any

import torch

from ..errors import ArgumentError, ConfigError, TemplateError
from .config import Config
from .tokenizer import Tokenizer


def end_ids(asked: Any, generation_config: Config, config: Config, tokenizer: Any) -> list[int]:
    """The ids that end a row: those asked for, else all that the model's files name.

    Raises ArgumentError, or ConfigError where a file has something else.
    """
    if asked is not None:
        return _as_ids(asked, "eos_token_id")
    # The generation config may be made of the config, whose file is then the one to name.
    of_config = _of_file(config, "config.json")
    found = [
        *_of_file(generation_config, "generation_config.json"),
        *of_config,
        getattr(tokenizer, "eos_token_id", None),
        end_of_turn(tokenizer) if isinstance(tokenizer, Tokenizer) else None,
    ]
    return list(dict.fromkeys(i for i in found if i is not None))


def _of_file(config: Config, name: str) -> list[int]:
    value = config.get("eos_token_id")
    try:
        return [] if value is None else _as_ids(value, "eos_token_id")
    except ArgumentError as problem:
        raise ConfigError(str(problem), file=Path(config.name_or_path) / name) from None


def end_of_turn(tokenizer: Tokenizer) -> int | None:
    """The special token that the chat template writes after an answer; None without one.

    A model tuned on that template ends its answers with this token, whatever eos its files name.
    """
    if tokenizer.chat_template is None:
        return None
    answer = "answer"
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": answer}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except TemplateError:
        # A template that takes no plain turn (or several templates without a default) names no end.
        return None
    ids = tokenizer(text.rpartition(answer)[2].strip(), add_special_tokens=False)["input_ids"]
    return ids[0] if ids and ids[0] in _special_ids(tokenizer) else None


def _special_ids(tokenizer: Tokenizer) -> set[int]:
    added = tokenizer.added_tokens_decoder.items()
    return {index for index, token in added if token.special} | set(tokenizer.all_special_ids)


def _as_ids(value: Any, name: str) -> list[int]:
    values = value.tolist() if isinstance(value, torch.Tensor) else value
    values = values if isinstance(values, list | tuple) else [values]
    if not all(isinstance(v, int) and not isinstance(v, bool) for v in values):
        raise ArgumentError(f"{name} is {value!r}, expected a token id or a list of them")
    # -1 is what callers write for "none".
    return [v for v in values if v >= 0]
