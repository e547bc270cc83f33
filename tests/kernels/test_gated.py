"""Gated activations: the reference is transformers', the launch keeps to the tolerance rule."""

import pytest
import shim
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import assert_elementwise, assert_rows

from purelm.errors import KernelError
from purelm.kernels.gated import ACTIVATIONS, gated, gated_pull, gated_reference

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
HF_NAMES = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu2": "relu2"}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_reference_equals_transformers(activation, dtype):
    activations = pytest.importorskip("transformers.activations")
    gate, up = (torch.randn(2, 40, 17) * 3).to(dtype).unbind(0)
    want = activations.ACT2FN[HF_NAMES[activation]](gate) * up
    assert torch.equal(gated(gate, up, activation), want)


def exact_gated(gate, up, activation):
    """float64, and without the cancellation of 1 + tanh and 1 + erf far left of zero."""
    if activation == "gelu":
        return gate * 0.5 * torch.special.erfc(-gate / 2**0.5) * up
    if activation == "gelu_tanh":
        inner = (2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)
        return gate * torch.sigmoid(2 * inner) * up
    return gated_reference(gate, up, activation)


@given(
    rows=st.integers(1, 5),
    width=st.one_of(st.integers(1, 300), st.sampled_from([1024, 2048, 2049])),
    activation=st.sampled_from(ACTIVATIONS),
    dtype=st.sampled_from(FLOATS),
    size=st.sampled_from([1.0, 1e-4, 8.0]),
    seed=st.integers(0, 2**31),
)
def test_launch(interpreted, poisoned, rows, width, activation, dtype, size, seed):
    g = torch.Generator().manual_seed(seed)
    gate, up, dh = (torch.randn(3, rows, width, generator=g) * size).to(dtype).unbind(0)

    def run(f, gate, up, dh):
        gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
        h = f(gate, up, activation)
        return h.detach(), *torch.autograd.grad(h, (gate, up), dh)

    ours = run(gated, gate, up, dh)
    eager = run(gated_reference, gate, up, dh)
    exact = run(exact_gated, gate.double(), up.double(), dh.double())
    for i, (mine, theirs, truth) in enumerate(zip(ours, eager, exact, strict=True)):
        if i == 1 and activation != "relu2":
            # The slope has a root, near which a relative error has no bound.
            assert_rows(*(t.reshape(1, -1) for t in (mine, theirs, truth)))
        else:
            assert_elementwise(mine, theirs, truth, pooled=activation != "relu2")


@pytest.mark.parametrize("spend", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_pull_is_forward_and_backward(interpreted, poisoned, dtype, activation, spend):
    """To the bit, and only what may be written over is."""
    gate, up, dh = (torch.randn(3, 3, 901) * 3).to(dtype).unbind(0)
    a, b = gate.clone().requires_grad_(), up.clone().requires_grad_()
    want = gated(a, b, activation)
    want = want.detach(), *torch.autograd.grad(want, (a, b), dh)
    given = dh.clone(), gate.clone(), up.clone()
    found = gated_pull(*given, activation, spend=spend)
    assert all(torch.equal(x, y) for x, y in zip(found, want, strict=True))
    assert found[0] is given[0] and (found[1] is given[1]) == (found[2] is given[2]) == spend
    if not spend:
        assert torch.equal(given[1], gate) and torch.equal(given[2], up)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_pull_without_a_launch(activation):
    gate, up, dh = torch.randn(3, 3, 9, dtype=torch.float64).unbind(0)
    a, b = gate.clone().requires_grad_(), up.clone().requires_grad_()
    h = gated_reference(a, b, activation)
    found = gated_pull(dh.clone(), gate, up, activation, spend=True)
    want = h.detach(), *torch.autograd.grad(h, (a, b), dh)
    assert all(torch.equal(x, y) for x, y in zip(found, want, strict=True))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_large_values_stay_finite(interpreted, activation):
    gate = torch.tensor([-1e4, -200.0, -30.0, 0.0, 30.0, 200.0, 1e4], requires_grad=True)
    up = torch.ones(7)
    h = gated(gate, up, activation)
    torch.testing.assert_close(h, gated_reference(gate, up, activation))
    (ours,) = torch.autograd.grad(h.sum(), gate)
    (theirs,) = torch.autograd.grad(gated_reference(gate, up, activation).sum(), gate)
    torch.testing.assert_close(ours, theirs)


def test_strided_halves_of_one_tensor(interpreted, poisoned):
    both = torch.randn(3, 5, 32)
    gate, up = both.chunk(2, -1)
    h = gated(gate, up, "silu")
    assert h.is_contiguous()
    torch.testing.assert_close(h, gated_reference(gate, up, "silu"))


def test_order_of_programs_does_not_matter(interpreted):
    gate, up = torch.randn(2, 9000).unbind(0)
    with shim.checking(race=True, reverse=True):
        h = gated(gate, up, "silu")
    assert torch.equal(h, gated(gate, up, "silu"))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_transforms(interpreted, activation):
    gate, up = torch.randn(2, 3, 8).unbind(0)

    def loss(f):
        return lambda gate, up: f(gate, up, activation).square().sum()

    for make in (
        lambda f: torch.func.grad(f, argnums=(0, 1))(gate, up),
        lambda f: torch.func.vmap(f, (0, None))(gate, up[0]),
        lambda f: torch.func.vmap(f, (1, 1))(gate, up),
        lambda f: torch.func.vmap(torch.func.grad(f, argnums=(0, 1)), (0, None))(gate, up[0]),
        lambda f: torch.func.grad(lambda g: torch.func.vmap(f)(g, up).sum())(gate),
    ):
        torch.testing.assert_close(make(loss(gated)), make(loss(gated_reference)))


def test_second_derivative_raises(interpreted):
    gate, up = torch.randn(2, 8).unbind(0)
    first = torch.func.grad(lambda g: gated(g, up, "silu").square().sum())
    with pytest.raises(KernelError, match="first derivatives only"):
        torch.func.grad(lambda g: first(g).sum())(gate)


def test_bad_input():
    with pytest.raises(KernelError, match="'swish'"):
        gated(torch.ones(2), torch.ones(2), "swish")
    with pytest.raises(KernelError, match="expected the same"):
        gated(torch.ones(2), torch.ones(3), "silu")
    with pytest.raises(KernelError, match="expected the same"):
        gated(torch.ones(2), torch.ones(2).half(), "silu")
    with pytest.raises(KernelError, match="expected the same"):
        gated_pull(torch.ones(2), torch.ones(2), torch.ones(3), "silu")
