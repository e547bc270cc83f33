"""Rotary embedding: the reference is transformers', the launch equals it, transforms compose."""

import pytest
import shim
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import assert_elementwise, assert_rows

from purelm.errors import KernelError
from purelm.kernels import launch
from purelm.kernels.rms_norm import rms_norm_reference
from purelm.kernels.rope import HeadNorm, rope, rope_qk, rope_reference

FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def table(batch: int, length: int, rot: int, seed: int, interleaved: bool = False):
    """cos and sin [batch, length, rot] of random positions, in transformers' layout."""
    g = torch.Generator().manual_seed(seed)
    angles = torch.rand(batch, length, rot // 2, generator=g) * 100
    angles = angles.repeat_interleave(2, -1) if interleaved else torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


def heads(shape, seed, dtype):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32])
def test_reference_equals_transformers(dtype):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    q, k = heads((2, 7, 4, 16), 0, dtype), heads((2, 7, 2, 16), 1, dtype)
    cos, sin = table(2, 7, 16, 2)
    theirs = llama.apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    ours = rope_qk(q, k, cos, sin)
    for mine, want in zip(ours, theirs, strict=True):
        assert torch.equal(mine, want.transpose(1, 2))


def test_interleaved_reference_equals_transformers():
    cohere = pytest.importorskip("transformers.models.cohere.modeling_cohere")
    q, k = heads((2, 7, 4, 16), 0, torch.float32), heads((2, 7, 2, 16), 1, torch.float32)
    cos, sin = table(2, 7, 16, 2, interleaved=True)
    theirs = cohere.apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    ours = rope_qk(q, k, cos, sin, interleaved=True)
    for mine, want in zip(ours, theirs, strict=True):
        assert torch.equal(mine, want.transpose(1, 2))


@given(
    batch=st.integers(1, 2),
    length=st.integers(1, 3),
    count_q=st.integers(1, 5),
    count_k=st.integers(1, 3),
    half=st.integers(1, 20),
    rest=st.sampled_from([0, 0, 1, 6, 17]),
    shared=st.booleans(),
    interleaved=st.booleans(),
    strided=st.booleans(),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 2**31),
)
def test_launch(
    interpreted,
    poisoned,
    batch,
    length,
    count_q,
    count_k,
    half,
    rest,
    shared,
    interleaved,
    strided,
    dtype,
    seed,
):
    dim = 2 * half + rest
    packed = heads((batch, length, count_q + count_k, dim), seed, dtype)
    q, k = packed.split([count_q, count_k], 2)
    if strided:
        q = q.transpose(1, 2).contiguous().transpose(1, 2)
    cos, sin = table(1 if shared else batch, length, 2 * half, seed, interleaved)
    g = heads(packed.shape, seed + 1, dtype).split([count_q, count_k], 2)

    def run(f, q, k, g):
        q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
        out = f(q, k)
        return [t.detach() for t in out] + list(torch.autograd.grad(out, (q, k), g))

    def reference(q, k):
        c, s = cos.to(q.dtype), sin.to(q.dtype)
        c, s = (cos.double(), sin.double()) if q.dtype == torch.float64 else (cos, sin)
        return [rope_reference(t, c, s, interleaved=interleaved) for t in (q, k)]

    ours = run(lambda q, k: rope_qk(q, k, cos, sin, interleaved=interleaved), q, k, g)
    eager = run(reference, q, k, g)
    exact = run(reference, q.double(), k.double(), [t.double() for t in g])
    for mine, theirs, truth in zip(ours, eager, exact, strict=True):
        assert_elementwise(mine, theirs, truth)
    assert torch.equal(ours[0], eager[0]) and torch.equal(ours[1], eager[1])
    assert ours[0].is_contiguous()
    alone = rope(q, cos, sin, interleaved=interleaved)
    assert torch.equal(alone, ours[0])


def norm_of(dim: int, seed: int, dtype, style) -> HeadNorm:
    weights = 1 + 0.2 * heads((2, dim), seed, torch.float32)
    offset, cast_first = style
    return HeadNorm(*(weights - offset).to(dtype).unbind(0), 1e-6, offset, cast_first)


def apart(q, k, cos, sin, norm, interleaved=False):
    """The norm and the rotation as two references."""
    wide = torch.promote_types(q.dtype, torch.float32)
    how = {"offset": norm.offset, "cast_first": norm.cast_first}
    normed = [rms_norm_reference(x, w, norm.eps, **how) for x, w in ((q, norm.q), (k, norm.k))]
    cos, sin = cos.to(wide), sin.to(wide)
    return [rope_reference(x, cos, sin, interleaved=interleaved) for x in normed]


@given(
    batch=st.integers(1, 2),
    count_q=st.sampled_from([1, 3, 9]),
    count_k=st.sampled_from([1, 2, 9]),
    half=st.integers(1, 20),
    rest=st.sampled_from([0, 0, 1, 17]),
    shared=st.booleans(),
    interleaved=st.booleans(),
    strided=st.booleans(),
    style=st.sampled_from([(0.0, True), (1.0, False), (1.0, True)]),
    train=st.booleans(),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 2**31),
)
def test_normed_heads(
    interpreted, poisoned, batch, count_q, count_k, half, rest, shared, interleaved, strided,
    style, train, dtype, seed,
):  # fmt: skip
    dim, length = 2 * half + rest, 2
    packed = heads((batch, length, count_q + count_k, dim), seed, dtype)
    q, k = packed.split([count_q, count_k], 2)
    if strided:
        q = q.transpose(1, 2).contiguous().transpose(1, 2)
    cos, sin = table(1 if shared else batch, length, 2 * half, seed, interleaved)
    norm = norm_of(dim, seed, dtype, style)
    g = heads(packed.shape, seed + 1, dtype).split([count_q, count_k], 2)

    def run(f, q, k, norm, g):
        q, k, wq, wk = (t.detach().requires_grad_() for t in (q, k, norm.q, norm.k))
        if not train:
            wq, wk = wq.detach(), wk.detach()
        out = f(q, k, cos, sin, norm=norm._replace(q=wq, k=wk), interleaved=interleaved)
        wanted = (q, k, wq, wk) if train else (q, k)
        return [t.detach() for t in out] + list(torch.autograd.grad(out, wanted, g))

    def wide(norm):
        return norm._replace(q=norm.q.double(), k=norm.k.double())

    ours, eager = run(rope_qk, q, k, norm, g), run(apart, q, k, norm, g)
    exact = run(apart, q.double(), k.double(), wide(norm), [t.double() for t in g])
    # Of few values the gradient is a difference of nearly equal numbers.
    count = len(ours) if dim >= 16 else 2
    for mine, theirs, truth in zip(ours[:count], eager, exact, strict=False):
        assert_rows(mine, theirs, truth)
    assert ours[0].is_contiguous()
    with launch.interpreting(False):
        plain = run(rope_qk, q, k, norm, g)
    assert all(torch.equal(a, b) for a, b in zip(plain, eager, strict=True))


def test_normed_heads_under_transforms(interpreted):
    q, k = heads((3, 1, 4, 2, 18), 0, torch.float32), heads((3, 1, 4, 1, 18), 1, torch.float32)
    cos, sin = table(1, 4, 16, 2)
    norm = norm_of(18, 3, torch.float32, (0.0, True))

    def loss(f):
        def total(q, k, w):
            a, b = f(q, k, cos, sin, norm=norm._replace(q=w))
            return (a * a.cumsum(1)).sum() + b.pow(3).sum()

        return total

    for make in (
        lambda f: torch.func.grad(f, argnums=(0, 1, 2))(q[0], k[0], norm.q),
        lambda f: torch.func.vmap(torch.func.grad(f, argnums=(0, 1)), (0, 0, None))(q, k, norm.q),
        lambda f: torch.func.grad(lambda q: torch.func.vmap(f, (0, 0, None))(q, k, norm.q).sum())(
            q
        ),
    ):
        torch.testing.assert_close(make(loss(rope_qk)), make(loss(apart)))


def test_inverse_undoes(interpreted):
    x = heads((1, 3, 2, 8), 0, torch.float32).requires_grad_()
    cos, sin = table(1, 3, 8, 1)
    y = rope(x, cos, sin)
    (back,) = torch.autograd.grad(y, x, y.detach())
    torch.testing.assert_close(back, x.detach())


def test_order_of_programs_does_not_matter(interpreted):
    x = heads((2, 5, 3, 8), 0, torch.bfloat16)
    cos, sin = table(2, 5, 8, 1)
    with shim.checking(race=True, reverse=True):
        y = rope(x, cos, sin)
    assert torch.equal(y, rope(x, cos, sin))


def test_transforms(interpreted):
    q, k = heads((3, 2, 4, 2, 8), 0, torch.float32), heads((3, 2, 4, 1, 8), 1, torch.float32)
    cos, sin = table(1, 4, 8, 2)

    def loss(f):
        def total(q, k):
            a, b = f(q, k)
            return (a * a.cumsum(1)).sum() + b.pow(3).sum()

        return total

    def ours(q, k):
        return rope_qk(q, k, cos, sin)

    def reference(q, k):
        return rope_reference(q, cos, sin), rope_reference(k, cos, sin)

    for make in (
        lambda f: torch.func.grad(f, argnums=(0, 1))(q[0], k[0]),
        lambda f: torch.func.vmap(f)(q, k),
        lambda f: torch.func.vmap(torch.func.grad(f, argnums=(0, 1)))(q, k),
        lambda f: torch.func.grad(lambda q: torch.func.vmap(f)(q, k).sum())(q),
    ):
        torch.testing.assert_close(make(loss(ours)), make(loss(reference)))


def test_bad_input():
    x = torch.ones(1, 3, 2, 8)
    good = torch.ones(1, 3, 8)
    for cos in (torch.ones(1, 3, 10), torch.ones(1, 4, 8), torch.ones(2, 3, 8), torch.ones(3, 8)):
        with pytest.raises(KernelError, match="expected"):
            rope(x, cos, cos)
    with pytest.raises(KernelError, match="expected"):
        rope(x, torch.ones(1, 3, 7), torch.ones(1, 3, 7))
    with pytest.raises(KernelError, match="do not fit"):
        rope_qk(x, x.double(), good, good)
    norm = HeadNorm(torch.ones(8), torch.ones(4), 1e-6, 0.0, True)
    with pytest.raises(KernelError, match=r"twice \[d\]"):
        rope_qk(x, x, good, good, norm=norm)
