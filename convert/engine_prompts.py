"""The way of requests into the engine: who waits, and the prompts that are run for them."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from typing import Any

import torch

from ..nn import decode, decoder
from ..nn.cache import Cache
from ..nn.pages import PAGE
from ..nn.prompt import layout_of
from ..nn.prompt_pass import MOST
from .engine_request import Event, Running, failed, next_token, next_tokens
from .engine_rows import EngineRows

# So many tokens take a GPU no longer than a few: up to there padding costs nothing.
FREE = 512


class Prompts:
    """Requests that wait for one of the `rows`, and the one whose prompt is being run in pieces,
    with what there is of it. piece: how many tokens of prompts are run between two steps.

    `waiting` may be appended to by other threads.
    """

    def __init__(self, rows: EngineRows, piece: int) -> None:
        self.rows, self.piece = rows, piece
        self.waiting: deque[Running] = deque()
        self.under_way: tuple[Running, Cache] | None = None

    @property
    def running(self) -> int:
        """How many rows are taken."""
        return len(self.rows.rows) + (self.under_way is not None)

    def drop(self, ids: Collection[int]) -> list[Running]:
        """The requests of these ids, which wait no longer."""
        gone = [r for r in list(self.waiting) if r.id in ids]
        for running in gone:
            self.waiting.remove(running)
        if self.under_way is not None and self.under_way[0].id in ids:
            gone.append(self.under_way[0])
            self.rows.release(self.under_way[0])
            self.under_way = None
        return gone

    def admit(self) -> list[Event]:
        """Run what is next of the prompts of those that find a slot."""
        events: list[Event] = []
        left = self.piece
        if self.rows.pads and not self.rows.rows:
            left = max(left, MOST)  # there is nobody whom a longer pass keeps waiting
        while left > 0:
            if self.under_way is None:
                group = self._next_prompts(left, events)
                if group is None:
                    break
                if len(group) > 1 or (group and self._whole(group[0], left)):
                    left -= self._begin_together(group, events)
                elif group:
                    left -= self._begin(group[0], min(left, self.piece), events)
                continue
            (running, cache), self.under_way = self.under_way, None
            left -= self._go_on(running, cache, min(left, self.piece), events)
        return events

    def _begin_together(self, group: Sequence[Running], events: list[Event]) -> int:
        """Run whole prompts in one pass, or, where that fails, one by one, so that none suffers
        from another; how many tokens that took, with padding.
        """
        longest = max(len(r.ids) for r in group)
        cache: Cache | None = None
        logits: torch.Tensor | None
        try:
            if self.rows.whole.covers(group):
                longest -= group[0].known * PAGE
                logits = self.rows.whole.run(group)
            else:
                cache = self.rows.stage(group)
                longest -= cache.length
                logits, cache = self._prefill(group, cache, longest)
        except (RuntimeError, ValueError):
            return sum(self._begin(r, len(r.ids), events) for r in group)
        assert logits is not None
        for at, (running, event) in enumerate(zip(group, next_tokens(group, logits), strict=True)):
            self._enter(running, event, cache, at, events)
        return longest * len(group)

    def _begin(self, running: Running, most: int, events: list[Event]) -> int:
        """Run the first `most` tokens of a prompt at the most; how many it were."""
        try:
            cache = self.rows.stage([running])
        except (RuntimeError, ValueError) as problem:
            self._end(running, failed(running, problem), events)
            return 0
        return self._go_on(running, cache, most, events)

    def _go_on(self, running: Running, cache: Cache, most: int, events: list[Event]) -> int:
        """Run the next `most` tokens of a prompt at the most; how many it were."""
        count = min(most, len(running.ids) - cache.length)
        try:
            logits, cache = self._prefill([running], cache, count)
        except (RuntimeError, ValueError) as problem:
            self._end(running, failed(running, problem), events)
            return count
        if logits is None:
            self.under_way = running, cache
        else:
            self._enter(running, next_token(running, logits), cache, 0, events)
        return count

    def _whole(self, running: Running, most: int) -> bool:
        """Is the prompt run in one pass, of at most so many tokens?"""
        left = len(running.ids) - running.known * PAGE
        return left <= most and self.rows.whole.covers([running])

    def _enter(
        self, running: Running, event: Event, cache: Cache | None, at: int, events: list[Event]
    ) -> None:
        """A prompt has been run, in row `at` of `cache` or into its blocks; the event of its first
        token."""
        try:
            if event.finish is None:
                self.rows.enter(running, cache, at)
        except (RuntimeError, ValueError) as problem:
            event = failed(running, problem)
        if event.finish is None:
            events.append(event)
        else:
            self._end(running, event, events)

    def _end(self, running: Running, event: Event, events: list[Event]) -> None:
        """A request's last event comes before it has a row."""
        events.append(event)
        running.ended = True
        self.rows.release(running)

    def _next_prompts(self, budget: int, events: list[Event]) -> list[Running] | None:
        """Those that are to run next, which have their blocks: one, or several whose whole prompts
        fit into `budget` tokens of one pass. None where none waits or there is no room; nobody
        where the next fails, whose last event is noted.
        """
        group: list[Running] = []
        while self.waiting and self.running + len(group) < self.rows.most:
            running = self.waiting[0]
            if not group and budget < self.piece and self._to_run(running) > budget:
                break  # with all of a later step's pieces it takes fewer passes
            try:
                if group and not self._goes_with(running, group, budget):
                    break
                if not self.rows.reserve(running):
                    break
            except (RuntimeError, ValueError) as problem:
                self.waiting.popleft()
                self._end(running, failed(running, problem), events)
                return group
            self.waiting.popleft()
            group.append(running)
        return group or None

    def _to_run(self, running: Running) -> int:
        """How many tokens of a prompt nobody has run."""
        return len(running.ids) - self.rows.blocks.known(self.rows.names_of(running)) * PAGE

    def _goes_with(self, running: Running, group: Sequence[Running], budget: int) -> bool:
        """Can the prompt be run in one pass with those of the group, which have their blocks, in
        `budget` tokens with the padding, and would not rather wait for what they have in common?

        Behind a known beginning all must be as long: no padding may stand within a row.
        """
        first, size = group[0].known, len(running.ids)
        mine = self.rows.names_of(running)
        if self.rows.blocks.known(mine) != first:
            return False
        if first and size != len(group[0].ids):
            return False
        longest = max(size, *(len(r.ids) for r in group)) - first * PAGE
        padded = (len(group) + 1) * longest
        real = size + sum(len(r.ids) for r in group) - (len(group) + 1) * first * PAGE
        if padded > budget or padded > max(FREE, 2 * real):
            return False
        others = {name for r in group for name in self.rows.names_of(r)[first : first + 1]}
        return not others.intersection(mine[first : first + 1])

    def _prefill(
        self, group: Sequence[Running], cache: Cache, count: int
    ) -> tuple[torch.Tensor | None, Cache]:
        """Run the next `count` tokens of each prompt, padding in front of the shorter ones: the
        logits [b, v] after their last, or None.
        """
        self.rows.look()
        longest, device = max(len(r.ids) for r in group), self.rows.model.device
        rows = [[*[0] * (longest - len(r.ids)), *r.ids] for r in group]
        tokens = torch.tensor(rows)[:, cache.length : cache.length + count].to(device)
        layout = None
        if cache.segments is not None:
            begin = torch.tensor([longest - len(r.ids) for r in group])[:, None]
            layout = layout_of(tokens, (torch.arange(longest) >= begin).to(device))
        args = self.rows.weights.params, self.rows.model.spec, tokens, cache
        how: dict[str, Any] = {"layout": layout, "adapters": self.rows.weights.adapters}
        if cache.length + count < longest:
            return None, decoder.extend(*args, **how)[1]
        return decode.prefill(*args, **how)
