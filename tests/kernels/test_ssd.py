"""Mamba 2's scan: the launches against the reference in fp64, over drawn shapes and documents."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import assert_rows

from purelm.errors import KernelError
from purelm.kernels import ssd
from purelm.kernels.launch import interpreting

NAMES = ("x", "dt", "decay", "b", "c", "d")


@pytest.fixture
def small(monkeypatch):
    """Chunks of 16, tiles of a part of a state, several splits of a group's heads."""
    monkeypatch.setattr(ssd, "CHUNK", 16)

    def configs(p, n):
        return ssd.Configs(*(c._replace(n=16) for c in configs_for(p, n)))._replace(
            states=ssd.Config(16, 16, 4, 2)
        )

    configs_for = ssd.configs_for
    monkeypatch.setattr(ssd, "configs_for", configs)
    monkeypatch.setattr(ssd, "FILLED", 8)


def drawn(rows, s, heads, groups, p, n, dtype, seed):
    """The inputs as the mixer has them: x, b and c slices of one wider tensor."""
    g = torch.Generator().manual_seed(seed)
    wide = torch.randn(rows, s, heads * p + 2 * groups * n + 3, generator=g).to(dtype)
    x, b, c, _ = wide.split_with_sizes([heads * p, groups * n, groups * n, 3], -1)
    dt = torch.rand(rows, s, heads, generator=g)
    decay = -dt * torch.rand(heads, generator=g) * 4
    d = torch.randn(heads, generator=g)
    x, b, c = x.unflatten(-1, (heads, p)), *(t.unflatten(-1, (groups, n)) for t in (b, c))
    return [x, dt, decay, b, c, d], g


cases = {
    "rows": st.integers(1, 2),
    "s": st.one_of(st.integers(1, 9), st.sampled_from([16, 35])),
    "heads": st.sampled_from([(1, 1), (3, 1), (4, 2)]),
    "p": st.sampled_from([8, 20, 32]),
    "n": st.sampled_from([5, 16, 24]),
    "share": st.sampled_from([None, 0.0, 0.1, 0.6]),
    "dtype": st.sampled_from([torch.float16, torch.bfloat16]),
    "seed": st.integers(0, 2**31),
}


def quadratic(x, dt, decay, b, c, d, starts):
    """As attention over the whole row, in the dtypes of the inputs."""
    s, share = x.shape[1], x.shape[2] // b.shape[2]
    seen = torch.ones(s, s, dtype=torch.bool).tril()
    if starts is not None:
        segment = starts.cumsum(1)
        seen = (seen & (segment[:, :, None] == segment[:, None, :]))[:, None]
    sums = decay.cumsum(1).mT
    pairs = (sums[..., :, None] - sums[..., None, :]).masked_fill(~seen, -torch.inf).exp()
    products = torch.einsum("bign,bjgn->bgij", c, b).repeat_interleave(share, 1)
    weights = (products * pairs * dt.mT[..., None, :]).to(x.dtype)
    return torch.einsum("bhij,bjhp->bihp", weights, x) + x * d.to(x.dtype)[:, None]


def run(f, inputs, starts, dy):
    leaves = [t.detach().requires_grad_() for t in inputs]
    y = f(*leaves, starts)
    return y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))


def whole(*inputs):
    return ssd.ssd(*inputs, None)[0]


@settings(max_examples=5)
@given(**cases)
def test_launch(interpreted, poisoned, small, rows, s, heads, p, n, share, dtype, seed):
    inputs, g = drawn(rows, s, *heads, p, n, dtype, seed)
    starts = None if share is None else torch.rand((rows, s), generator=g) < share
    dy = torch.randn(inputs[0].shape, generator=g).to(dtype)
    ours = run(whole, inputs, starts, dy)
    with interpreting(False):
        exact = run(whole, [t.double() for t in inputs], starts, dy)
    eager = run(quadratic, inputs, starts, dy)
    for name, mine, theirs, truth in zip(("y", *NAMES), ours, eager, exact, strict=True):
        assert mine.dtype == (torch.float32 if name in ("dt", "decay", "d") else dtype)
        # Gradients of what is fp32 are sums of products of that dtype all the same.
        assert_rows(*(t.to(dtype).reshape(1, -1) for t in (mine, theirs)), truth.reshape(1, -1))


def test_math_in_fp32(interpreted, poisoned, small, monkeypatch):
    """fp32, which the launches are not chosen for, shows what rounding to 16 bits would hide."""
    monkeypatch.setattr(ssd, "backend_for", lambda x, b: "triton")
    inputs, g = drawn(1, 39, 4, 2, 20, 24, torch.float32, 1)
    starts = torch.rand((1, 39), generator=g) < 0.1
    dy = torch.randn(inputs[0].shape, generator=g)
    ours = run(whole, inputs, starts, dy)
    monkeypatch.undo()
    with interpreting(False):
        exact = run(whole, [t.double() for t in inputs], starts, dy)
    eager = run(quadratic, inputs, starts, dy)
    for each in zip(ours, eager, exact, strict=True):
        assert_rows(*(t.reshape(1, -1) for t in each))


@pytest.mark.parametrize("documents", [False, True])
def test_goes_on_from_a_state(interpreted, poisoned, small, documents):
    inputs, g = drawn(2, 37, 4, 2, 20, 24, torch.bfloat16, 2)
    before = torch.randn(2, 4, 20, 24, generator=g)
    starts = torch.rand((2, 37), generator=g) < 0.1 if documents else None
    with torch.no_grad():
        y, last = ssd.ssd(*inputs, starts, before)
        with interpreting(False):
            eager, eager_last = ssd.ssd(*inputs, starts, before)
            exact, exact_last = ssd.ssd(*(t.double() for t in inputs), starts, before.double())
    assert_rows(*(t.flatten(1) for t in (y, eager.bfloat16(), exact)))
    assert last.dtype == torch.float32
    # What it takes up was rounded to 16 bits.
    assert_rows(*(t.flatten(1) for t in (last.bfloat16(), eager_last.bfloat16(), exact_last)))


def test_backends(interpreted):
    x, b = torch.zeros(1, 1, 4, 64).bfloat16(), torch.zeros(1, 1, 1, 128).bfloat16()
    assert ssd.backend_for(x, b) == "triton"
    assert ssd.backend_for(x.float(), b.float()) == "reference"
    assert ssd.backend_for(torch.zeros(1, 1, 4, 160).bfloat16(), b) == "reference"
    with interpreting(False):
        assert ssd.backend_for(x, b) == "reference"


def test_bad_shapes():
    inputs, _ = drawn(1, 4, 3, 1, 8, 5, torch.float32, 0)
    with pytest.raises(KernelError, match="multiple of g"):
        ssd.ssd(
            *inputs[:3],
            inputs[3].repeat(1, 1, 2, 1),
            inputs[4].repeat(1, 1, 2, 1),
            inputs[5],
            None,
            None,
        )


def test_starts_on_another_device_raise(interpreted):
    inputs, _ = drawn(1, 5, 2, 1, 8, 8, torch.bfloat16, 0)
    starts = torch.zeros(1, 5, dtype=torch.bool, device="meta")
    with pytest.raises(KernelError, match="different devices"):
        ssd.ssd(*inputs, starts, None)
