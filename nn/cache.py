"""The cache of generation: a value that `extend` consumes and returns grown."""

from dataclasses import dataclass, replace

import torch

from ..errors import InputError
from ..kernels.head_step import store, stored
from . import recurrent
from .layout import Layout
from .spec import LayerSpec, ModelSpec

# What one layer keeps of the tokens seen so far. In "keys" and "values" [b, capacity, k, d], as
# `AttentionSpec.cached` has them, each token has a column of its own; all else is a state [b, ...]
# that the next token changes.
State = dict[str, torch.Tensor]
COLUMNS = ("keys", "values")

# A layer's state, and where in its columns to write.
Buffers = tuple[State, int | torch.Tensor]


# A cache grows by so many tokens: copying it then costs under 1% of reading it for attention.
CHUNK = 512
# Capacities are whole multiples, so that prompts of nearly one length make caches of one shape.
ROUND = 64


@dataclass(frozen=True, slots=True)
class Cache:
    """What the layers keep of the tokens seen so far, preallocated.

    layers: the `State` of each; segments [b, capacity] as in `Layout`, or None
    where no row has padding; `length` tokens of every row are filled. The same on the device, row
    by row, for `decode`: first and end [b] int64 bound the tokens that a next one sees. With a
    table [b, pages] int64 the columns are pages [n, page, k, d], as `decode_attention` has them,
    and only `decode` extends it. The buffers are written in place when the cache is extended: use
    only the newest cache.
    """

    layers: tuple[State, ...]
    capacity: int
    segments: torch.Tensor | None
    length: int
    first: torch.Tensor
    end: torch.Tensor
    table: torch.Tensor | None = None


def empty(
    spec: ModelSpec,
    batch: int,
    capacity: int,
    *,
    padded: bool,
    dtype: torch.dtype,
    device: torch.device | str,
    columns: torch.dtype | None = None,
) -> Cache:
    """An empty cache for `batch` rows of up to `capacity` tokens; `padded` if rows hold padding.

    columns: what keys and values are kept in (default: `dtype`), which may be e4m3.
    """

    def state(layer: LayerSpec) -> State:
        made: State = {}
        if layer.attention is not None:
            for name, width in zip(COLUMNS, layer.attention.cached, strict=False):
                shape = batch, capacity, *width
                made[name] = torch.zeros(shape, dtype=columns or dtype, device=device)
        if layer.recurrent is not None:
            made |= recurrent.empty(layer.recurrent, batch, dtype, device)
        return made

    segments = torch.zeros((batch, capacity), dtype=torch.int64, device=device) if padded else None
    first, end = torch.zeros((2, batch), dtype=torch.int64, device=device).unbind(0)
    return Cache(tuple(map(state, spec.layers)), capacity, segments, 0, first, end)


def room(length: int, limit: int) -> int:
    """The capacity for `length` tokens and some to come, at most `limit` of them together."""
    return -(-min(limit, length + CHUNK) // ROUND) * ROUND


def emptied(cache: Cache) -> Cache:
    """The cache without tokens, over the same memory."""
    states = [x for state in cache.layers for name, x in state.items() if name not in COLUMNS]
    segments = [] if cache.segments is None else [cache.segments]
    for x in (*states, *segments, cache.first, cache.end):
        x.zero_()
    return replace(cache, length=0)


def write(buffer: torch.Tensor, new: torch.Tensor, at: int | torch.Tensor) -> torch.Tensor:
    """Store new [b, s, ...] at index `at` of buffer [b, capacity, ...]; the filled part.

    Or one token a row, new [b, 1, ...], at places [b] on the device, of the buffer's first two axes
    in one; then the whole buffer is returned, in its own dtype.
    """
    if isinstance(at, torch.Tensor):
        store(buffer.flatten(0, 1), at, new[:, 0])
        return buffer
    end = at + new.shape[1]
    buffer[:, at:end] = stored(new, buffer.dtype)
    return buffer[:, :end].to(new.dtype)


def note(cache: Cache, layout: Layout) -> Cache:
    """The cache after the tokens of `layout`: its length grown and their segments stored."""
    added = layout.positions.shape[1]
    if cache.length + added > cache.capacity:
        raise InputError(
            f"{cache.length} + {added} tokens exceed the cache's capacity of {cache.capacity}"
        )
    first = cache.first
    if cache.segments is not None:
        new = torch.ones_like(layout.positions) if layout.segments is None else layout.segments
        write(cache.segments, new, cache.length)
        # Padding stands in front: as many columns as a row has of it.
        first = first + (new == 0).sum(-1)
    return replace(cache, length=cache.length + added, first=first, end=cache.end + added)


def places(cache: Cache) -> torch.Tensor:
    """Where `write` puts the next token of every row [b]: after its end."""
    if cache.table is not None:
        page = cache.capacity // cache.table.shape[1]
        block = cache.table.gather(1, (cache.end // page)[:, None])[:, 0]
        return block * page + cache.end % page
    rows = torch.arange(cache.end.shape[0], device=cache.end.device)
    return rows * cache.capacity + cache.end


def stepped(cache: Cache, at: torch.Tensor) -> Cache:
    """The cache one token longer in every row, at its `places`; nothing asks the device."""
    if cache.segments is not None:
        write(cache.segments, cache.segments.new_ones(len(at), 1), at)
    return replace(cache, length=cache.length + 1, end=cache.end + 1)


def grow(cache: Cache, capacity: int) -> Cache:
    """The cache with room for `capacity` tokens, its contents copied."""

    def grown(buffer: torch.Tensor) -> torch.Tensor:
        out = buffer.new_zeros((buffer.shape[0], capacity, *buffer.shape[2:]))
        out[:, : cache.length] = buffer[:, : cache.length]
        return out

    def longer(state: State) -> State:
        return {name: grown(x) if name in COLUMNS else x for name, x in state.items()}

    return replace(
        cache,
        layers=tuple(map(longer, cache.layers)),
        capacity=capacity,
        segments=None if cache.segments is None else grown(cache.segments),
    )


def copied(source: Cache, target: Cache) -> Cache:
    """`target`, of the same rows and at least as much room, with what `source` holds, in place."""
    for ours, theirs in zip(target.layers, source.layers, strict=True):
        for name, x in theirs.items():
            if name in COLUMNS:
                ours[name][:, : source.length] = x[:, : source.length]
            else:
                ours[name].copy_(x)
    if target.segments is not None and source.segments is not None:
        target.segments[:, : source.length] = source.segments[:, : source.length]
    target.first.copy_(source.first)
    target.end.copy_(source.end)
    return replace(target, length=source.length)


def shared(cache: Cache, first: torch.Tensor, end: torch.Tensor) -> Cache:
    """The cache's memory for b * w rows of `decode`, w of one row [b] after another: first [b],
    end [b, w]. They read each other's columns, and write there.
    """
    batch, pages = len(end), cache.capacity // ROUND
    table = torch.arange(batch * pages, device=end.device).view(batch, pages)

    def paged(x: torch.Tensor) -> torch.Tensor:
        return x.view(batch * pages, ROUND, *x.shape[2:])

    layers = tuple({name: paged(x) for name, x in state.items()} for state in cache.layers)
    return spread(Cache(layers, cache.capacity, None, 0, first, cache.end, table), end)


def spread(cache: Cache, end: torch.Tensor) -> Cache:
    """A paged cache's rows [b] as b * w rows of `decode`, w of one row after another: end [b, w]
    bounds what each sees, such as one token more than the one before it. They read each other's
    columns, and write there.
    """
    assert cache.table is not None
    width = end.shape[1]
    first, table = (t.repeat_interleave(width, 0) for t in (cache.first, cache.table))
    return replace(cache, first=first, end=end.flatten(), table=table)


def cut(cache: Cache, length: int) -> Cache:
    """The cache as it was when every row had `length` tokens; the buffers are shared, not copied.

    Raises InputError where a layer has a state, which cannot go back, or the cache is shorter.
    """
    if any(name not in COLUMNS for state in cache.layers for name in state):
        raise InputError("a cache with the states of recurrent layers cannot be cut back")
    if not 0 <= length <= cache.length:
        raise InputError(f"a cache of {cache.length} tokens cannot be cut to {length}")
    return replace(
        cache,
        length=length,
        first=cache.first.clamp(max=length),
        end=cache.end - (cache.length - length),
    )


def select(cache: Cache, rows: torch.Tensor) -> Cache:
    """The cache of the given rows [n], copied."""
    return Cache(
        tuple({name: x[rows] for name, x in state.items()} for state in cache.layers),
        cache.capacity,
        None if cache.segments is None else cache.segments[rows],
        cache.length,
        cache.first[rows],
        cache.end[rows],
    )
