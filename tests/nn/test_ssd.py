"""The chunked scan of Mamba 2 against its recurrence, token by token, in fp64."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from purelm.nn import recurrent, ssd

Inputs = tuple[torch.Tensor, ...]


def drawn(rows: int, s: int, heads: int, groups: int, seed: int, dtype: torch.dtype) -> Inputs:
    """x, decay, b, c and the state before them."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    p, n = 3, 5
    decay = -draw(rows, s, heads).abs() * 2
    return (
        *(draw(rows, s, heads, p), decay, draw(rows, s, groups, n), draw(rows, s, groups, n)),
        draw(rows, heads, p, n),
    )


def recurrence(
    x: torch.Tensor,
    decay: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    starts: torch.Tensor | None,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, one token and one head at a time."""
    y, share = torch.zeros_like(x), x.shape[2] // b.shape[2]
    state = state.clone()
    for row in range(x.shape[0]):
        for t in range(x.shape[1]):
            for h in range(x.shape[2]):
                if starts is not None and starts[row, t]:
                    state[row, h] = 0
                g = h // share
                new = torch.outer(x[row, t, h], b[row, t, g])
                state[row, h] = decay[row, t, h].exp() * state[row, h] + new
                y[row, t, h] = state[row, h] @ c[row, t, g]
    return y, state


@settings(deadline=None, max_examples=40)
@given(
    s=st.integers(1, 13),
    heads=st.sampled_from([(1, 1), (2, 1), (4, 2)]),
    chunk=st.integers(1, 6),
    seed=st.integers(0, 99),
    segments=st.lists(st.integers(0, 4), min_size=13, max_size=13),
    documents=st.booleans(),
    fresh=st.booleans(),
)
def test_chunks_are_the_recurrence(
    s: int,
    heads: tuple[int, int],
    chunk: int,
    seed: int,
    segments: list[int],
    documents: bool,
    fresh: bool,
) -> None:
    *inputs, before = drawn(2, s, *heads, seed, torch.float64)
    starts = None
    if documents:
        rows = torch.tensor([sorted(segments[:s]), [1] * s])
        starts = recurrent.starts(rows, 0)
        assert starts is not None
        starts[1, s // 2] = True
    state = torch.zeros_like(before) if fresh else before
    x, decay, b, c = inputs
    y, last = ssd.scan(x, decay, b, c, starts, None if fresh else before, chunk)
    want, want_last = recurrence(x, decay, b, c, starts, state)
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(last, want_last)
    for t in range(s):
        at = slice(t, t + 1)
        mine = None if starts is None else starts[:, at]
        one, state = ssd.step(x[:, at], decay[:, at], b[:, at], c[:, at], mine, state)
        torch.testing.assert_close(one, want[:, at])


def test_gradients_over_documents() -> None:
    *inputs, before = drawn(1, 7, 2, 1, 3, torch.float64)
    starts = torch.tensor([[False, False, True, False, False, True, False]])
    leaves = [t.requires_grad_() for t in (*inputs, before)]

    def run(*given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, decay, b, c, state = given
        return ssd.scan(x, decay, b, c, starts, state, 3)

    assert torch.autograd.gradcheck(run, leaves)


def test_long_sums_of_decays_lose_nothing() -> None:
    """Near tokens late in a long chunk: differences of fp32 sums would carry the sums' rounding."""
    g = torch.Generator().manual_seed(1)
    s = 128
    decay = -torch.rand(1, s, 1, generator=g) * 20
    decay[:, 1::2] = -1e-3
    x, b, c = (torch.randn(1, s, 1, 4, generator=g) for _ in range(3))
    y, _ = ssd.scan(x, decay, b, c, None, None)
    exact, _ = ssd.scan(x.double(), decay.double(), b.double(), c.double(), None, None)
    assert (y - exact).abs().max() <= 5e-7 * exact.abs().max()
