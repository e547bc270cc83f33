"""The prompt of a `generate` call, and how many tokens may follow it."""

import warnings
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import ArgumentError, InputError
from .bridge import CausalLM
from .generation_keywords import Settings

# transformers' default where neither file nor call says how many.
DEFAULT_NEW_TOKENS = 20
# Whoever calls `model.generate`, seen from a warning here: through it, `generate` and `_answers`.
CALLER = 5


@dataclass(frozen=True, slots=True)
class Prompts:
    """ids [b, s] and their mask [b, s], where there is one; pad_id: where something names one."""

    ids: torch.Tensor
    mask: torch.Tensor | None
    pad_id: int | None

    def copied(self, times: int) -> "Prompts":
        """Each of them so many times."""
        mask = None if self.mask is None else self.mask.repeat_interleave(times, 0)
        return Prompts(self.ids.repeat_interleave(times, 0), mask, self.pad_id)


def prompts_of(
    model: CausalLM,
    ids: torch.Tensor | None,
    mask: torch.Tensor | None,
    setting: Settings,
    eos: Collection[int],
    tokenizer: Any,
) -> Prompts:
    """The call's prompts, or one that begins with bos_token_id; raises ArgumentError, InputError.

    Without a mask, pads are taken for padding unless they also end a row.
    """
    pad = setting.whole("pad_token_id", model.config.pad_token_id)
    if pad is None:
        pad = getattr(tokenizer, "pad_token_id", None)
    if ids is None:
        ids = _begin(setting("bos_token_id", model.config.bos_token_id), mask)
    _check_shapes(ids, mask)
    if mask is None and pad is not None and pad not in eos:
        mask = (ids != pad).long()
    return Prompts(ids, mask, pad)


def _check_shapes(ids: Any, mask: Any) -> None:
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


def _begin(bos: Any, attention_mask: torch.Tensor | None) -> torch.Tensor:
    if bos is None or attention_mask is not None:
        raise ArgumentError("no prompt: pass input_ids, or bos_token_id to begin with that")
    return torch.tensor([[int(bos)]])


def new_tokens(model: CausalLM, prompts: Prompts, setting: Settings) -> int:
    """How many tokens at most, from the first place that says so."""
    width = prompts.ids.shape[1]
    for place in (setting.call, setting.given):
        new, total = place.get("max_new_tokens"), place.get("max_length")
        if new is not None:
            return new  # type: ignore[no-any-return]
        if total is not None:
            return _after_prompt(total, width)
    new, total = setting.own.get("max_new_tokens"), setting.own.get("max_length")
    if new is None and total is not None:
        new = _after_prompt(total, width)
    if new is None:
        warnings.warn(
            f"nothing says how much to generate: {DEFAULT_NEW_TOKENS} tokens, as in "
            "transformers; pass max_new_tokens",
            UserWarning,
            stacklevel=CALLER,
        )
        new = DEFAULT_NEW_TOKENS
    longest = width if prompts.mask is None else int(prompts.mask.bool().sum(-1).max())
    room = model.spec.max_positions - longest
    return int(min(new, room) if room > 0 else new)


def least_tokens(prompts: Prompts, setting: Settings) -> int:
    """How many new tokens there are before one may end a row."""
    shortest = max(0, (setting.whole("min_length", 0) or 0) - prompts.ids.shape[1])
    return setting("min_new_tokens", shortest)  # type: ignore[no-any-return]


def _after_prompt(total: Any, width: int) -> int:
    if not isinstance(total, int):
        raise ArgumentError(f"max_length is {total!r}, expected a whole number")
    if total <= width:
        raise InputError(
            f"max_length is {total} and the prompt has {width} tokens: nothing is left to "
            "generate; pass max_new_tokens"
        )
    return total - width
