"""Rows of different requests decoded together: they come, go and share one cache.

Every row's tokens stand at the end of the filled part of the cache, with padding before them, so
that one step writes all rows' keys at one place. Rows move only when one comes or goes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from . import cache as kv
from . import decoder, tree
from .cache import Cache
from .layout import Layout
from .spec import ModelSpec

# Room for so many tokens is made at a time.
CHUNK = 512


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
    dtype = params["embed"]["weight"].dtype
    cache = kv.empty(spec, 1, length, padded=False, dtype=dtype, device=tokens.device)
    x, cache = decoder.extend(params, spec, tokens, cache, adapters=adapters)
    return decoder.logits(params, spec, x[:, -1]), Rows(cache, (length,))


def join(spec: ModelSpec, parts: Sequence[Rows]) -> Rows:
    """The rows of all parts, in order, copied into one cache."""
    old = [part.cache for part in parts if part.cache is not None]
    if not old:
        return Rows()
    lengths = tuple(n for part in parts for n in part.lengths)
    width, device = max(lengths), old[0].end.device
    cache = kv.empty_like(old[0], len(lengths), width + CHUNK)
    at = 0
    for part in old:
        n, end = min(part.length, width), at + len(part.end)
        for new, state in zip(cache.layers, part.layers, strict=True):
            for name, buffer in state.items():
                if name in kv.COLUMNS:
                    new[name][at:end, width - n : width] = buffer[:, part.length - n : part.length]
                else:
                    new[name][at:end] = buffer
        at = end
    column = torch.arange(width, device=device)
    positions = column - (width - torch.tensor(lengths, device=device)[:, None])
    layout = Layout(positions.clamp(min=0), (positions >= 0).long())
    return Rows(kv.note(cache, layout), lengths)


def keep(spec: ModelSpec, rows: Rows, which: Sequence[int]) -> Rows:
    """The given rows alone, in the given order; the others' memory is freed."""
    if rows.cache is None or not which:
        return Rows()
    chosen = kv.select(rows.cache, torch.tensor(which, device=rows.cache.end.device))
    return join(spec, [Rows(chosen, tuple(rows.lengths[i] for i in which))])


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
    x, cache = decoder.extend(params, spec, tokens, cache, layout=layout, adapters=adapters)
    return decoder.logits(params, spec, x[:, -1]), Rows(cache, tuple(n + 1 for n in rows.lengths))
