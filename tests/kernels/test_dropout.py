"""Dropout: the launch and plain torch draw the same, which is published Philox, in its share."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from purelm.errors import KernelError
from purelm.kernels import dropout
from purelm.kernels.dropout import Ahead, dropped, dropped_reference

pytestmark = pytest.mark.usefixtures("interpreted", "poisoned")


def test_the_published_draws() -> None:
    """Of Random123's known answers: counter 0, key 0."""
    made = dropout._philox(torch.zeros(1, dtype=torch.int64), torch.tensor(0))
    assert [int(t) for t in made] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@given(
    rows=st.integers(1, 5),
    width=st.sampled_from([1, 24, 1024, 1300]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    p=st.floats(0, 0.99),
    base=st.integers(0, 2**48),
    steps=st.sampled_from([0, 1, 7, 16, 2**40]),
)
def test_the_launch_is_the_reference(rows, width, dtype, p, base, steps):
    x = torch.randn(rows, 2 * width, generator=torch.Generator().manual_seed(1)).to(dtype)[:, ::2]
    want = dropped_reference(x, p, base + steps)
    on_device = Ahead(0, torch.tensor(base)) + steps
    for made in (
        dropped(x, p, base + steps),
        dropped(x, p, on_device),
        dropped_reference(x, p, on_device),
    ):
        assert made.dtype == dtype and torch.equal(made, want)


def test_shares_and_seeds() -> None:
    ones = torch.ones(300, 400)
    for p in (0.0, 0.1, 0.5, 0.9):
        made = dropped_reference(ones, p, 11)
        share = float((made == 0).float().mean())
        assert abs(share - p) <= 5 * (p * (1 - p) / ones.numel()) ** 0.5
        assert made.unique().tolist() == pytest.approx([0.0] * (p > 0) + [1 / (1 - p)])
    some, others = (dropped_reference(ones, 0.5, seed) == 0 for seed in (3, 4))
    assert abs(float((some == others).float().mean()) - 0.5) < 0.01


def test_what_is_dropped_is_zero_whatever_it_was() -> None:
    x = torch.tensor([float("inf"), float("nan"), -float("inf"), 1.0]).repeat(64)
    want = torch.where(dropout.mask(x.shape, 0.5, 3, x.device), x * 2, 0.0)
    assert (want == 0).any() and not want.isfinite().all()
    for made in (dropped(x, 0.5, 3), dropped_reference(x, 0.5, 3)):
        torch.testing.assert_close(made, want, rtol=0, atol=0, equal_nan=True)


def test_no_share() -> None:
    with pytest.raises(KernelError, match="dropout of 1"):
        dropped(torch.ones(3), 1.0, 0)


def test_transforms() -> None:
    """With the launch itself: a gradient is dropped as what it is of was, every member alike."""
    x = torch.randn(4, 3, 50, generator=torch.Generator().manual_seed(2))

    def f(x: torch.Tensor) -> torch.Tensor:
        return dropped(x, 0.3, 9).square().sum()

    want = torch.stack([2 * dropped_reference(dropped_reference(m, 0.3, 9), 0.3, 9) for m in x])
    got = torch.vmap(torch.func.grad(f))(x)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.stack([torch.func.grad(f)(m) for m in x]), want)
