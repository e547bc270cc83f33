"""Gated norms: the reference is transformers', the launches keep to the tolerance rule."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import assert_rows

from purelm.errors import KernelError
from purelm.kernels.gated_norm import gated_norm, gated_norm_reference


def drawn(b, s, groups, width, shared, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    d = groups * width
    # The gate is a slice of a wider projection, as the mixers have it.
    gate = torch.randn(b, s, d + 3, generator=g)[..., 1 : 1 + d].to(dtype)
    y, dout = (torch.randn(b, s, d, generator=g).to(dtype) for _ in range(2))
    return y, gate, torch.rand(width if shared else d, generator=g).to(dtype) + 0.5, dout


@pytest.mark.parametrize("norm_first", [False, True])
def test_reference_equals_transformers(norm_first):
    hf = pytest.importorskip("transformers.models.falcon_h1.modeling_falcon_h1")
    y, gate, weight, _ = drawn(2, 3, 2, 12, False, torch.float32, 0)
    norm = hf.FalconH1RMSNormGated(24, eps=1e-5, n_groups=2, norm_before_gate=norm_first)
    norm.weight.data = weight
    found = gated_norm(y, gate, weight, 1e-5, 12, norm_first=norm_first)
    torch.testing.assert_close(found, norm(y, gate))


@settings(max_examples=40)
@given(
    b=st.integers(1, 2),
    s=st.integers(1, 5),
    groups=st.sampled_from([1, 3]),
    width=st.sampled_from([1, 6, 64, 700, 2100]),
    shared=st.booleans(),
    normed=st.booleans(),
    norm_first=st.booleans(),
    weights=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_launch(
    interpreted, poisoned, b, s, groups, width, shared, normed, norm_first, weights, dtype, seed
):
    y, gate, weight, dout = drawn(b, s, groups, width, shared, dtype, seed)
    wanted = weights and normed

    def run(f, y, gate, weight, dout):
        leaves = [t.detach().requires_grad_() for t in (y, gate, weight)[: 2 + wanted]]
        taken = [*leaves, *(weight,) * (not wanted)] if normed else [*leaves, None]
        out = f(*taken, 1e-5, width, norm_first=norm_first)
        return out.detach(), *torch.autograd.grad(out, leaves, dout)

    tensors = y, gate, weight, dout
    ours, eager = run(gated_norm, *tensors), run(gated_norm_reference, *tensors)
    exact = run(gated_norm_reference, *(t.double() for t in tensors))
    for each in zip(ours, eager, exact, strict=True):
        assert_rows(*(t.reshape(1, -1) for t in each))


def test_shapes_that_do_not_belong_together_raise():
    y, gate, weight, _ = drawn(1, 2, 2, 6, False, torch.float32, 0)
    for bad in ((y[:, :1], gate, weight, 6), (y, gate, weight[:5], 6), (y, gate, weight, 5)):
        with pytest.raises(KernelError, match="groups of"):
            gated_norm(*bad[:3], 1e-5, bad[3], norm_first=True)
