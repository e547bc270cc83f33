"""The delta rule's launches against its reference in fp64, over drawn shapes and documents."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import assert_rows

from purelm.kernels import delta_check, delta_launch, delta_rule, launch
from purelm.kernels import delta_rule_reference as reference
from purelm.kernels.launch import interpreting


@pytest.fixture
def small(monkeypatch):
    """Chunks of 16, tiles of a part of a head."""
    monkeypatch.setattr(delta_launch, "CHUNK", 16)
    plain = delta_launch.configs_for

    def configs(p):
        part = {name: getattr(plain(p), name)._replace(p=16) for name in ("states", "dq", "dk")}
        return plain(p)._replace(**part, pulls=plain(p).pulls._replace(p=16))

    monkeypatch.setattr(delta_launch, "configs_for", configs)


def drawn(rows, s, heads, groups, n, p, dtype, seed):
    """Unit queries and keys and values as slices of a wider tensor, as the mixer has them."""
    g = torch.Generator().manual_seed(seed)
    wide = torch.randn(rows, s, 2 * groups * n + heads * p, generator=g)
    q, k, v = wide.split_with_sizes([groups * n, groups * n, heads * p], -1)
    q, k = (
        torch.nn.functional.normalize(t.view(rows, s, groups, n), dim=-1).to(dtype) for t in (q, k)
    )
    beta = torch.rand(rows, s, heads, generator=g)
    decay = -torch.rand(rows, s, heads, generator=g) * 2
    return [q, k, v.to(dtype).view(rows, s, heads, p), beta, decay], g


def one_chunk(q, k, v, beta, decay, starts, _):
    """The whole row as one chunk, with products in the inputs' dtype."""
    s, share, dtype = q.shape[1], v.shape[2] // q.shape[2], v.dtype
    q, k = (t.repeat_interleave(share, 2).transpose(1, 2) for t in (q, k))
    v, beta, sums = v.transpose(1, 2), beta.mT, decay.cumsum(1).mT
    seen = torch.ones(s, s, dtype=torch.bool).tril()
    if starts is not None:
        segment = starts.cumsum(1)
        seen = (seen & (segment[:, :, None] == segment[:, None, :]))[:, None]
    pairs = (sums[..., :, None] - sums[..., None, :]).masked_fill(~seen, -torch.inf).exp()
    system = torch.tril((k @ k.mT).float() * pairs * beta[..., None], -1)
    eye = torch.eye(s).expand_as(system)
    t = torch.linalg.solve_triangular(system, eye, upper=False, unitriangular=True).to(dtype)
    u = t @ (beta[..., None] * v).to(dtype)
    return (((q @ k.mT) * pairs).to(dtype) @ u).transpose(1, 2), None


def run(f, inputs, starts, dy):
    leaves = [t.detach().requires_grad_() for t in inputs]
    y, _ = f(*leaves, starts, None)
    return y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))


@settings(max_examples=4)
@given(
    rows=st.integers(1, 2),
    s=st.one_of(st.integers(1, 9), st.sampled_from([16, 35])),
    heads=st.sampled_from([(1, 1), (3, 1), (4, 2)]),
    n=st.sampled_from([5, 16, 24]),
    p=st.sampled_from([8, 20, 32]),
    share=st.sampled_from([None, 0.0, 0.1, 0.6]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_launch(interpreted, poisoned, small, rows, s, heads, n, p, share, dtype, seed):
    inputs, g = drawn(rows, s, *heads, n, p, dtype, seed)
    starts = None if share is None else torch.rand((rows, s), generator=g) < share
    dy = torch.randn(inputs[2].shape, generator=g).to(dtype)
    ours = run(delta_launch.chunked, inputs, starts, dy)
    eager = run(one_chunk, inputs, starts, dy)
    exact = run(reference.scan, [t.double() for t in inputs], starts, dy)
    for mine, theirs, truth in zip(ours, eager, exact, strict=True):
        # Gradients of what is fp32 are sums of products of that dtype all the same.
        assert_rows(*(t.to(dtype).reshape(1, -1) for t in (mine, theirs)), truth.reshape(1, -1))


def test_math_in_fp32(interpreted, poisoned, small):
    """fp32, which the launches are not chosen for, shows what rounding to 16 bits would hide."""
    inputs, g = drawn(1, 39, 4, 2, 24, 20, torch.float32, 1)
    starts = torch.rand((1, 39), generator=g) < 0.1
    dy = torch.randn(inputs[2].shape, generator=g)
    ours = run(delta_launch.chunked, inputs, starts, dy)
    eager = run(one_chunk, inputs, starts, dy)
    exact = run(reference.scan, [t.double() for t in inputs], starts, dy)
    for each in zip(ours, eager, exact, strict=True):
        assert_rows(*(t.reshape(1, -1) for t in each))


def test_goes_on_from_a_state(interpreted, poisoned, small):
    """Of raw queries and keys, by the choice that the mixer makes."""
    inputs, g = drawn(2, 37, 4, 2, 24, 20, torch.bfloat16, 2)
    inputs[0], inputs[1] = inputs[0] * 3, inputs[1] * 0.2
    before = torch.randn(2, 4, 24, 20, generator=g)
    starts = torch.rand((2, 37), generator=g) < 0.1
    with torch.no_grad():
        y, last = delta_rule.delta_rule(*inputs, starts, before)
        with interpreting(False):
            exact, exact_last = delta_rule.delta_rule(
                *(t.double() for t in inputs), starts, before.double()
            )
        q, k = (torch.nn.functional.normalize(t, dim=-1) for t in inputs[:2])
        eager, eager_last = one_token(q * 24**-0.5, k, *inputs[2:], starts, before)
    assert y.dtype == torch.bfloat16 and last.dtype == torch.float32
    assert_rows(*(t.flatten(1) for t in (y, eager, exact)))
    assert_rows(*(t.bfloat16().flatten(1) for t in (last, eager_last)), exact_last.flatten(1))


def one_token(q, k, v, beta, decay, starts, state):
    """Token by token, in bf16."""
    parts = []
    for t in range(q.shape[1]):
        one = slice(t, t + 1)
        taken = (x[:, one].bfloat16() for x in (q, k, v, beta, decay))
        y, state = reference.step(*taken, starts[:, one], state.bfloat16())
        parts.append(y)
    return torch.cat(parts, 1), state


def test_check(interpreted, small, monkeypatch):
    """What it compares agrees; a launch that is wrong or fails is noticed, and said once."""
    monkeypatch.setattr(delta_check, "GROUPS", 1)
    off = delta_check.differences("cpu", torch.bfloat16, 16, 16, 2)
    assert all(d < delta_check.FAR / 4 for d in off.values()), off
    asked = torch.device("cpu"), torch.bfloat16, 16, 16, 2
    delta_check._asked.cache_clear()
    right = launch.ops.delta_rule_backward

    def wrong(*args):
        dq, dk, *rest = right(*args)
        return dq, dk * 1.2, *rest

    def fails(*args):
        raise RuntimeError("out of resources")

    for broken, said in ((wrong, "dk differs"), (fails, "out of resources")):
        monkeypatch.setattr(launch.ops, "delta_rule_backward", broken)
        with pytest.warns(UserWarning, match=said):
            assert not delta_check._asked(*asked)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert not delta_check._asked(*asked)
        delta_check._asked.cache_clear()
    monkeypatch.setattr(launch.ops, "delta_rule_backward", right)
    assert delta_check._asked(*asked)
    delta_check._asked.cache_clear()
