"""The clamped SwiGLU: the reference is transformers', the launch keeps to the tolerance rule."""

import shim
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import assert_elementwise, assert_rows
from pytest import importorskip, mark, raises

from purelm.errors import KernelError
from purelm.kernels.clamped import clamped, clamped_reference

FLOATS = [torch.float32, torch.float16, torch.bfloat16]


@mark.parametrize("dtype", FLOATS)
def test_reference_equals_transformers(dtype):
    transformers = importorskip("transformers")
    module = importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
    sizes = {"num_local_experts": 1, "hidden_size": 4, "intermediate_size": 4}
    experts = module.GptOssExperts(transformers.GptOssConfig(**sizes, swiglu_limit=2.5))
    both = (torch.randn(40, 34) * 3).to(dtype)
    gate, up = both[..., ::2], both[..., 1::2]
    assert torch.equal(clamped(gate, up, 1.702, 2.5), experts._apply_gate(both))


@given(
    rows=st.integers(1, 5),
    width=st.one_of(st.integers(1, 300), st.sampled_from([1024, 2048, 2049])),
    alpha=st.sampled_from([1.702, 0.5]),
    limit=st.sampled_from([7.0, 1.0, float("inf")]),
    dtype=st.sampled_from(FLOATS),
    size=st.sampled_from([1.0, 1e-4, 8.0]),
    seed=st.integers(0, 2**31),
)
def test_launch(interpreted, poisoned, rows, width, alpha, limit, dtype, size, seed):
    g = torch.Generator().manual_seed(seed)
    gate, up, dh = (torch.randn(3, rows, width, generator=g) * size).to(dtype).unbind(0)
    # On the edges of the clamps, where torch's gradient is whole.
    gate[0, 0], up[0, 0], up[-1, -1] = 1.0, 1.0, -1.0

    def run(f, gate, up, dh):
        gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
        h = f(gate, up, alpha, limit)
        return h.detach(), *torch.autograd.grad(h, (gate, up), dh)

    ours = run(clamped, gate, up, dh)
    eager = run(clamped_reference, gate, up, dh)
    exact = run(clamped_reference, gate.double(), up.double(), dh.double())
    for i, (mine, theirs, truth) in enumerate(zip(ours, eager, exact, strict=True)):
        if i == 2:
            assert_elementwise(mine, theirs, truth, pooled=True)
        else:
            # up + 1 has a root, and so has the slope, near which a relative error has no bound.
            assert_rows(*(t.reshape(1, -1) for t in (mine, theirs, truth)))
    cut = (up.abs() > limit), (gate > limit)
    assert bool((ours[2][cut[0]] == 0).all() and (ours[1][cut[1]] == 0).all())


def test_large_values_and_nan(interpreted):
    gate = torch.tensor([-1e4, -200.0, 0.0, 30.0, 1e4, torch.nan, 1.0], requires_grad=True)
    up = torch.tensor([1e4, -1e4, 3.0, 7.0, -7.0, 1.0, torch.nan], requires_grad=True)

    def run(f):
        h = f(gate, up, 1.702, 7.0)
        return h.detach(), *torch.autograd.grad(h[:-2].sum(), (gate, up))

    for ours, theirs in zip(run(clamped), run(clamped_reference), strict=True):
        torch.testing.assert_close(ours[:-2], theirs[:-2])
    assert bool(clamped(gate, up, 1.702, 7.0)[-2:].isnan().all())


def test_strided_halves_and_the_order_of_programs(interpreted, poisoned):
    both = torch.randn(2, 5, 9000)
    gate, up = both.chunk(2, -1)
    with shim.checking(race=True, reverse=True):
        h = clamped(gate, up, 1.7, 1.0)
    assert h.is_contiguous()
    torch.testing.assert_close(h, clamped_reference(gate, up, 1.7, 1.0))
    assert torch.equal(h, clamped(gate, up, 1.7, 1.0))


def test_transforms(interpreted):
    gate, up = torch.randn(2, 3, 8).unbind(0)

    def loss(f):
        return lambda gate, up: f(gate, up, 1.7, 1.0).square().sum()

    for make in (
        lambda f: torch.func.grad(f, argnums=(0, 1))(gate, up),
        lambda f: torch.func.vmap(f, (0, None))(gate, up[0]),
        lambda f: torch.func.vmap(f, (1, 1))(gate, up),
        lambda f: torch.func.vmap(torch.func.grad(f, argnums=(0, 1)), (0, None))(gate, up[0]),
    ):
        torch.testing.assert_close(make(loss(clamped)), make(loss(clamped_reference)))


def test_bad_input():
    for other in (torch.ones(3), torch.ones(2).half()):
        with raises(KernelError, match="expected the same"):
            clamped(torch.ones(2), other, 1.0, 7.0)
