"""Passes of a few tokens a row over a cache that goes back again: what speculation runs.

On a GPU a pass is one step of `decode`, captured as a graph: a row's tokens are rows of their own,
one longer than the other, whose tables name the same pages. A layer writes the keys and values of
all before it reads any, so each of them sees those before it.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from . import cache as kv
from . import decoder, tree
from .cache import Cache
from .decode import decode, waits_for
from .graph import capture, replayable
from .prompt import layout_from
from .spec import ModelSpec


@dataclass(slots=True)
class _Wide:
    """What a captured pass reads, tokens and end [b, w], and writes, logits [b, w, v]."""

    tokens: torch.Tensor
    end: torch.Tensor
    logits: torch.Tensor
    replay: Callable[[], None] | None = None


class Passes:
    """A model over rows of ids [b, m], of which its cache holds the first columns.

    widest: how many tokens a captured pass has that has more than one. Of `begin`, real is as in
    `prompt.layout_from`, limit says how many columns there may ever be, and with graphs a GPU
    replays passes.
    """

    def __init__(self, cache: Cache, *, widest: int) -> None:
        self.cache, self.widest = cache, widest
        self.params: tree.Tree = None
        self.adapters: tree.Tree = None
        self._wide: dict[int, _Wide] = {}
        # Of the rows' padding, where graphs find it; set once the prompts have been read.
        self._first = torch.zeros_like(cache.first)
        self._placed = False

    def begin(
        self,
        params: tree.Tree,
        spec: ModelSpec,
        real: torch.Tensor | None,
        *,
        limit: int,
        adapters: tree.Tree = None,
        graphs: bool = True,
    ) -> None:
        """Rows anew, of which the cache holds nothing. Graphs are over the memory of params and
        adapters: those of later rows must lie where those of the first ones did.
        """
        self.params, self.spec, self.adapters = params, spec, adapters
        self.real, self.limit = real, limit
        self.cache, self._placed = kv.emptied(self.cache), False
        self._graphs = (
            graphs and replayable(self.device) and waits_for(params, spec, adapters) is None
        )

    def end(self) -> None:
        """Let go of the weights, until the next `begin`."""
        self.params = self.adapters = None

    @property
    def captured(self) -> bool:
        """Are there graphs over its cache?"""
        return any(wide.replay is not None for wide in self._wide.values())

    @property
    def device(self) -> torch.device:
        """Where its cache is."""
        return self._first.device

    @property
    def nbytes(self) -> int:
        """Bytes of its cache."""
        return tree.nbytes([*self.cache.layers, self.cache.segments])

    def cut(self, length: int) -> None:
        """Forget all columns from `length` on."""
        self.cache = kv.cut(self.cache, min(length, self.cache.length))

    def run(self, ids: torch.Tensor, stop: int, *, last: bool = False) -> torch.Tensor:
        """Run the columns of ids that the cache does not hold, up to `stop`, n of them: the logits
        [b, n, v] of what follows each, or [b, 1, v] of the last.
        """
        begin, logits = self.cache.length, None
        width = 1 if stop - begin == 1 else self.widest
        fits = begin > 0 and stop - begin <= width and begin + width <= self.limit
        self._make_room(begin + width if fits else stop)
        if self._graphs and fits:
            logits = self._replayed(ids[:, begin:stop], width)
        if logits is not None:
            return logits[:, -1:] if last else logits
        if stop - begin == 1 and begin > 0:
            token = ids[:, begin]
            logits, self.cache = decode(
                self.params, self.spec, token, self.cache, adapters=self.adapters
            )
            return logits[:, None]
        x, self.cache = decoder.extend(
            self.params,
            self.spec,
            ids[:, begin:stop],
            self.cache,
            layout=layout_from(ids[:, :stop], self.real, begin),
            adapters=self.adapters,
        )
        x = x[:, -1:] if last else x
        return decoder.logits(self.params, self.spec, x, adapters=self.adapters)

    def _make_room(self, length: int) -> None:
        if self.cache.capacity < length:
            self.cache = kv.grow(self.cache, kv.room(length, self.limit))
            self._wide.clear()

    def _replayed(self, tokens: torch.Tensor, width: int) -> torch.Tensor | None:
        """Run tokens [b, n], n <= width, in a pass of `width`; None where none can be captured."""
        (batch, count), begin, device = tokens.shape, self.cache.length, tokens.device
        wide, fresh = self._wide.get(width), False
        if wide is None:
            tokens_, end = torch.zeros((2, batch, width), dtype=torch.int64, device=device).unbind(
                0
            )
            wide, fresh = _Wide(tokens_, end, torch.empty(0)), True
            self._wide[width] = wide
        if not self._placed:
            self._first.copy_(self.cache.first)
            self._placed = True
        # What is run beyond the tokens is written where the next pass writes, and seen by nobody.
        wide.tokens[:, :count] = tokens
        wide.tokens[:, count:] = tokens[:, -1:]
        wide.end.copy_(torch.arange(begin, begin + width, device=device).expand(batch, -1))
        if not fresh and wide.replay is None:
            wide.replay = capture(lambda: self._step(wide), device)
            self._graphs = wide.replay is not None
        if wide.replay is not None:
            wide.replay()
        elif fresh:
            self._step(wide)  # which compiles what a capture needs
        else:
            return None
        if self.cache.segments is not None:
            self.cache.segments[:, begin : begin + count] = 1
        self.cache = replace(
            self.cache, length=begin + count, end=torch.full_like(self.cache.end, begin + count)
        )
        return wide.logits[:, :count].clone()

    def _step(self, wide: _Wide) -> None:
        batch, width = wide.tokens.shape
        cache = kv.shared(self.cache, self._first, wide.end)
        logits, _ = decode(
            self.params, self.spec, wide.tokens.flatten(), cache, adapters=self.adapters
        )
        wide.logits = logits.view(batch, width, -1)
