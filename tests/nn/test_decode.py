"""One step over the cache with lengths on the device, in fp64 against rows without a cache."""

from typing import Any

import pytest
import torch
from hybrids import MIXERS, prompt, small

from purelm.nn import cache as kv
from purelm.nn import decoder
from purelm.nn import tree as trees
from purelm.nn.decode import decode, prefill
from purelm.nn.layout import Layout

KINDS = pytest.mark.parametrize("kind", list(MIXERS))


@KINDS
def test_rows_of_any_length_decode_together(kind: str) -> None:
    """Rows prefilled alone, put into one cache at their own lengths, each go on as if alone."""
    spec, tree = small(kind)
    rows = [prompt(i, 1, n) for i, n in enumerate((3, 9, 1))]
    shared = _empty(spec, 3, 16)
    for i, row in enumerate(rows):
        _, own = prefill(tree, spec, row, _empty(spec, 1, 16))
        for ours, theirs in zip(trees.leaves(shared.layers), trees.leaves(own.layers), strict=True):
            ours[i] = theirs[0]
        shared.end[i] = own.end[0]
    for n in range(4):
        token = prompt(10 + n, 3, 1)[:, 0]
        got, shared = decode(tree, spec, token, shared)
        rows = [torch.cat([row, t.view(1, 1)], 1) for row, t in zip(rows, token, strict=True)]
        for row, logits in zip(rows, got, strict=True):
            want = decoder.forward(tree, spec, row)[0, -1]
            torch.testing.assert_close(logits, want)
    assert shared.end.tolist() == [7, 13, 5]


@KINDS
def test_steps_and_pieces_take_turns_over_padded_rows(kind: str) -> None:
    """decode, then extend, then decode: lengths and padding are kept on both sides."""
    spec, tree = small(kind)
    ids, mask = prompt(0, 2, 5), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    new = prompt(2, 2, 4)
    after = mask.sum(-1, keepdim=True)
    cache = kv.empty(spec, 2, 8, padded=True, dtype=torch.float64, device="cpu")
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    _, cache = prefill(tree, spec, ids, cache, layout=Layout(positions, mask))
    _, cache = decode(tree, spec, new[:, 0], cache)
    cache = kv.grow(cache, 9)
    two = after + torch.tensor([[1, 2]])
    _, cache = prefill(tree, spec, new[:, 1:3], cache, layout=Layout(two, torch.ones_like(two)))
    got, cache = decode(tree, spec, new[:, 3], cache)
    assert cache.first.tolist() == [2, 0] and cache.end.tolist() == [9, 9] and cache.length == 9
    for i in range(2):
        row = torch.cat([ids[i][mask[i].bool()], new[i]])[None]
        want = decoder.forward(tree, spec, row)[0, -1]
        torch.testing.assert_close(got[i], want)


def _empty(spec: Any, batch: int, capacity: int) -> kv.Cache:
    return kv.empty(spec, batch, capacity, padded=False, dtype=torch.float64, device="cpu")
