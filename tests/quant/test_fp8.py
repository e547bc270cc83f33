"""Fp8 leaves and products in fp8: bounds, layouts, gradients, transforms, typed errors."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import assert_rows

from purelm.errors import KernelError
from purelm.kernels.fp8 import E4M3
from purelm.nn.linear import project, project_reference
from purelm.nn.lora import LoRA
from purelm.quant import nf4
from purelm.quant.fp8 import dequantize, nbytes, quantize
from purelm.quant.fp8_product import computes, computing, products, pulled
from purelm.quant.linear import linear, weight_of

FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def weight(n=32, k=64, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(n, k, generator=g) * 0.05).to(dtype)


def rounded(x, dim=-1):
    """x as its rows (or columns) are in e4m3, float64, from the definition."""
    scale = x.float().abs().amax(dim, keepdim=True).clamp(min=1e-30) / 448
    return (x.float() * scale.reciprocal()).to(E4M3).double() * scale.double()


def hold(ours, a, b):
    """The tolerance rule for a product of these float64 operands."""
    assert_rows(ours.detach(), a.float() @ b.float(), a @ b)


LEAVES = {
    "nf4": lambda w: nf4.quantize(w),
    "plain nf4": lambda w: nf4.quantize(w, double=False, block=128),
    "rows": lambda w: quantize(w),
    "blocks": lambda w: quantize(w, blocks=True),
}


@given(
    rows=st.integers(1, 300),
    width=st.integers(1, 300),
    blocks=st.booleans(),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 2**31),
)
def test_round_trip(rows, width, blocks, dtype, seed):
    w = weight(rows, width, seed, dtype)
    leaf = quantize(w, blocks=blocks)
    back = dequantize(leaf, torch.float64)
    size = w.double().abs()
    # Half a step of three mantissa bits; of subnormal codes, of which 448 is 2^18 halves, half one.
    smallest = size.amax() * 2.0**-18 * (1 + 1e-6)
    assert ((back - w.double()).abs() <= (size * 2**-4 * (1 + 1e-6)).clamp(min=smallest)).all()
    again = quantize(dequantize(leaf, torch.float32), blocks=blocks)
    assert torch.equal(again.codes.view(torch.uint8), leaf.codes.view(torch.uint8))
    exact = leaf.codes.double()
    if blocks:
        i, j = torch.arange(rows) // 128, torch.arange(width) // 128
        exact = exact * leaf.scale.double()[i][:, j]
    else:
        exact = exact * leaf.scale.double()[:, None]
    assert torch.equal(back, exact) and leaf.dtype == dtype
    # One rounding, from fp32.
    assert torch.equal(dequantize(leaf), exact.float().to(dtype))


def test_bytes_of_transformers_block_scales():
    from transformers.integrations import finegrained_fp8

    w = weight(256, 384, 3)
    quantizer = getattr(finegrained_fp8, "Fp8Quantize", None)
    if quantizer is None:
        pytest.skip("this transformers has no Fp8Quantize")

    class Config:
        weight_block_size = (128, 128)
        scale_fmt = "float"

    class Owner:
        quantization_config = Config()
        pre_quantized = False

    made = quantizer(Owner()).convert({"w.weight": w})
    leaf = quantize(w, blocks=True)
    scale = next(v for k, v in made.items() if k.endswith("scale_inv"))
    codes = next(v for k, v in made.items() if k.endswith("weight"))
    torch.testing.assert_close(leaf.scale, scale.float(), rtol=1e-6, atol=0)
    differ = leaf.codes.view(torch.uint8) != codes.view(torch.uint8)
    assert differ.float().mean() < 1e-3  # where w / scale lies between two codes


@pytest.mark.parametrize("kind", ["rows", "blocks"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_dense_product_and_gradient(kind, dtype):
    leaf = LEAVES[kind](weight(24, 40, 1, dtype))
    x = torch.randn(2, 3, 40).to(dtype).requires_grad_()
    bias = torch.randn(24)
    y = linear(x, leaf, bias)
    dense = weight_of(leaf, dtype)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, dense) + bias.to(dtype))
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    torch.testing.assert_close(dx, dy @ dense)
    got = torch.vmap(lambda row: linear(row, leaf))(x)
    torch.testing.assert_close(got, linear(x, leaf))


@pytest.mark.parametrize("kind", LEAVES)
def test_products_round_rows(kind):
    leaf = computing(LEAVES[kind](weight()))
    assert computes(leaf)
    x = torch.randn(5, 64, requires_grad=True)
    y = linear(x, leaf)
    dense = weight_of(leaf, torch.float32)
    forward, backward = (
        # What has row scales is used as it is.
        (dense.double() if kind == "rows" else rounded(dense)),
        rounded(dense, 0),
    )
    hold(y, rounded(x), forward.mT)
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    hold(dx, rounded(dy), backward)
    # e4m3's own noise, and no more: 2.6% each operand in the root mean square.
    want = x @ dense.mT
    assert 0.01 < (y - want).norm() / want.norm() < 0.06
    want = dy @ dense
    assert 0.01 < (dx - want).norm() / want.norm() < 0.06


@pytest.mark.parametrize("count", [2, 3, 5])
def test_several_weights_of_one_input(count):
    leaves = [
        computing(nf4.quantize(weight(16 * (1 + i % 3), 48, i) * 10.0**i)) for i in range(count)
    ]
    x = torch.randn(4, 48)
    made = products(x, leaves)
    for y, leaf in zip(made, leaves, strict=True):
        assert torch.equal(y, linear(x, leaf))
    dys = [torch.randn_like(y) for y in made]
    dx = pulled(dys, leaves)
    # Side by side, as one product: up to three at a time share their scales.
    want = 0
    for at in range(0, count, 3):
        dense = torch.cat([weight_of(leaf, torch.float32) for leaf in leaves[at : at + 3]])
        dy = torch.cat(dys[at : at + 3], 1)
        want = want + rounded(dy) @ rounded(dense, 0)
    torch.testing.assert_close(dx.double(), want, rtol=1e-4, atol=float(want.abs().max()) * 1e-6)


def test_projections_with_adapters():
    g = torch.Generator().manual_seed(4)
    leaves = [computing(nf4.quantize(weight(n, 64, n))) for n in (32, 16, 16)]
    # One is left out, as quant_skip does.
    projections = [{"weight": leaf} for leaf in leaves[:2]] + [{"weight": weight(16, 64, 9)}]
    adapters = [LoRA(*(torch.randn(s, generator=g) for s in ((4, 64), (32, 4))), 0.5), None, None]
    adapters = [
        a if a is None else LoRA(a.a.requires_grad_(), a.b.requires_grad_(), a.scale)
        for a in adapters
    ]
    x = torch.randn(7, 64, generator=g).requires_grad_()
    found = []
    for f in (project, project_reference):
        ys = f(x, projections, adapters)
        total = sum((y * y).sum() for y in ys)
        found.append((*ys, *torch.autograd.grad(total, (x, adapters[0].a, adapters[0].b))))
    for i, (ours, want) in enumerate(zip(*found, strict=True)):
        if i == 3:  # dx: two gradients rounded side by side, or each by itself
            assert torch.nn.functional.cosine_similarity(ours, want).min() > 0.995
        else:
            torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-4)


def test_under_transforms():
    leaf = computing(nf4.quantize(weight()))
    x = torch.randn(3, 5, 64)

    def value(rows):
        return linear(rows, leaf).square().sum()

    each = torch.stack([torch.func.grad(value)(rows) for rows in x])
    leafed = x.clone().requires_grad_()
    (plain,) = torch.autograd.grad(value(leafed), leafed)
    torch.testing.assert_close(each, plain)
    torch.testing.assert_close(torch.vmap(torch.func.grad(value))(x), each)
    torch.testing.assert_close(
        torch.vmap(lambda r: linear(r, leaf), in_dims=1)(x), linear(x, leaf).transpose(0, 1)
    )
    with pytest.raises(KernelError, match="first derivatives only"):
        torch.func.grad(lambda r: torch.func.grad(value)(r).sum())(x[0])


def test_leaves_are_pytree_nodes():
    for make in LEAVES.values():
        for leaf in (make(weight()), computing(make(weight()))):
            parts, structure = torch.utils._pytree.tree_flatten({"w": leaf})
            back = torch.utils._pytree.tree_unflatten(parts, structure)["w"].to("cpu")
            assert len(parts) == len(leaf.tensors) and type(back) is type(leaf)
            assert torch.equal(weight_of(back, torch.float32), weight_of(leaf, torch.float32))
            assert computes(back) == computes(leaf)
            assert (back.shape, back.ndim, back.numel()) == ((32, 64), 2, 2048)
            if computes(leaf):
                assert torch.equal(back.fp8_rows, leaf.fp8_rows)
                assert torch.equal(back.fp8_columns, leaf.fp8_columns)
    assert nbytes(quantize(weight())) == 2048 + 4 * 32


def test_bad_input():
    w = weight()
    broken = w.clone()
    broken[2, 3] = float("inf")
    for blocks in (False, True):
        with pytest.raises(KernelError, match="'up'.*1 of 2048 values are NaN"):
            quantize(broken, name="up", blocks=blocks)
    for bad in (torch.ones(3), torch.ones(0, 3), torch.ones(2, 2, dtype=torch.int8)):
        with pytest.raises(KernelError, match="fp8 takes"):
            quantize(bad)
    with pytest.raises(KernelError, match="an fp8 weight"):
        linear(torch.ones(2, 32), quantize(w))
    with pytest.raises(KernelError, match="product's weight"):
        products(torch.ones(2, 32), [computing(quantize(w))])
    odd = nf4.quantize(weight(24, 64))
    assert computing(odd) is odd and computing(w) is w and not computes(odd)
    leaf = computing(nf4.quantize(w))
    with pytest.raises(KernelError, match="frozen"):
        torch.vmap(lambda p: linear(torch.ones(2, 64), replace(leaf, packed=p)))(
            torch.stack([leaf.packed, leaf.packed])
        )
    x = torch.ones(2, 64)
    x[1, 3] = float("nan")
    assert linear(x, leaf).isnan().all(1).tolist() == [False, True]
