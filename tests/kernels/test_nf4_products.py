"""Several 4-bit weights in one launch: each part is what the weight alone gives, and what is joined
or added to it keeps to the tolerance rule.
"""

from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import assert_rows

from purelm.errors import KernelError
from purelm.kernels import nf4, nf4_products
from purelm.kernels.gated import ACTIVATIONS, gated_reference
from purelm.kernels.nf4_products import Config, Weight, products


def drawn(rows, outputs, width, block, double, kind, dtype, rank, bias, seed):
    """x, the weights, the low-rank input of all of them."""
    g = torch.Generator().manual_seed(seed)
    weights = []
    for n in outputs:
        packed, absmax = nf4.quantize_reference(torch.randn(n * width, generator=g), block, kind)
        parts = [packed, absmax, None, None]
        if double:
            offset = absmax.mean()
            parts = [packed, *nf4.quantize_absmax_reference(absmax, offset), offset]
        b = torch.randn(n, rank, generator=g).to(dtype) if rank else None
        weights.append(
            Weight(*parts, n, torch.randn(n, generator=g).to(dtype) if bias else None, b)
        )
    x = torch.randn(rows, width, generator=g).to(dtype)
    low = torch.randn(rows, rank * len(outputs), generator=g).to(dtype) if rank else None
    return x, weights, low


def dense(x, weights, block, kind, low, activation, residual, scale):
    """The same in plain operations of the dtype of x."""
    each = []
    for i, w in enumerate(weights):
        parts = (w.packed, w.absmax, w.absmax_scale, w.absmax_offset)
        count = w.outputs * x.shape[1]
        y = x @ nf4.dequantize_reference(*parts, count, block, x.dtype, kind).view(w.outputs, -1).mT
        if low is not None:
            y = y + low.chunk(len(weights), 1)[i].to(x.dtype) @ w.b.to(x.dtype).mT
        each.append(y if w.bias is None else y + w.bias.to(x.dtype))
    y = gated_reference(*each, activation) if activation else torch.cat(each, 1)
    return y if residual is None else residual.to(x.dtype) + y * scale


@given(
    rows=st.one_of(st.just(1), st.integers(2, 40)),
    outputs=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    runs=st.integers(1, 9),
    block=st.sampled_from([32, 64, 128]),
    double=st.booleans(),
    kind=st.sampled_from(["nf4", "fp4"]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    activation=st.sampled_from([None, *ACTIVATIONS]),
    rank=st.sampled_from([0, 0, 3, 16]),
    bias=st.booleans(),
    added=st.booleans(),
    scale=st.sampled_from([1.0, 0.25]),
    seed=st.integers(0, 2**31),
)
def test_launch(
    interpreted, poisoned, rows, outputs, runs, block, double, kind, dtype, activation, rank, bias,
    added, scale, seed,
):  # fmt: skip
    if activation:
        outputs = [outputs[0]] * 2
    width = runs * min(block, 64)
    x, weights, low = drawn(rows, outputs, width, block, double, kind, dtype, rank, bias, seed)
    columns = outputs[0] if activation else sum(outputs)
    g = torch.Generator().manual_seed(seed)
    residual = torch.randn(rows, columns, generator=g).to(dtype) if added else None
    ours = products(
        x, weights, block, kind, low=low, activation=activation, residual=residual,
        residual_scale=scale,
    )  # fmt: skip
    args = weights, block, kind, low, activation, residual, scale
    assert ours.shape == (rows, columns) and ours.dtype == dtype
    assert_rows(ours, dense(x, *args), dense(x.double(), *args))


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("cut", [(32, 1, 1), (128, 1, 2), (32, 4, 1)])
def test_cuts_of_one_row(interpreted, poisoned, cut, activation):
    """Steps that end within the row, and whole ones."""
    block, warps, turns = cut
    for runs in (35, 16):
        options = runs * min(block, 64), block, True, "nf4", torch.bfloat16, 3, True, runs
        x, weights, low = drawn(1, [42, 42], *options)
        with mock.patch.object(nf4_products, "config_for", lambda *_: Config(warps, turns)):
            ours = products(x, weights, block, low=low, activation=activation)
        args = weights, block, "nf4", low, activation, None, 1.0
        assert_rows(ours, dense(x, *args), dense(x.double(), *args))


def test_each_part_is_the_weight_alone(interpreted, poisoned):
    x, weights, _ = drawn(3, [40, 8, 24], 320, 64, True, "nf4", torch.bfloat16, 0, False, 1)
    every = products(x, weights, 64)
    alone = [products(x, [w], 64) for w in weights]
    assert torch.equal(every, torch.cat(alone, 1))


def test_op(interpreted):
    x, weights, _ = drawn(2, [24, 8], 64, 64, True, "nf4", torch.bfloat16, 0, False, 1)
    one = torch.stack([products(row[None], weights, 64) for row in x])
    assert torch.equal(torch.vmap(lambda x: products(x, weights, 64))(x[:, None]), one)


def test_what_it_refuses():
    x, weights, low = drawn(2, [24, 8], 64, 64, True, "nf4", torch.bfloat16, 4, False, 1)
    for arguments, options, message in [
        ((x.float(), weights, 64), {}, "16 bits"),
        ((x.repeat(33, 1), weights, 64), {}, "1 to 64 rows"),
        ((x, weights * 2, 64), {}, "1 to 3 weights"),
        ((x, weights, 64), {"activation": "silu"}, "two weights of one shape"),
        ((x, weights, 64), {"activation": "tanh"}, "activation 'tanh'"),
        ((x, weights, 64), {"low": low, "residual": x}, "residual"),
        ((x, weights, 64), {"low": low[:, :3]}, "low"),
        ((x, weights[:1] + [weights[1]._replace(b=None)], 64), {"low": low}, "all or none"),
        ((x.clone().requires_grad_(), weights, 64), {}, "gradient"),
    ]:
        with pytest.raises(KernelError, match=message):
            products(*arguments, **options)
