"""The chunked scan of Mamba 2 against its recurrence, token by token, in fp64."""

import scans
import torch
from hypothesis import given, settings

from purelm.kernels import ssd_reference as ssd

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
@given(case=scans.cases)
def test_chunks_are_the_recurrence(case: scans.Case) -> None:
    inputs = drawn(2, case.s, *case.heads, case.seed, torch.float64)
    scans.assert_is(recurrence, ssd.scan, ssd.step, inputs, case)


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
