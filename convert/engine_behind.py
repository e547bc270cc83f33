"""Prompts of which the engine's cache has all but the end, as those of a conversation that goes on.

What is left of them is run as a step of decoding: a prompt's tokens are rows of their own, one
longer than the other, over its blocks. That reads and writes where the blocks are, and is replayed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ..nn import decode, pages
from ..nn.cache import spread
from ..nn.pages import PAGE
from .engine_request import Running

if TYPE_CHECKING:
    from .engine_rows import EngineRows

# So many tokens are run so, all prompts together: up to there 4-bit products stay packed. Each
# reads the whole cache before it; beyond so many tokens read, a pass over all of them is faster.
MOST, READ = 64, 1 << 18
LEAST = 8


class Behind:
    """Passes over the ends of prompts, into the blocks of `rows`."""

    def __init__(self, rows: EngineRows) -> None:
        self.rows = rows
        # By prompts and tokens of each: those and their places, the blocks, and the last tokens.
        self._inputs: dict[tuple[int, int], tuple[torch.Tensor, ...]] = {}

    def covers(self, group: Sequence[Running]) -> bool:
        """Whether all of them have beginnings that are known, and little behind."""
        count, wide = _shape(group)
        tokens, longest = count * wide, max(len(r.ids) for r in group)
        return all(r.known for r in group) and tokens <= MOST and tokens * longest <= READ

    def run(self, group: Sequence[Running]) -> torch.Tensor:
        """The logits [b, v] of what follows each prompt, which the next run overwrites."""
        own, weights, spec = self.rows.pages, self.rows.weights, self.rows.model.spec
        assert own is not None
        count, wide = _shape(group)
        blocks = max(-(-len(r.ids) // PAGE) for r in group)
        width = self.rows.width_of(blocks)
        if (count, wide) not in self._inputs:
            shapes = (count, wide), (count, wide), (count, own.table.shape[1]), (count,)
            device = self.rows.model.device
            self._inputs[count, wide] = tuple(
                torch.zeros(shape, dtype=torch.int64, device=device) for shape in shapes
            )
        inputs = self._inputs[count, wide]
        given = tuple(torch.zeros(x.shape, dtype=torch.int64) for x in inputs)
        tokens, end, table, last = given
        for i, running in enumerate(group):
            begin, size = running.known * PAGE, len(running.ids)
            # What is left of the width does again what the last does, in the same place.
            tokens[i], end[i], last[i] = running.ids[-1], size - 1, size - begin - 1
            tokens[i, : size - begin] = torch.tensor(running.ids[begin:])
            end[i, : size - begin] = torch.arange(begin, size)
            table[i, : len(running.blocks)] = torch.tensor(running.blocks)
        for ours, theirs in zip(inputs, given, strict=True):
            ours.copy_(theirs, non_blocking=True)
        params, adapters = weights.params, weights.adapters

        def step() -> torch.Tensor:
            tokens, end, table, last = inputs
            rows = torch.arange(count, device=end.device)
            cache = replace(
                pages.view(own, 1, width), first=torch.zeros_like(last), table=table[:, :width]
            )
            cache = spread(cache, end)
            logits, _ = decode.decode(params, spec, tokens.flatten(), cache, adapters=adapters)
            return logits.view(count, wide, -1)[rows, last]

        return self.rows.replayed(("behind", count, wide, width), step)[: len(group)]


def _shape(group: Sequence[Running]) -> tuple[int, int]:
    """How many prompts a pass has, and tokens of each: powers of two, for few graphs."""
    longest = max(len(r.ids) - r.known * PAGE for r in group)
    return 1 << (len(group) - 1).bit_length(), max(LEAST, 1 << (longest - 1).bit_length())
