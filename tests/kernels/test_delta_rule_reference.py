"""The chunked gated delta rule against its recurrence, token by token, in fp64."""

import scans
import torch
from hypothesis import given, settings

from purelm.kernels import delta_rule_reference as delta_rule

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
@given(case=scans.cases)
def test_chunks_are_the_recurrence(case: scans.Case) -> None:
    inputs = drawn(2, case.s, *case.heads, case.seed)
    scans.assert_is(recurrence, delta_rule.scan, delta_rule.step, inputs, case)


def test_gradients_over_documents() -> None:
    leaves = [t.requires_grad_() for t in drawn(1, 7, 2, 1, 3)]
    starts = torch.tensor([[False, False, True, False, False, True, False]])

    def run(*given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        *inputs, state = given
        return delta_rule.scan(*inputs, starts, state, 3)

    assert torch.autograd.gradcheck(run, leaves)
