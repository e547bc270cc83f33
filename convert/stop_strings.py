"""Stop strings: a row ends with the token that completes one of them in its text."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..errors import ArgumentError


def stop_strings(
    strings: str | Sequence[str], tokenizer: Any
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function ids [b, s] -> bool [b]: did the last token complete one of `strings`?

    As transformers' `StopStringCriteria`: the string may begin in the prompt, and may end within
    the last token, but one that was complete before that token does not count again. Texts are
    compared, special tokens spelled out. It reads the ids on the host. Raises ArgumentError.
    """
    wanted = [strings] if isinstance(strings, str) else list(strings)
    if not wanted or not all(isinstance(text, str) and text for text in wanted):
        raise ArgumentError(f"stop_strings is {strings!r}, expected a text or texts, none empty")
    if tokenizer is None:
        raise ArgumentError(
            "stop_strings needs the tokenizer: pass tokenizer= (this model carries none)"
        )
    # A token gives a byte or more, but for a few that give nothing.
    reach = max(len(text.encode()) for text in wanted) + 8

    def completed(row: list[int]) -> bool:
        before = tokenizer.decode(row[:-1], skip_special_tokens=False)
        after = tokenizer.decode(row, skip_special_tokens=False)
        # The last token may also change what stood for an unfinished character before it.
        old = 0
        while old < min(len(before), len(after)) and before[old] == after[old]:
            old += 1
        return any(after.find(text, max(0, old - len(text) + 1)) >= 0 for text in wanted)

    def stop(ids: torch.Tensor) -> torch.Tensor:
        return torch.tensor([completed(row) for row in ids[:, -reach:].tolist()])

    return stop
