"""Rows that come and go in a paged cache, of models whose layers carry other states too."""

import pytest
import torch
from hybrids import MIXERS, prompt, small

from purelm.nn import decode, decoder, pages
from purelm.nn.pages import PAGE


@pytest.mark.parametrize("kind", list(MIXERS))
@pytest.mark.parametrize("piece", [100, 7])
def test_rows_come_and_go(kind: str, piece: int) -> None:
    """Each row's logits are those it has alone, whoever joins or leaves; prompts in pieces."""
    spec, params = small(kind)
    made = pages.empty(spec, 3, 12, dtype=torch.float64, columns=torch.float64, device="cpu")
    texts = [prompt(i, 1, n) for i, n in enumerate((3, 2 * PAGE + 1, PAGE))]
    # Blocks in no order, and none of another row.
    blocks = [[7], [2, 9, 4], [5, 1]]

    def enter(i: int, row: int) -> None:
        cache = pages.staged(spec, made, [[]], len(blocks[i]) * PAGE, torch.float64)
        for part in texts[i].split(piece, 1):
            _, cache = decoder.extend(params, spec, part, cache)
        pages.unstage(made, cache, 0, 0, row, blocks[i], 0)
        pages.place(made, row, blocks[i], cache.length, 0)

    def step(seed: int, running: list[int]) -> None:
        new = prompt(seed, 3, 1)[:, 0]
        logits, cache = decode.decode(params, spec, new, pages.view(made, 3, 3))
        made.end.copy_(cache.end * made.active)
        for row, i in enumerate(running):
            texts[i] = torch.cat([texts[i], new[row].view(1, 1)], 1)
            want = decoder.forward(params, spec, texts[i])[0, -1]
            torch.testing.assert_close(logits[row], want)

    enter(0, 0)
    enter(1, 1)
    step(11, [0, 1])
    enter(2, 2)
    step(12, [0, 1, 2])
    pages.move(made, 2, 0)  # the first has ended
    pages.vacate(made, 2)
    pages.grow(made, 20)
    step(13, [2, 1])
    assert made.end.tolist() == [PAGE + 2, 2 * PAGE + 4, 0]


def test_a_prefix_in_blocks_is_gone_on_from() -> None:
    spec, params = small("full")
    made = pages.empty(spec, 1, 6, dtype=torch.float64, columns=torch.float64, device="cpu")
    text = prompt(0, 1, 2 * PAGE + 5)
    whole = pages.staged(spec, made, [[]], 3 * PAGE, torch.float64)
    want, whole = decode.prefill(params, spec, text, whole)
    pages.unstage(made, whole, 0, 0, 0, [3, 1, 2], 0)
    before = [state["keys"][[3, 1]].clone() for state in made.layers]
    again = pages.staged(spec, made, [[3, 1]], 3 * PAGE, torch.float64)
    got, again = decode.prefill(params, spec, text[:, 2 * PAGE :], again)
    torch.testing.assert_close(got, want)
    pages.unstage(made, again, 0, 0, 0, [3, 1, 5], 2)
    for state, keys in zip(made.layers, before, strict=True):
        assert torch.equal(state["keys"][[3, 1]], keys)
        torch.testing.assert_close(state["keys"][5, :5], state["keys"][2, :5])


@pytest.mark.parametrize("kind", list(MIXERS))
def test_what_it_takes(kind: str) -> None:
    spec, _ = small(kind)
    dtypes = {"dtype": torch.float64, "columns": torch.float32}
    made = pages.empty(spec, 3, 5, **dtypes, device="cpu")
    by_row = (made.table, made.end, made.active, made.token, made.chosen)
    tensors = [*by_row, *(x for state in made.layers for x in state.values())]
    assert pages.nbytes(spec, 3, 5, **dtypes) == sum(x.nbytes for x in tensors)
