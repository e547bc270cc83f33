"""Int8 leaves: bitsandbytes' bytes, products no worse than its, gradients, typed errors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import assert_rows

from purelm.errors import KernelError
from purelm.quant.int8 import Int8, dequantize, linear, quantize
from purelm.quant.linear import linear as any_linear
from purelm.quant.linear import weight_of

FLOATS = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(scope="module")
def bnb():
    with torch.compiler.set_stance("force_eager"):
        yield pytest.importorskip("bitsandbytes")


def drawn(rows, outputs, width, seed, outliers, dtype=torch.float16):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=g).clamp(-4, 4)
    for i in range(outliers):
        x[(seed + i) % rows, (seed * 7 + i) % width] = (-1) ** i * (6.0 + 10.0 * i)
    return x.to(dtype), (torch.randn(outputs, width, generator=g) * 0.05).to(dtype)


def exact(x, leaf):
    """The product of the codes and the columns apart, in float64."""
    x, t = x.double(), leaf.threshold
    big = x.abs() >= t if t else torch.zeros_like(x, dtype=torch.bool)
    inner = x.masked_fill(big, 0)
    scale = inner.abs().amax(1, keepdim=True)
    codes = torch.round(inner.float() * (127.0 / scale.float())).double()
    codes = codes.nan_to_num(0.0).masked_fill(big.any(0), 0)
    apart = x.masked_fill(~big.any(0), 0)
    weight = leaf.codes.double() * leaf.scale.double()[:, None] / 127
    return codes * scale / 127 @ weight.mT + apart @ weight.mT


@given(
    rows=st.integers(1, 9),
    outputs=st.integers(16, 60),
    width=st.integers(8, 300),  # its product is wrong for a width of 1
    outliers=st.integers(0, 3),
    threshold=st.sampled_from([0.0, 6.0]),
    seed=st.integers(0, 2**31),
)
def test_against_bitsandbytes(bnb, rows, outputs, width, outliers, threshold, seed):
    x, w = drawn(rows, outputs, width, seed, outliers)
    leaf = quantize(w, threshold=threshold)
    codes, scale, _ = bnb.functional.int8_vectorwise_quant(w.clone())
    assert torch.equal(leaf.codes, codes) and torch.equal(leaf.scale, scale)
    state = bnb.MatmulLtState()
    state.threshold, state.CB, state.SCB = threshold, codes, scale
    state.has_fp16_weights, state.is_training = False, False
    theirs = bnb.matmul(x.clone(), codes, state=state)
    assert_rows(linear(x, leaf), theirs, exact(x, leaf))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_gradient_is_the_dequantized_weight(dtype, shape):
    _, w = drawn(1, 12, 40, 1, 0, dtype)
    leaf, bias = quantize(w), torch.randn(12)
    x = torch.randn(*shape, 40).to(dtype).requires_grad_()
    y = any_linear(x, leaf, bias)
    assert y.shape == (*shape, 12) and y.dtype == dtype
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    torch.testing.assert_close(dx, dy @ dequantize(leaf, dtype))
    near = torch.nn.functional.linear(x, w, bias.to(dtype))
    assert (y - near).abs().max() < 0.05
    assert torch.equal(weight_of(leaf, torch.float32), dequantize(leaf, torch.float32))
    grad = torch.func.grad(lambda x: any_linear(x, leaf).float().sum())(x)
    torch.testing.assert_close(grad, torch.ones_like(y) @ dequantize(leaf, dtype))


def test_outliers_keep_their_digits():
    x, w = drawn(4, 16, 64, 2, 3, torch.float32)
    want = x @ w.mT

    def error(threshold):
        return (linear(x, quantize(w, threshold=threshold)) - want).abs().max()

    assert error(6.0) < 0.5 * error(0.0)


@given(rows=st.integers(1, 6), width=st.integers(1, 200), seed=st.integers(0, 2**31))
def test_round_trip(rows, width, seed):
    w = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    leaf = quantize(w)
    back = dequantize(leaf)
    assert ((back - w).abs() <= leaf.scale[:, None] * (0.5 / 127 + 1e-6)).all()
    assert torch.equal(quantize(back).codes, leaf.codes)


def test_zero_and_denormal_rows():
    w = torch.randn(4, 8)
    w[1] = 0.0
    w[2] *= 1e-41
    leaf = quantize(w)
    assert (leaf.codes[1] == 0).all() and dequantize(leaf).isfinite().all()
    assert linear(torch.zeros(2, 8), leaf).eq(0).all() and linear(w[:0], leaf).shape == (0, 4)


def test_leaf_is_a_pytree_node():
    leaf = quantize(torch.randn(6, 10), threshold=0.0)
    parts, structure = torch.utils._pytree.tree_flatten({"w": leaf})
    back = torch.utils._pytree.tree_unflatten(parts, structure)["w"]
    assert len(parts) == 2 and isinstance(back, Int8) and back.threshold == 0.0
    assert torch.equal(dequantize(back.to("cpu")), dequantize(leaf))
    assert (leaf.shape, leaf.ndim, leaf.numel()) == ((6, 10), 2, 60)


def test_bad_input():
    w = torch.randn(4, 8)
    broken = w.clone()
    broken[2, 3] = float("nan")
    with pytest.raises(KernelError, match="'up'.*1 of 32 values are NaN"):
        quantize(broken, name="up")
    for bad in (torch.ones(3), torch.ones(0, 3), torch.ones(2, 2, dtype=torch.int8)):
        with pytest.raises(KernelError, match="int8 takes"):
            quantize(bad)
    for threshold in (-1.0, float("nan")):
        with pytest.raises(KernelError, match="threshold"):
            quantize(w, threshold=threshold)
    with pytest.raises(KernelError, match="int8 weight"):
        linear(torch.ones(2, 4), quantize(w))
