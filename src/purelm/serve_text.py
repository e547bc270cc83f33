"""An answer's text as its tokens come: whole characters, and nothing from a stop string on."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .convert.streamer import TextStreamer
from .convert.tokenizer import Tokenizer


class AnswerText(TextStreamer):
    """`take` each token and `finish`; both give the text that is certain by then.

    What may be the beginning of a stop string is held back until it is known not to be.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.stops = tuple(stops)
        self.stopped = False
        self._held = ""
        self.put(torch.tensor(prompt))

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._held += text

    def take(self, token: int) -> str:
        self.put(torch.tensor([token]))
        return self._certain(final=False)

    def finish(self) -> str:
        self.end()
        return self._certain(final=True)

    def _certain(self, final: bool) -> str:
        if self.stopped:
            return ""
        found = [at for at in (self._held.find(stop) for stop in self.stops) if at >= 0]
        if found:
            self.stopped = True
            return self._held[: min(found)]
        kept = 0 if final else max((begun(self._held, stop) for stop in self.stops), default=0)
        out, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        return out


def begun(text: str, stop: str) -> int:
    """How many characters at the end of text begin `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
