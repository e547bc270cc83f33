"""The one linear: dense and NF4 weights give the same numbers and gradients, and compose."""

import pytest
import shim
import torch

from purelm.errors import KernelError
from purelm.kernels import launch, nf4_matvec
from purelm.quant import linear as linear_module
from purelm.quant.linear import linear, weight_of
from purelm.quant.nf4 import dequantize, quantize

FLOATS = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(5,), (2, 3), (2, 3, 4)])
def test_nf4_equals_its_dense_weight(dtype, double, shape, kind):
    leaf = quantize(torch.randn(12, 40), double=double, kind=kind)
    bias = torch.randn(12)
    x = torch.randn(*shape, 40).to(dtype).requires_grad_()
    y = linear(x, leaf, bias)
    want = torch.nn.functional.linear(x, dequantize(leaf, dtype)) + bias.to(dtype)
    assert y.dtype == dtype and torch.equal(y, want)
    dy = torch.randn_like(y)
    assert torch.equal(torch.autograd.grad(y, x, dy)[0], torch.autograd.grad(want, x, dy)[0])


def test_only_the_packed_weight_is_kept():
    leaf = quantize(torch.randn(64, 64))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        linear(torch.randn(3, 64, requires_grad=True), leaf)
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in leaf.tensors}


def test_bias_and_dense_weight_can_be_trained():
    x, w, b = torch.randn(3, 8), torch.randn(4, 8, requires_grad=True), torch.randn(4)
    b.requires_grad_()
    grads = torch.autograd.grad(linear(x.bfloat16(), w, b).float().sum(), (w, b))
    assert [g.dtype for g in grads] == [torch.float32, torch.float32]
    leaf = quantize(torch.randn(4, 8))
    assert torch.autograd.grad(linear(x, leaf, b).sum(), b)[0].equal(torch.full((4,), 3.0))


def test_transforms():
    leaf = quantize(torch.randn(12, 40))
    dense = dequantize(leaf)
    x = torch.randn(5, 3, 40)

    def loss(weight):
        return lambda x: linear(x, weight).pow(3).sum()

    for make in (
        lambda f: torch.func.grad(f)(x),
        lambda f: torch.func.vmap(f)(x),
        lambda f: torch.func.vmap(torch.func.grad(f))(x),
        lambda f: torch.func.grad(lambda x: torch.func.vmap(f)(x).sum())(x),
        lambda f: torch.func.grad(lambda x: torch.func.grad(f)(x).sum())(x),
    ):
        torch.testing.assert_close(make(loss(leaf)), make(loss(dense)))


def test_leaf_as_an_argument_of_a_transform():
    leaf, a = quantize(torch.randn(12, 40)), torch.randn(4, 40)
    grad = torch.func.grad(lambda a, w: linear(a, w).sum())(a, leaf)
    torch.testing.assert_close(grad, dequantize(leaf).sum(0).expand(4, 40))


def test_weight_of():
    leaf = quantize(torch.randn(6, 10))
    assert torch.equal(weight_of(leaf, torch.bfloat16), dequantize(leaf, torch.bfloat16))
    w = torch.randn(6, 10)
    assert weight_of(w, torch.float32) is w


def test_where_the_weight_stays_packed(monkeypatch):
    """A few rows, no gradient, a GPU (here the interpreter), whole runs: else the dense path."""
    pytest.importorskip("triton")
    shim.install()
    leaf = quantize(torch.randn(12, 128), double=True)
    odd = quantize(torch.randn(12, 40))
    bias = torch.randn(12)
    called, matvec = [], nf4_matvec.matvec
    monkeypatch.setattr(nf4_matvec, "matvec", lambda *a: called.append(1) or matvec(*a))

    def packed(x, leaf=leaf):
        called.clear()
        y = linear(x, leaf, bias)
        want = torch.nn.functional.linear(x, dequantize(leaf, x.dtype), bias.to(x.dtype))
        tolerance = 8 * torch.finfo(x.dtype).eps * float(want.abs().max())
        assert y.shape == want.shape and y.dtype == x.dtype
        torch.testing.assert_close(y.detach(), want.detach(), rtol=0, atol=tolerance)
        return bool(called)

    x = torch.randn(5, 128)
    with torch.no_grad():
        assert not packed(x[:1])  # no GPU
    with launch.interpreting():
        assert not packed(x[:1])  # a graph may be built
        with torch.no_grad():
            assert packed(x[0]) and packed(x[:1]) and packed(x[:1].view(1, 1, 128))
            assert packed(x[:1].bfloat16())
            assert packed(x[:2].bfloat16())
            assert not packed(x[:2])  # fp32 sums
            many = x.bfloat16().repeat(13, 1)
            assert packed(many[:16]) and not packed(many[:17])  # too few outputs
            monkeypatch.setattr(linear_module, "PACKED_OUTPUTS", 12)
            assert packed(many[:64]) and not packed(many[:65])
            assert not packed(x[:1].clone().requires_grad_())
            assert not packed(x[:1, :40], odd) and not packed(x[:1].double())
            called.clear()
            torch.func.vmap(lambda x: linear(x, leaf))(x[:2])
            assert not called
            assert linear(x[:0], leaf).shape == (0, 12)


def test_bad_input():
    leaf = quantize(torch.randn(12, 40))
    with pytest.raises(KernelError, match=r"\[3, 12\].*\[12, 40\]"):
        linear(torch.ones(3, 12), leaf)
    with pytest.raises(KernelError, match="type str"):
        linear(torch.ones(3, 12), "weight")
