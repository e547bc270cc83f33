"""RMS norm: the reference is transformers', the launch keeps to the tolerance rule, transforms
compose.
"""

from unittest import mock

import pytest
import shim
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import assert_rows

from purelm.errors import KernelError
from purelm.kernels import launch
from purelm.kernels import rms_norm_launch as module
from purelm.kernels.rms_norm import rms_norm, rms_norm_pull, rms_norm_reference

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
STYLES = [{}, {"offset": 1.0, "cast_first": False}, {"cast_first": False}, {"offset": 1.0}]
STYLES += [{"centered": True, "cast_first": False}]
SHAPES = {
    "rows": st.integers(1, 7),
    "width": st.one_of(st.integers(1, 300), st.sampled_from([1024, 1025, 2048, 2049])),
    "seed": st.integers(0, 2**31),
    "dtype": st.sampled_from(FLOATS),
    "style": st.sampled_from(STYLES),
    "size": st.sampled_from([1.0, 1e-3, 1e3]),
}


def drawn(rows, width, seed, dtype, size=1.0):
    g = torch.Generator().manual_seed(seed)
    x = (torch.randn(rows, width, generator=g) * size).to(dtype)
    w = (torch.randn(width, generator=g) * 0.2 + 1).to(dtype)
    return x, w, torch.randn(rows, width, generator=g).to(dtype)


def gradients(f, x, w, dy):
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    y = f(x, w)
    return y.detach(), *torch.autograd.grad(y, (x, w), dy.to(y.dtype))


@pytest.mark.parametrize("dtype", FLOATS)
def test_reference_equals_transformers(dtype):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    gemma = pytest.importorskip("transformers.models.gemma2.modeling_gemma2")
    x, w, _ = drawn(50, 96, 0, dtype)
    theirs = llama.LlamaRMSNorm(96, 1e-5).to(dtype)
    theirs.weight.data = w
    assert torch.equal(rms_norm(x, w, 1e-5), theirs(x))
    theirs = gemma.Gemma2RMSNorm(96, 1e-6).to(dtype)
    theirs.weight.data = w
    assert torch.equal(rms_norm(x, w, 1e-6, offset=1.0, cast_first=False), theirs(x))


@pytest.mark.parametrize("dtype", FLOATS)
def test_centered_is_a_layer_norm(dtype):
    """transformers', and torch's but for rounding; also far from zero, where squares cancel."""
    cohere = pytest.importorskip("transformers.models.cohere.modeling_cohere")
    x, w, _ = drawn(50, 96, 0, dtype)
    theirs = cohere.CohereLayerNorm(96, 1e-5).to(dtype)
    theirs.weight.data = w
    style = {"centered": True, "cast_first": False}
    assert torch.equal(rms_norm(x, w, 1e-5, **style), theirs(x))
    far = x.double() + 1e6
    want = torch.nn.functional.layer_norm(far, (96,), w.double(), None, 1e-5)
    torch.testing.assert_close(rms_norm(far, w.double(), 1e-5, **style), want, rtol=1e-9, atol=1e-9)


@given(**SHAPES, processors=st.sampled_from([132, 1]))
def test_launch(interpreted, poisoned, rows, width, seed, dtype, style, size, processors):
    x, w, dy = drawn(rows, width, seed, dtype, size)
    # Few programs for the weight's gradient: each takes several tiles, as one does of many rows.
    with mock.patch.object(module, "PROCESSORS", processors):
        ours = gradients(lambda x, w: rms_norm(x, w, 1e-6, **style), x, w, dy)

    def reference(x, w):
        return rms_norm_reference(x, w, 1e-6, **style)

    eager = gradients(reference, x, w, dy)
    exact = gradients(reference, x.double(), w.double(), dy.double())
    # In a row of few values dx is a difference of nearly equal numbers: only y is held to the
    # rule.
    count = 1 if width < 16 else 3
    for mine, theirs, truth in zip(ours[:count], eager, exact, strict=False):
        assert_rows(mine, theirs, truth)


@given(**SHAPES)
def test_a_residual_is_added(interpreted, poisoned, rows, width, seed, dtype, style, size):
    """To the norm, and to its input's gradient, each read where it is written; with strides."""
    x, w, dy = drawn(rows, width, seed, dtype, size)
    onto = drawn(rows, 2 * width, seed + 1, dtype)[0][:, width:]

    def run(f, x, w, onto, dy):
        x, onto = x.detach().requires_grad_(), onto.detach().requires_grad_()
        y = f(x, w, 1e-6, **style, onto=onto)
        return y.detach(), *torch.autograd.grad(y, (x, onto), dy)

    wide = (t.double() for t in (x, w, onto, dy))
    ours, eager = (run(f, x, w, onto, dy) for f in (rms_norm, rms_norm_reference))
    exact = run(rms_norm_reference, *wide)
    count = 1 if width < 16 else 2  # as in test_launch
    for mine, theirs, truth in zip(ours[:count], eager, exact, strict=False):
        assert_rows(mine, theirs, truth)
    assert torch.equal(ours[2], dy)
    for beside in (None, onto):
        pulled = rms_norm_pull(dy, x, w, 1e-6, **style, onto=beside)
        assert pulled.dtype == dtype and not pulled.requires_grad
        if width >= 16:
            sums = [d if beside is None else d + onto.to(d.dtype) for d in (eager[1], exact[1])]
            assert_rows(pulled, *sums)


def test_a_pull_without_a_launch():
    x, w, dy = (t.double() for t in drawn(3, 20, 4, torch.float32))
    onto = dy.flip(0)
    y = rms_norm(x.requires_grad_(), w, 1e-6)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert torch.equal(rms_norm_pull(dy, x, w, 1e-6), dx)
    assert torch.equal(rms_norm_pull(dy, x, w, 1e-6, onto=onto), dx + onto)


def test_frozen_weight_gets_the_same_dx(interpreted, poisoned):
    x, w, dy = drawn(5, 96, 1, torch.bfloat16)
    x.requires_grad_()
    (frozen,) = torch.autograd.grad(rms_norm(x, w, 1e-6), x, dy)
    (trained,) = torch.autograd.grad(rms_norm(x, w.requires_grad_(), 1e-6), x, dy)
    assert torch.equal(frozen, trained)


def test_partial_sums_of_many_rows(interpreted, poisoned, monkeypatch):
    monkeypatch.setattr(module, "PROCESSORS", 2)
    x, w, dy = drawn(50, 300, 2, torch.float32)
    ours = gradients(lambda x, w: rms_norm(x, w, 1e-6), x, w, dy)
    with shim.checking(reverse=True):
        again = gradients(lambda x, w: rms_norm(x, w, 1e-6), x, w, dy)
    eager = gradients(lambda x, w: rms_norm_reference(x, w, 1e-6), x, w, dy)
    exact = gradients(
        lambda x, w: rms_norm_reference(x, w, 1e-6), x.double(), w.double(), dy.double()
    )
    for mine, twice, theirs, truth in zip(ours, again, eager, exact, strict=True):
        assert torch.equal(mine, twice)
        assert_rows(mine, theirs, truth)


def test_no_rows(interpreted, poisoned):
    x, w, dy = (t[:0] if t.dim() == 2 else t for t in drawn(1, 32, 2, torch.float32))
    y, dx, dw = gradients(lambda x, w: rms_norm(x, w, 1e-6), x, w, dy)
    assert y.shape == dx.shape == (0, 32) and torch.equal(dw, torch.zeros(32))


def test_strided_input(interpreted, poisoned):
    wide = torch.randn(4, 3, 64)
    for x in (wide[..., :32], wide.transpose(0, 1)[..., 32:], wide[..., ::2]):
        w = torch.randn(32)
        y = rms_norm(x, w, 1e-6)
        assert y.is_contiguous()
        torch.testing.assert_close(y, rms_norm_reference(x, w, 1e-6))


def test_transforms(interpreted):
    x, w, _ = drawn(4, 32, 5, torch.float32)
    xs = x.view(4, 1, 32)
    ws = torch.stack([w, w + 1, w + 2, w + 3])

    def loss(norm):
        return lambda x, w: norm(x, w, 1e-6).square().sum()

    for make in (
        lambda f: torch.func.grad(f, argnums=(0, 1))(x, w),
        lambda f: torch.func.vmap(f, (0, None))(xs, w),
        lambda f: torch.func.vmap(f, (0, 0))(xs, ws),
        lambda f: torch.func.vmap(torch.func.grad(f, argnums=(0, 1)), (0, None))(xs, w),
        lambda f: torch.func.vmap(torch.func.grad(f, argnums=(0, 1)), (None, 0))(x, ws),
        lambda f: torch.func.grad(lambda xs: torch.func.vmap(f, (0, None))(xs, w).sum())(xs),
    ):
        torch.testing.assert_close(make(loss(rms_norm)), make(loss(rms_norm_reference)))

    def onto(norm):
        return lambda x, onto: norm(x, w, 1e-6, onto=onto).pow(3).sum()

    for make in (
        lambda f: torch.func.grad(f, argnums=(0, 1))(x, x + 1),
        lambda f: torch.func.vmap(f, (0, None))(xs, x[:1]),
        lambda f: torch.func.vmap(torch.func.grad(f, argnums=(0, 1)), (None, 0))(x[:1], xs),
    ):
        torch.testing.assert_close(make(onto(rms_norm)), make(onto(rms_norm_reference)))
    pulled = torch.func.vmap(lambda dy, onto: rms_norm_pull(dy, x[:1], w, 1e-6, onto=onto))
    torch.testing.assert_close(
        pulled(xs, xs), rms_norm_pull(x, x[:1].expand(4, 32), w, 1e-6, onto=x)[:, None]
    )


def test_second_derivative_raises(interpreted):
    x, w, _ = drawn(2, 8, 5, torch.float32)
    twice = torch.func.grad(
        lambda x: torch.func.grad(lambda x: rms_norm(x, w, 1e-6).square().sum())(x).sum()
    )
    with pytest.raises(KernelError, match="first derivatives only"):
        twice(x)


def test_float64_takes_the_reference(interpreted):
    x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    w = torch.randn(7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-6), (x, w))


def test_bad_input():
    with pytest.raises(KernelError, match="weight"):
        rms_norm(torch.ones(2, 8), torch.ones(4), 1e-6)
    with pytest.raises(KernelError, match="beside an input"):
        rms_norm(torch.ones(2, 8), torch.ones(8), 1e-6, onto=torch.ones(1, 8))
    with pytest.raises(KernelError, match="beside an input"):
        rms_norm_pull(torch.ones(2, 8).half(), torch.ones(2, 8), torch.ones(8), 1e-6)
    with launch.interpreting(), pytest.raises(KernelError, match="up to 65536"):
        rms_norm(torch.ones(1, 65537), torch.ones(65537), 1e-6)
    with pytest.raises(KernelError, match="different devices"):
        rms_norm(torch.ones(2, 8), torch.ones(8, device="meta"), 1e-6)
