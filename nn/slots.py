"""Rows of different requests decoded together: they come, go and share one cache.

Every row's tokens stand at the end of the filled part of the cache, with padding before them, so
that one step writes all rows' keys at one place. Rows move only when one comes or goes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from . import cache as kv
from . import tree
from .cache import Cache
from .generate import CHUNK, next_logits
from .layout import Layout
from .spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Rows:
    """The cache of the rows and how many tokens each has in it. No rows: no cache."""

    cache: Cache | None = None
    lengths: tuple[int, ...] = ()


def shared_length(spec: ModelSpec) -> int:
    """How long rows may grow that are decoded together.

    The frequencies of the "dynamic" and "longrope" scalings change for all rows once one row passes
    the original context; up to there, rows do not feel one another.
    """
    limits = [
        rope.original_positions for rope in spec.ropes() if rope.kind in ("dynamic", "longrope")
    ]
    return min([spec.max_positions, *limits])


def prefill(
    params: tree.Tree, spec: ModelSpec, tokens: torch.Tensor, *, adapters: tree.Tree = None
) -> tuple[torch.Tensor, Rows]:
    """One prompt [1, s] -> the logits [1, v] of what follows, and it as a row."""
    length = tokens.shape[1]
    weight = params["embed"]["weight"]
    cache = kv.empty(spec, 1, length, padded=False, dtype=weight.dtype, device=weight.device)
    logits, cache = next_logits(params, spec, tokens, cache, adapters=adapters)
    return logits, Rows(cache, (length,))


def join(parts: Sequence[Rows]) -> Rows:
    """The rows of all parts, in order, copied into one cache."""
    parts = [part for part in parts if part.lengths]
    if not parts:
        return Rows()
    lengths = tuple(n for part in parts for n in part.lengths)
    width = max(lengths)
    capacity = width + CHUNK
    caches = [part.cache for part in parts if part.cache is not None]

    def joined(buffers: Sequence[torch.Tensor]) -> torch.Tensor:
        rows, shape = len(lengths), buffers[0].shape
        out = buffers[0].new_zeros((rows, capacity, *shape[2:]))
        at = 0
        for buffer, cache in zip(buffers, caches, strict=True):
            n = min(cache.length, width)
            end = at + buffer.shape[0]
            out[at:end, width - n : width] = buffer[:, cache.length - n : cache.length]
            at = end
        return out

    keys = tuple(joined(layer) for layer in zip(*(c.keys for c in caches), strict=True))
    values = tuple(joined(layer) for layer in zip(*(c.values for c in caches), strict=True))
    column = torch.arange(capacity, device=keys[0].device)
    first = width - torch.tensor(lengths, device=column.device)[:, None]
    segments = ((column >= first) & (column < width)).long()
    return Rows(Cache(keys, values, segments, width), lengths)


def keep(rows: Rows, which: Sequence[int]) -> Rows:
    """The given rows alone, in the given order; the others' memory is freed."""
    if rows.cache is None or not which:
        return Rows()
    chosen = kv.select(rows.cache, torch.tensor(which, device=rows.cache.keys[0].device))
    return join([Rows(chosen, tuple(rows.lengths[i] for i in which))])


def decode(
    params: tree.Tree,
    spec: ModelSpec,
    tokens: torch.Tensor,
    rows: Rows,
    *,
    adapters: tree.Tree = None,
) -> tuple[torch.Tensor, Rows]:
    """One token [b, 1] for every row -> the logits [b, v] of what follows, and the rows grown.

    The given rows are used up.
    """
    cache = rows.cache
    assert cache is not None
    if cache.length == cache.capacity:
        cache = kv.grow(cache, cache.capacity + CHUNK)
    positions = torch.tensor(rows.lengths, device=tokens.device)[:, None]
    layout = Layout(positions, torch.ones_like(positions))
    logits, cache = next_logits(params, spec, tokens, cache, layout=layout, adapters=adapters)
    return logits, Rows(cache, tuple(n + 1 for n in rows.lengths))
