"""Short convolutions: the launches against the reference in fp64, forward, backward and step."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import assert_rows

from purelm.errors import KernelError
from purelm.kernels.short_conv import ROWS, short_conv, short_conv_reference

FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def drawn(b, s, channels, kernel, bias, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    # A slice of a wider projection, as the mixers have it.
    x = torch.randn(b, s, channels + 5, generator=g)[..., 2 : 2 + channels].to(dtype)
    weight = torch.randn(channels, kernel, generator=g).to(dtype)
    # And what comes of a wider parameter, of which every other number is another's.
    pair = torch.randn(channels, 2, generator=g).to(dtype)
    return x, weight, pair[:, 0] if bias else None, g


def some(shape, share, g):
    return torch.rand(shape, generator=g) < share


cases = {
    "b": st.integers(1, 2),
    "s": st.one_of(st.integers(1, 9), st.sampled_from([ROWS, ROWS + 1, 2 * ROWS + 3])),
    "channels": st.sampled_from([1, 6, 130]),
    "kernel": st.integers(2, 5),
    "bias": st.booleans(),
    "silu": st.booleans(),
    "share": st.sampled_from([None, 0.0, 0.2, 0.9]),
    "dtype": st.sampled_from(FLOATS),
    "seed": st.integers(0, 2**31),
}


@settings(max_examples=40)
@given(weights=st.booleans(), **cases)
def test_launch(
    interpreted, poisoned, b, s, channels, kernel, bias, silu, share, weights, dtype, seed
):
    x, weight, add, g = drawn(b, s, channels, kernel, bias, dtype, seed)
    starts = None if share is None else some((b, s), share, g)
    dy = torch.randn(b, s, channels, generator=g).to(dtype)

    def run(f, x, weight, add, dy):
        given = [x] + weights * [weight] + (weights and bias) * [add]
        leaves = [t.detach().requires_grad_() for t in given]
        taken = [*leaves, *[x, weight, add][len(leaves) :]]
        y = f(*taken, starts, None, silu)
        return y.detach(), *torch.autograd.grad(y, leaves, dy)

    ours = run(short_conv, x, weight, add, dy)
    eager = run(short_conv_reference, x, weight, add, dy)
    wide = (x.double(), weight.double(), None if add is None else add.double(), dy.double())
    exact = run(short_conv_reference, *wide)
    for mine, theirs, truth in zip(ours, eager, exact, strict=True):
        assert_rows(*(t.reshape(1, -1) for t in (mine, theirs, truth)))


@settings(max_examples=30)
@given(cut=st.integers(1, 8), **cases)
def test_pieces_go_on_where_the_last_ended(
    interpreted, poisoned, b, s, channels, kernel, bias, silu, share, dtype, seed, cut
):
    """Pieces of any length, steps of one token among them, with the state between them."""
    x, weight, add, g = drawn(b, s, channels, kernel, bias, dtype, seed)
    starts = None if share is None else some((b, s), share, g)
    state = torch.randn(b, kernel - 1, channels, generator=g).to(dtype)
    theirs, mine = state.clone(), state.clone()
    want = short_conv_reference(x, weight, add, starts, theirs, silu)
    exact = short_conv_reference(
        x.double(), weight.double(), None if add is None else add.double(), starts,
        state.double(), silu,
    )  # fmt: skip
    with torch.no_grad():
        parts = [
            short_conv(
                x[:, i : i + cut], weight, add,
                None if starts is None else starts[:, i : i + cut], mine, silu,
            )
            for i in range(0, s, cut)
        ]  # fmt: skip
    assert_rows(*(t.reshape(1, -1) for t in (torch.cat(parts, 1), want, exact)))
    assert torch.equal(mine, theirs)


def test_transforms(interpreted):
    x, weight, add, g = drawn(2, 7, 6, 4, True, torch.float32, 0)
    starts = some((2, 7), 0.3, g)

    def loss(f, x, weight):
        return f(x, weight, add, starts[:1], None, True).square().sum()

    each = torch.vmap(torch.func.grad(lambda *a: loss(short_conv, *a), (0, 1)), (0, None))
    for i, (dx, dw) in enumerate(zip(*each(x[:, None], weight), strict=True)):
        want = torch.func.grad(lambda *a: loss(short_conv_reference, *a), (0, 1))(
            x[i : i + 1], weight
        )
        torch.testing.assert_close((dx, dw), want)


def test_starts_on_another_device_raise(interpreted):
    x, weight, *_ = drawn(1, 4, 6, 3, False, torch.float32, 0)
    starts = torch.zeros(1, 4, dtype=torch.bool, device="meta")
    for state in (None, torch.zeros(1, 2, 6)):
        with pytest.raises(KernelError, match="different devices"):
            short_conv(x, weight, None, starts, state)


def test_shapes_that_do_not_belong_together_raise():
    x = torch.zeros(2, 5, 6)
    with pytest.raises(KernelError, match="weight"):
        short_conv(x, torch.zeros(5, 4))
    with pytest.raises(KernelError, match="starts"):
        short_conv(x, torch.zeros(6, 4), starts=torch.zeros(2, 4, dtype=torch.bool))
    with pytest.raises(KernelError, match="state"):
        short_conv(x, torch.zeros(6, 4), state=torch.zeros(2, 4, 6))
