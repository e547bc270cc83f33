"""Tokens guessed ahead of the engine's rows, and the steps that check them.

What a request's next token is drawn by, its own number or none at temperature 0, is known before
the step; so a guess is right or wrong, and a request gets the tokens that it gets without guesses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from ..nn import decode, pages, sample_rows
from ..nn.cache import spread
from ..nn.draft import NGrams
from ..nn.sample_rows import Controls
from .engine_request import Event, Running, failed, next_token, not_finite

if TYPE_CHECKING:
    from .engine_rows import EngineRows

# A step checks at most so many tokens, all rows together: up to there 4-bit products stay packed.
MOST = 64
# Of fewer tokens than these what followed says little.
LEAST = 2
# Who guesses wrong again and again guesses at every so manieth step.
REST = 15


@dataclass(slots=True)
class Guesser:
    """What followed where a request's last tokens stood before, the latest time."""

    how: NGrams
    misses: int = 0
    rest: int = 0
    _noted: int = 0
    _after: dict[tuple[int, ...], int] = field(default_factory=dict)

    def guess(self, ids: Sequence[int], most: int) -> list[int]:
        """Up to `most` tokens that may follow ids; none while it rests."""
        sizes = range(min(LEAST, self.how.longest), self.how.longest + 1)
        for end in range(self._noted + 1, len(ids)):
            for size in sizes:
                if size <= end:
                    self._after[tuple(ids[end - size : end])] = end
        self._noted = max(self._noted, len(ids) - 1)
        if self.rest:
            self.rest -= 1
            return []
        for size in reversed(sizes):
            place = self._after.get(tuple(ids[-size:])) if size <= len(ids) else None
            if place is not None:
                # What has not come yet repeats what is guessed.
                text = list(ids[place : place + most])
                period = len(ids) - place
                while len(text) < most:
                    text.append(text[len(text) - period])
                return text
        return []

    def learn(self, kept: int) -> None:
        """So many of its guesses were right."""
        self.misses = 0 if kept else self.misses + 1
        self.rest = min(REST, 2**self.misses - 1)


class GuessedSteps:
    """Steps over `rows` in which every row has its next token and guesses of those after it."""

    def __init__(self, rows: EngineRows, how: NGrams) -> None:
        self.rows, self.how = rows, how
        self.width = how.tokens + 1
        device, shape = rows.model.device, (rows.most, self.width)
        self._tokens, self._end = torch.zeros((2, *shape), dtype=torch.int64, device=device).unbind(
            0
        )
        self._uniform = torch.zeros(shape, dtype=torch.float64, device=device)
        self._chosen = torch.zeros(shape, dtype=torch.int64, device=device)

    def step(self) -> list[Event] | None:
        """One step of all rows, a token or more each; None where nobody guesses."""
        rows, own, controls = list(self.rows.rows), self.rows.pages, self.rows.controls
        count = self.rows.rows_of_step()
        if count * self.width > MOST:
            return None
        guesses = [self._guesses(running) for running in rows]
        if not any(guesses):
            return None
        assert own is not None and controls is not None
        self.rows.look()
        tokens, end = torch.zeros((2, count, self.width), dtype=torch.int64).unbind(0)
        uniform = torch.zeros((count, self.width), dtype=torch.float64)
        for i, (running, guessed) in enumerate(zip(rows, guesses, strict=True)):
            new, length = [running.ids[-1], *guessed], len(running.ids) - 1
            # What is left of the width does again what the first does, in the same place.
            tokens[i], end[i] = new[0], length
            tokens[i, : len(new)] = torch.tensor(new)
            end[i, : len(new)] += torch.arange(len(new))
            if "draw" in running.rules():
                uniform[i, : len(new)] = torch.tensor(running.draws(len(new)))
        for ours, theirs in ((self._tokens, tokens), (self._end, end), (self._uniform, uniform)):
            ours[:count].copy_(theirs, non_blocking=True)
        needs = frozenset[str]().union(*(r.rules() for r in rows))
        logits = self._run(count, self.rows.width_of_step(self.width), needs)
        events: list[Event] = []
        for i, (running, chosen) in enumerate(
            zip(rows, self._chosen[:count].tolist(), strict=False)
        ):
            if running.on_host():
                events += self._noted(running, [next_token(running, logits[i, :1])])
            else:
                events += self._taken(running, guesses[i], chosen)
        now = torch.tensor([[len(r.ids) - 1, r.ids[-1]] for r in rows])
        own.end[: len(rows)].copy_(now[:, 0], non_blocking=True)
        own.token[: len(rows)].copy_(now[:, 1], non_blocking=True)
        return events

    def _guesses(self, running: Running) -> list[int]:
        most = min(self.how.tokens, running.request.max_new_tokens - running.answered - 1)
        # Penalties of a token depend on whether the one before it was taken.
        if most < 1 or running.on_host() or running.rules() & {"seen", "counts"}:
            return []
        if running.guesser is None:
            running.guesser = Guesser(self.how)
        guesser: Guesser = running.guesser
        return guesser.guess(running.ids, most)

    def _taken(self, running: Running, guessed: list[int], chosen: list[int]) -> list[Event]:
        """The tokens up to the first that was not guessed."""
        events: list[Event] = []
        for at in range(len(guessed) + 1):
            if chosen[at] < 0:
                events.append(failed(running, not_finite()))
                break
            if "draw" in running.rules():
                running.draw()
            events.append(running.take(chosen[at]))
            if events[-1].finish is not None or guessed[at : at + 1] != chosen[at : at + 1]:
                break
        if guessed and running.guesser is not None:
            running.guesser.learn(len(events) - 1)
        return self._noted(running, events)

    def _noted(self, running: Running, events: list[Event]) -> list[Event]:
        running.launched += len(events)
        running.ended = events[-1].finish is not None
        return events

    def _run(self, count: int, width: int, needs: sample_rows.Rules) -> torch.Tensor:
        """Run or replay the step; its logits [count, self.width, v]."""
        own, controls, wide = self.rows.pages, self.rows.controls, self.width
        assert own is not None and controls is not None
        weights, spec = self.rows.weights, self.rows.model.spec
        params, adapters = weights.params, weights.adapters

        def step() -> torch.Tensor:
            # A row's tokens are rows of their own, one longer than the other, over its pages.
            cache = spread(pages.view(own, count, width), self._end[:count])
            tokens = self._tokens[:count].flatten()
            logits, _ = decode.decode(params, spec, tokens, cache, adapters=adapters)
            uniform = self._uniform[:count]
            each = Controls(controls.numbers[:count].repeat_interleave(wide, 0), uniform.flatten())
            alone = needs - {"seen", "counts"}
            chosen = sample_rows.choose(logits, each, alone).view(count, wide)
            logits = logits.view(count, wide, -1)
            if needs != alone:
                controls.uniform[:count] = uniform[:, 0]
                chosen[:, 0] = sample_rows.choose(logits[:, 0], controls, needs)
            self._chosen[:count] = chosen
            return logits

        return self.rows.replayed(("guessed", count, width, needs), step)
