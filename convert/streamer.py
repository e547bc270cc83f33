"""Text as it is generated: an object that `generate` gives the tokens to."""

from typing import Any

import torch

from ..errors import InputError

# Enough ids before a text to decode it as their continuation.
CONTEXT = 8


class TextStreamer:
    """Prints one row's text while it is generated; made and used as transformers' `TextStreamer`.

    decode_kwargs go to `tokenizer.decode`. A token's text appears as soon as its last character is
    whole. For another place than the terminal override `on_finalized_text`.
    """

    def __init__(self, tokenizer: Any, skip_prompt: bool = False, **decode_kwargs: Any) -> None:
        self.tokenizer = tokenizer
        self.skip_prompt = skip_prompt
        self.decode_kwargs = decode_kwargs
        self._reset()

    def _reset(self) -> None:
        self._is_prompt = True
        # The last ids whose text is out, then those whose text is not: decoding both, and the first
        # alone, gives the new text with the spacing that the old ids call for.
        self._old: list[int] = []
        self._new: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt [1, s] or [s] first, then token by token [1]."""
        if value.ndim > 1 and value.shape[0] > 1:
            raise InputError(f"a streamer takes one row, found a batch of {value.shape[0]}")
        prompt, self._is_prompt = self._is_prompt, False
        ids = [int(token) for token in value.flatten().tolist()]
        if prompt and self.skip_prompt:
            # What follows is spaced as it is after the prompt.
            self._old = ids[-CONTEXT:]
            return
        self._new += ids
        self._emit(final=False)

    def end(self) -> None:
        """Give out what is left; a new generation may follow."""
        self._emit(final=True)
        self._reset()
        self.on_finalized_text("", stream_end=True)

    def _emit(self, final: bool) -> None:
        before = self._decode(self._old)
        after = self._decode(self._old + self._new)
        # Bytes of an unfinished character decode to the replacement character.
        if len(after) <= len(before) or (after.endswith("\ufffd") and not final):
            return
        self._old, self._new = self._new, []
        self.on_finalized_text(after[len(before) :])

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, **self.decode_kwargs)) if ids else ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Receives each piece of text, and once `stream_end`."""
        print(text, end="\n" if stream_end else "", flush=True)
