"""One token after a state: the launches against the plain steps in fp64, states and reads."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import assert_rows

from purelm.errors import KernelError
from purelm.kernels.launch import interpreting
from purelm.kernels.state_step import delta_step, ssd_step

cases = {
    "rows": st.integers(1, 3),
    "heads": st.sampled_from([(1, 1), (3, 1), (4, 2)]),
    "p": st.sampled_from([3, 8, 40]),
    "n": st.sampled_from([5, 16, 200]),
    "documents": st.booleans(),
    "dtype": st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    "seed": st.integers(0, 2**31),
}


def drawn(rows, widths, dtype, seed):
    """Slices of one wide row, as projections make them."""
    g = torch.Generator().manual_seed(seed)
    wide = torch.randn(rows, 1, sum(widths) + 2, generator=g).to(dtype)
    return [*wide.split_with_sizes([*widths, 2], -1)[:-1]], g


def check(step, inputs, rest, starts, state, dtype):
    """Of a step in place: what it reads and what it leaves, in fp32 sums."""

    def run(inputs, rest, state):
        state = state.clone()
        with torch.no_grad():
            y = step(*inputs, *rest, starts, state)
        return y.to(inputs[0].dtype), state

    def wide(tensors):
        return [t.double() if isinstance(t, torch.Tensor) else t for t in tensors]

    ours = run(inputs, rest, state)
    with interpreting(False):
        eager = run(inputs, rest, state)
        exact = run(wide(inputs), wide(rest), state.double())
    for each in zip(ours, eager, exact, strict=True):
        assert_rows(*(t.reshape(1, -1) for t in each))


@settings(max_examples=30)
@given(limits=st.sampled_from([(0.0, float("inf")), (0.5, 0.9)]), **cases)
def test_ssd(interpreted, poisoned, rows, heads, p, n, documents, dtype, seed, limits):
    h, groups = heads
    (x, dt, b, c), g = drawn(rows, (h * p, h, groups * n, groups * n), dtype, seed)
    x, b, c = x.view(rows, 1, h, p), *(t.view(rows, 1, groups, n) for t in (b, c))
    dt_bias, a_log, d = torch.randn(3, h, generator=g).to(dtype).unbind(0)
    state = torch.randn(rows, h, p, n, generator=g)
    starts = torch.rand((rows, 1), generator=g) < 0.5 if documents else None
    # Very small steps too, whose softplus has few digits of 1 + e.
    check(ssd_step, [x, dt * 6 - 4, b, c], [dt_bias, a_log, d, limits], starts, state, dtype)


@settings(max_examples=30)
@given(**cases)
def test_delta(interpreted, poisoned, rows, heads, p, n, documents, dtype, seed):
    h, groups = heads
    widths = (groups * n, groups * n, h * p, h, h)
    (q, k, v, beta, decay), g = drawn(rows, widths, dtype, seed)
    q, k = (t.view(rows, 1, groups, n) for t in (q, k))
    dt_bias, a_log = torch.randn(2, h, generator=g).to(dtype).unbind(0)
    state = torch.randn(rows, h, n, p, generator=g)
    starts = torch.rand((rows, 1), generator=g) < 0.5 if documents else None
    inputs = [q, k, v.view(rows, 1, h, p), beta, decay * 6 - 4]
    check(delta_step, inputs, [dt_bias, a_log], starts, state, dtype)


def test_starts_on_another_device_raise(interpreted):
    (x, dt, b, c), _ = drawn(1, (6, 2, 4, 4), torch.float32, 0)
    starts = torch.zeros(1, 1, dtype=torch.bool, device="meta")
    inputs = x.view(1, 1, 2, 3), dt, b.view(1, 1, 1, 4), c.view(1, 1, 1, 4)
    with torch.no_grad(), pytest.raises(KernelError, match="different devices"):
        ssd_step(*inputs, *torch.zeros(3, 2), (0.0, 1.0), starts, torch.zeros(1, 2, 3, 4))
    q, v, rates = torch.ones(1, 1, 1, 4), torch.ones(1, 1, 2, 3), torch.ones(2, 1, 1, 2)
    with torch.no_grad(), pytest.raises(KernelError, match="different devices"):
        delta_step(q, q, v, *rates, *torch.zeros(2, 2), starts, torch.zeros(1, 2, 4, 3))


def test_gradients_take_the_reference(interpreted):
    """The launch has none, and says nothing: what needs them runs in plain torch."""
    (x, dt, b, c), _ = drawn(1, (6, 2, 4, 4), torch.float32, 0)
    x, b, c = x.view(1, 1, 2, 3).requires_grad_(), b.view(1, 1, 1, 4), c.view(1, 1, 1, 4)
    one = torch.ones(2)
    y = ssd_step(x, dt, b, c, one, one, one, (0.0, 9.0), None, torch.zeros(1, 2, 3, 4))
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert bool((dx != 0).all())


def test_a_state_that_is_no_whole_raises(interpreted):
    (x, dt, b, c), _ = drawn(1, (6, 2, 4, 4), torch.float32, 0)
    x, b, c = x.view(1, 1, 2, 3), b.view(1, 1, 1, 4), c.view(1, 1, 1, 4)
    one, state = torch.ones(2), torch.zeros(1, 2, 4, 3).mT
    with pytest.raises(KernelError, match="contiguous"):
        ssd_step(x, dt, b, c, one, one, one, (0.0, 9.0), None, state)
