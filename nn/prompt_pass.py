"""Prompts in passes of a few lengths, padded behind, so that a GPU can replay them.

The host takes as long to launch a pass over a short prompt as over one of thousands of tokens, and
longer than the GPU takes to run it. Causal attention sees nothing of what stands behind a token, so
padding there changes no value that is used. The pass fills a cache of its own, from which the
prompts are copied to where they go on.
"""

import bisect
from collections.abc import Callable, Hashable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from . import cache as kv
from . import decoder, tree
from .cache import COLUMNS, Cache
from .decode import waits_for
from .graph import capture
from .kept_steps import KeptSteps, with_room
from .pages import PAGE
from .spec import ModelSpec

# How many tokens a pass may have, all rows together: from there on the GPU takes longer than the
# host, and what a graph holds of memory grows. Lengths grow by a third or a half, so that no more
# than a third of a pass is padding.
MOST = 4096
LENGTHS = tuple(sorted(n << k for n in (2, 3) for k in range(4, 12) if n << k <= MOST))


def length_of(spec: ModelSpec, longest: int) -> int:
    """How long a pass over prompts of up to `longest` tokens is; they may be longer than MOST."""
    at = bisect.bisect_left(LENGTHS, longest)
    length = LENGTHS[at] if at < len(LENGTHS) else longest
    return max(longest, min(length, spec.max_positions))


def rows_of(count: int) -> int:
    """How many rows a pass over so many prompts has, where they come in any number."""
    at = bisect.bisect_left(LENGTHS, count * LENGTHS[0])
    return count if count == 1 or at == len(LENGTHS) else LENGTHS[at] // LENGTHS[0]


def covers(params: tree.Tree, spec: ModelSpec, adapters: tree.Tree) -> bool:
    """Whether a model's prompts can be run so: no recurrent layer, whose state padding would
    change, and nothing that waits (`decode.waits_for`).
    """
    recurs = any(layer.recurrent is not None for layer in spec.layers)
    return not recurs and waits_for(params, spec, adapters) is None


def fits(spec: ModelSpec, rows: int, longest: int) -> bool:
    """Whether so many prompts of up to `longest` tokens are few enough."""
    return rows * length_of(spec, longest) <= MOST


class PromptPass:
    """A pass over `rows` prompts of up to `length` tokens, each from its beginning on.

    tokens [rows, length] and last [rows] int64, each prompt's last token, are what it reads; cache,
    whole pages long, and logits [rows, v] of what follows the prompts what it writes. It runs as it
    is at first, and for ever where its second run cannot be captured.
    """

    def __init__(
        self,
        params: tree.Tree,
        spec: ModelSpec,
        rows: int,
        length: int,
        *,
        columns: torch.dtype | None = None,
        device: torch.device,
    ) -> None:
        dtype = params["embed"]["weight"].dtype
        capacity = -(-length // PAGE) * PAGE
        how: Any = {"padded": False, "dtype": dtype, "columns": columns, "device": device}
        self.cache = kv.empty(spec, rows, capacity, **how)
        self.tokens = torch.zeros((rows, length), dtype=torch.int64, device=device)
        self.last = torch.zeros(rows, dtype=torch.int64, device=device)
        self.logits = torch.empty(0)
        self._ran = self._tried = False
        self._replay: Callable[[], None] | None = None
        self._held = 0

    @property
    def captured(self) -> bool:
        """Is it worth keeping? Once it has run, its next run is captured."""
        return self._ran

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.tokens.device

    @property
    def nbytes(self) -> int:
        """Bytes of its cache and of what its graph holds."""
        return tree.nbytes(list(self.cache.layers)) + self._held

    def run(
        self, params: tree.Tree, spec: ModelSpec, adapters: tree.Tree, *, graphs: bool
    ) -> torch.Tensor:
        """The logits, which the next run overwrites. A graph is over the memory of params and
        adapters: those of later runs must lie where those of the first did.
        """

        def step() -> None:
            x, _ = decoder.extend(params, spec, self.tokens, self.cache, adapters=adapters)
            at = torch.arange(0, self.tokens.numel(), self.tokens.shape[1], device=self.device)
            x = x.flatten(0, 1)[at + self.last]
            logits = decoder.logits(params, spec, x, adapters=adapters)
            if self._ran:
                self.logits.copy_(logits)
            else:
                self.logits = logits

        if graphs and self._ran and not self._tried:
            self._tried = True
            before = _reserved(self.device)
            self._replay = capture(step, self.device)
            self._held = max(0, _reserved(self.device) - before)
        (self._replay or step)()
        self._ran = True
        return self.logits

    def read(self, ids: torch.Tensor, first: torch.Tensor | None) -> None:
        """Take prompts ids [rows, s] that begin at columns `first` [rows], None: all at the first.

        What is left of the length is padded.
        """
        width = ids.shape[1]
        self.last.fill_(width - 1)
        if first is not None:
            self.last.sub_(first)
            ids = ids.gather(1, (_columns(ids) + first[:, None]).clamp(max=width - 1))
        self.tokens[:, :width] = ids
        self.tokens[:, width:] = 0

    def hand_over(self, target: Cache, real: torch.Tensor | None, width: int) -> Cache:
        """`target`, an empty cache, with the prompts, against column `width`; real [rows, width] as
        in `prompt.Prompt`.
        """
        first = torch.zeros_like(target.first) if real is None else (~real).sum(-1)
        rows = torch.arange(len(first), device=first.device)[:, None]
        index = (torch.arange(width, device=first.device) - first[:, None]).clamp(min=0)
        for ours, theirs in zip(self.cache.layers, target.layers, strict=True):
            for name in COLUMNS:
                if name in ours:
                    x = ours[name]
                    theirs[name][:, :width] = x[:, :width] if real is None else x[rows, index]
        if target.segments is not None and real is not None:
            target.segments[:, :width] = real
        return replace(target, length=width, first=first, end=torch.full_like(first, width))


def prefill(
    params: tree.Tree,
    spec: ModelSpec,
    ids: torch.Tensor,
    real: torch.Tensor | None,
    cache: Cache,
    *,
    adapters: tree.Tree,
    columns: torch.dtype | None = None,
    kept: KeptSteps | None = None,
    where: Hashable = None,
) -> tuple[torch.Tensor, Cache]:
    """As `prompt.read`, in a pass that `fits`: what `kept` has of earlier calls over the memory of
    params and adapters, `where`, is replayed.
    """
    batch, width = ids.shape
    length = length_of(spec, width)
    key = spec, batch, length, columns, where
    own = None if kept is None else kept.take(PromptPass, key)
    if own is None:
        how: Any = {"columns": columns, "device": ids.device}
        own = with_room(kept, partial(PromptPass, params, spec, batch, length, **how))
    own.read(ids, None if real is None else (~real).sum(-1))
    logits = own.run(params, spec, adapters, graphs=kept is not None)
    cache = own.hand_over(cache, real, width)
    if kept is not None:
        logits = logits.clone()  # another call may replay it before these are read
        kept.give(key, own)
    return logits, cache


def _columns(ids: torch.Tensor) -> torch.Tensor:
    return torch.arange(ids.shape[1], device=ids.device)


def _reserved(device: torch.device) -> int:
    """Bytes of the device that tensors, or graphs, hold."""
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(device)
