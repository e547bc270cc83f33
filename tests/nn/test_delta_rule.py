"""The chunked gated delta rule against its recurrence, token by token, in fp64."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from purelm.nn import delta_rule, recurrent

Inputs = tuple[torch.Tensor, ...]


def drawn(rows: int, s: int, heads: int, groups: int, seed: int) -> Inputs:
    """q, k, v, beta, decay and the state before them."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    n, p = 5, 3
    q, k = (torch.nn.functional.normalize(draw(rows, s, groups, n), dim=-1) for _ in "qk")
    decay = -draw(rows, s, heads).abs() * 2
    return (
        q,
        k,
        draw(rows, s, heads, p),
        draw(rows, s, heads).sigmoid(),
        decay,
        draw(rows, heads, n, p),
    )


def recurrence(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    decay: torch.Tensor,
    starts: torch.Tensor | None,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, one token and one head at a time: S (1 - beta k k^T) + beta v k^T."""
    y, share = torch.zeros_like(v), v.shape[2] // k.shape[2]
    state = state.clone()
    for row in range(v.shape[0]):
        for t in range(v.shape[1]):
            for h in range(v.shape[2]):
                if starts is not None and starts[row, t]:
                    state[row, h] = 0
                key, rate = k[row, t, h // share], beta[row, t, h]
                kept = torch.eye(len(key), dtype=key.dtype) - rate * torch.outer(key, key)
                state[row, h] = decay[row, t, h].exp() * kept @ state[row, h]
                state[row, h] += rate * torch.outer(key, v[row, t, h])
                y[row, t, h] = q[row, t, h // share] @ state[row, h]
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
    *inputs, before = drawn(2, s, *heads, seed)
    starts = None
    if documents:
        rows = torch.tensor([sorted(segments[:s]), [1] * s])
        starts = recurrent.starts(rows, 0)
        assert starts is not None
        starts[1, s // 2] = True
    state = torch.zeros_like(before) if fresh else before
    q, k, v, beta, decay = inputs
    y, last = delta_rule.scan(q, k, v, beta, decay, starts, None if fresh else before, chunk)
    want, want_last = recurrence(q, k, v, beta, decay, starts, state)
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(last, want_last)
    for t in range(s):
        at = slice(t, t + 1)
        mine = None if starts is None else starts[:, at]
        one, state = delta_rule.step(*(x[:, at] for x in (q, k, v, beta, decay)), mine, state)
        torch.testing.assert_close(one, want[:, at])
    torch.testing.assert_close(state, want_last)


def test_gradients_over_documents() -> None:
    leaves = [t.requires_grad_() for t in drawn(1, 7, 2, 1, 3)]
    starts = torch.tensor([[False, False, True, False, False, True, False]])

    def run(*given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        *inputs, state = given
        return delta_rule.scan(*inputs, starts, state, 3)

    assert torch.autograd.gradcheck(run, leaves)
