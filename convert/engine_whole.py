"""Whole prompts of the engine, run into their blocks in passes that a GPU replays."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ..nn import pages, prompt_pass
from ..nn.kept_steps import KeptSteps, with_room
from ..nn.pages import PAGE
from ..nn.prompt_pass import PromptPass
from .engine_behind import Behind
from .engine_request import Running

if TYPE_CHECKING:
    from .engine_rows import EngineRows

# How many kinds of passes are kept.
PASSES = 32


class Whole:
    """Prompts of `rows` from their beginnings on, or from where they are known."""

    def __init__(self, rows: EngineRows) -> None:
        self.rows = rows
        self.behind = Behind(rows)
        self._passes = KeptSteps(PASSES)
        self._covered: bool | None = None

    def forget(self) -> None:
        """The weights lie elsewhere, or nobody knows what a pass has written."""
        self._passes.clear()
        self._covered = None

    def covers(self, group: Sequence[Running]) -> bool:
        """Can `run` run the prompts of these requests, which have their blocks?"""
        if not self.rows.pads:
            return False
        if any(r.known for r in group):
            return self.behind.covers(group)
        spec, weights = self.rows.model.spec, self.rows.weights
        count, longest = prompt_pass.rows_of(len(group)), max(len(r.ids) for r in group)
        if not prompt_pass.fits(spec, count, longest):
            return False
        if self._covered is None:
            self._covered = prompt_pass.covers(weights.params, spec, weights.adapters)
        return self._covered

    def run(self, group: Sequence[Running]) -> torch.Tensor:
        """Run the prompts, or what is not known of them, into the requests' blocks, replayed where
        others of so many rows and tokens have run; the logits [b, v] of what follows, which the
        next run overwrites.
        """
        self.rows.look()
        if group[0].known:
            return self.behind.run(group)
        rows, weights = self.rows, self.rows.weights
        spec, device = rows.model.spec, rows.model.device
        assert rows.pages is not None
        count = prompt_pass.rows_of(len(group))
        length = prompt_pass.length_of(spec, max(len(r.ids) for r in group))
        own = self._passes.take(PromptPass, (count, length))
        if own is None:
            how: Any = {"columns": rows.columns, "device": device}
            made = partial(PromptPass, weights.params, spec, count, length, **how)
            own = with_room(self._passes, made)
        # Block 0 takes what is padding.
        table = torch.zeros((count, own.cache.capacity // PAGE), dtype=torch.int64)
        tokens = torch.zeros((count, length), dtype=torch.int64)
        last = torch.zeros(count, dtype=torch.int64)
        for i, running in enumerate(group):
            size = len(running.ids)
            used = running.blocks[: -(-size // PAGE)]
            tokens[i, :size], last[i] = torch.tensor(running.ids), size - 1
            table[i, : len(used)] = torch.tensor(used)
        own.tokens.copy_(tokens, non_blocking=True)
        own.last.copy_(last, non_blocking=True)
        logits = own.run(weights.params, spec, weights.adapters, graphs=rows.graphs)
        pages.fill(rows.pages, own.cache, table.flatten().to(device, non_blocking=True))
        self._passes.give((count, length), own)
        return logits[: len(group)]
