"""The cache of rows that come and go: keys and values in pages, which tables give to rows.

Everything a step reads stands at one place on the device from one step to the next, so that a graph
of it can be replayed; `view` is the cache of the first rows, which `decode.decode` extends.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from . import cache as kv
from . import recurrent, tree
from .cache import Cache, State
from .spec import ModelSpec

# Tokens of a block: what prefixes are shared by, and at most so many less one a row leaves unused.
PAGE = 16


@dataclass(frozen=True, slots=True)
class Pages:
    """layers: of each a `State`, columns [blocks, PAGE, ...] and states [rows, ...]. By row: table
    [rows, width] int64, the blocks of its tokens; end [rows] int64, how many those are; active
    [rows] int64, 1 where a request stands, elsewhere 0, so that an empty row stays short; token
    and chosen [rows] int64, what its next step begins with and what the last one chose.
    """

    layers: tuple[State, ...]
    table: torch.Tensor
    end: torch.Tensor
    active: torch.Tensor
    token: torch.Tensor
    chosen: torch.Tensor


def shared_length(spec: ModelSpec) -> int:
    """How long rows may grow that are decoded together.

    The frequencies of the "dynamic" and "longrope" scalings change for all rows once one row passes
    the original context; up to there, rows do not feel one another.
    """
    limits = [
        rope.original_positions for rope in spec.ropes() if rope.kind in ("dynamic", "longrope")
    ]
    return min([spec.max_positions, *limits])


def nbytes(
    spec: ModelSpec, rows: int, blocks: int, *, dtype: torch.dtype, columns: torch.dtype
) -> int:
    """What `empty` would take."""
    made = empty(spec, rows, blocks, dtype=dtype, columns=columns, device="meta")
    by_row = (made.table, made.end, made.active, made.token, made.chosen)
    return sum(x.nbytes for state in made.layers for x in state.values()) + tree.nbytes(by_row)


def empty(
    spec: ModelSpec,
    rows: int,
    blocks: int,
    *,
    dtype: torch.dtype,
    columns: torch.dtype,
    device: torch.device | str,
) -> Pages:
    """No tokens: so many rows, and blocks of keys and values in dtype `columns`."""
    made = kv.empty(spec, blocks, PAGE, padded=False, dtype=dtype, columns=columns, device=device)

    def state(i: int) -> State:
        own = {name: x for name, x in made.layers[i].items() if name in kv.COLUMNS}
        mixer = spec.layers[i].recurrent
        return own if mixer is None else own | recurrent.empty(mixer, rows, dtype, device)

    width = -(-shared_length(spec) // PAGE)
    end, active, token, chosen = torch.zeros((4, rows), dtype=torch.int64, device=device).unbind(0)
    return Pages(
        tuple(state(i) for i in range(len(spec.layers))),
        torch.zeros((rows, width), dtype=torch.int64, device=device),
        end,
        active,
        token,
        chosen,
    )


def grow(pages: Pages, blocks: int) -> None:
    """Make room for `blocks` blocks in place, a buffer at a time; graphs over the old are void."""
    for state in pages.layers:
        for name in kv.COLUMNS:
            if name in state and state[name].shape[0] < blocks:
                old = state[name]
                state[name] = old.new_zeros((blocks, *old.shape[1:]))
                state[name][: old.shape[0]] = old


def view(pages: Pages, rows: int, width: int) -> Cache:
    """The cache of the first rows, of up to `width` blocks each."""

    def own(state: State) -> State:
        return {name: x if name in kv.COLUMNS else x[:rows] for name, x in state.items()}

    table, end = pages.table[:rows, :width].contiguous(), pages.end[:rows]
    layers = tuple(map(own, pages.layers))
    return Cache(layers, width * PAGE, None, 0, torch.zeros_like(end), end, table)


def place(pages: Pages, row: int, blocks: Sequence[int], length: int, token: int) -> None:
    """A request with `length` tokens in its blocks takes a row; its next step begins with token."""
    # Not blocking: a copy from pageable memory is staged before the call returns.
    pages.table[row, : len(blocks)].copy_(torch.tensor(blocks), non_blocking=True)
    pages.end[row] = length
    pages.active[row] = 1
    pages.token[row] = token


def move(pages: Pages, source: int, target: int) -> None:
    """Row `target` becomes what row `source` is."""
    by_row = (pages.table, pages.end, pages.active, pages.token)
    states = [x for state in pages.layers for name, x in state.items() if name not in kv.COLUMNS]
    for x in (*by_row, *states):
        x[target] = x[source]


def vacate(pages: Pages, first: int) -> None:
    """No request stands in row `first` or after it."""
    for x in (pages.table, pages.end, pages.active, pages.token):
        x[first:] = 0


def staged(
    spec: ModelSpec,
    pages: Pages,
    prefixes: Sequence[Sequence[int]],
    capacity: int,
    dtype: torch.dtype,
    *,
    padded: bool = False,
) -> Cache:
    """A cache in which prompts are run by themselves, a row each; it has the tokens of `prefixes`
    already, as many full blocks of each row. padded: rows will hold padding.
    """
    device, length = pages.end.device, len(prefixes[0]) * PAGE
    columns = next(
        (x.dtype for state in pages.layers for n, x in state.items() if n in kv.COLUMNS), dtype
    )
    made = kv.empty(
        spec, len(prefixes), capacity, padded=padded, dtype=dtype, columns=columns, device=device
    )
    if not length:
        return made
    blocks = torch.tensor(list(map(list, prefixes)), device=device)
    for state, ours in zip(made.layers, pages.layers, strict=True):
        for name in kv.COLUMNS:
            if name in state:
                state[name][:, :length] = ours[name][blocks].flatten(1, 2)
    return Cache(made.layers, capacity, None, length, made.first, torch.full_like(made.end, length))


def unstage(
    pages: Pages, cache: Cache, at: int, begin: int, row: int, blocks: Sequence[int], skip: int
) -> None:
    """Copy the prompt in row `at` of `cache`, from column `begin` on, into its blocks, of which the
    first `skip` have theirs, and its states to its row. There must be room for whole blocks.
    """
    used = blocks[skip : -(-(cache.length - begin) // PAGE)]
    index = torch.tensor(used, dtype=torch.int64, device=pages.end.device)
    first = begin + skip * PAGE
    bounds = slice(first, first + len(used) * PAGE)
    for state, ours in zip(cache.layers, pages.layers, strict=True):
        for name, x in state.items():
            if name not in kv.COLUMNS:
                ours[name][row] = x[at]
            elif used:
                ours[name][index] = x[at, bounds].view(-1, PAGE, *x.shape[2:])


def fill(pages: Pages, cache: Cache, blocks: torch.Tensor) -> None:
    """Copy a cache [b, whole pages] into blocks [b * pages] int64, block 0 for what is nobody's."""
    for state, ours in zip(cache.layers, pages.layers, strict=True):
        for name in kv.COLUMNS:
            if name in state:
                x = state[name]
                ours[name][blocks] = x.view(-1, PAGE, *x.shape[2:])
