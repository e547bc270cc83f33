"""The prompt of a `generate` call, and how many tokens may follow it."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch

from ..errors import ArgumentError, InputError
from .bridge import CausalLM

# transformers' default where neither file nor call says how many.
DEFAULT_NEW_TOKENS = 20


def check_shapes(ids: Any, mask: Any) -> None:
    for name, value in (("input_ids", ids), ("attention_mask", mask)):
        if value is None:
            continue
        if not isinstance(value, torch.Tensor):
            raise InputError(
                f"{name} is a {type(value).__name__}, expected a tensor [batch, length]; "
                "tokenize with return_tensors='pt'"
            )
        if value.ndim != 2 or value.numel() == 0:
            raise InputError(
                f"{name} has shape {list(value.shape)}, expected [batch, length] with tokens"
            )


def begin(bos: Any, attention_mask: torch.Tensor | None) -> torch.Tensor:
    if bos is None or attention_mask is not None:
        raise ArgumentError("no prompt: pass input_ids, or bos_token_id to begin with that")
    return torch.tensor([[int(bos)]])


def new_tokens(
    model: CausalLM,
    ids: torch.Tensor,
    mask: torch.Tensor | None,
    max_new_tokens: int | None,
    max_length: int | None,
    given: Mapping[str, Any],
    own: Mapping[str, Any],
) -> int:
    """How many tokens at most, from the first place that says so."""
    width = ids.shape[1]
    for new, total in (
        (max_new_tokens, max_length),
        (given.get("max_new_tokens"), given.get("max_length")),
    ):
        if new is not None:
            return new
        if total is not None:
            return _after_prompt(total, width)
    new = own.get("max_new_tokens")
    if new is None:
        total = own.get("max_length")
        if total is not None:
            new = _after_prompt(total, width)
        else:
            warnings.warn(
                f"nothing says how much to generate: {DEFAULT_NEW_TOKENS} tokens, as in "
                "transformers; pass max_new_tokens",
                UserWarning,
                stacklevel=3,
            )
            new = DEFAULT_NEW_TOKENS
    longest = width if mask is None else int(mask.bool().sum(-1).max())
    room = model.spec.max_positions - longest
    return min(new, room) if room > 0 else int(new)


def _after_prompt(total: int, width: int) -> int:
    if total <= width:
        raise InputError(
            f"max_length is {total} and the prompt has {width} tokens: nothing is left to "
            "generate; pass max_new_tokens"
        )
    return total - width
