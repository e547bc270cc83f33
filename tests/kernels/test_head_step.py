"""A new token's heads: the launch against the norm, the rotation and the writes one by one."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import assert_rows

from purelm.errors import KernelError
from purelm.kernels.head_step import HeadNorm, head_step, head_step_reference


def drawn(b, heads, heads_k, dim, rot, normed, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    qkv = torch.randn(b, (heads + 2 * heads_k) * dim, generator=g).to(dtype)
    angles = torch.randn(b, rot // 2, generator=g).repeat(1, 2) * 3
    keys, values = torch.randn(2, b, 5, heads_k, dim, generator=g).to(dtype).unbind(0)
    at = torch.randint(0, 5, (b,), generator=g) + torch.arange(b) * 5
    norm = None
    if normed:
        # Strided, as columns of a stack of layers are.
        weights = torch.randn(dim, 2, generator=g).to(dtype).unbind(1)
        norm = HeadNorm(*weights, 1e-5, 1.0 if seed % 2 else 0.0, seed % 3 > 0)
    return qkv, angles.cos(), angles.sin(), keys, values, at, norm


@given(
    b=st.integers(1, 3),
    heads_k=st.integers(1, 3),
    groups=st.integers(1, 3),
    dim=st.sampled_from([16, 20, 64]),
    partial=st.booleans(),
    interleaved=st.booleans(),
    normed=st.booleans(),
    value_eps=st.sampled_from([None, 1e-5]),
    one=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_launch(
    interpreted,
    poisoned,
    b,
    heads_k,
    groups,
    dim,
    partial,
    interleaved,
    normed,
    value_eps,
    one,
    dtype,
    seed,
):
    rot = dim // 4 * 2 if partial else dim
    *args, norm = drawn(b, heads_k * groups, heads_k, dim, rot, normed, dtype, seed)
    if one:  # of k and v
        args[0] = args[0][:, : -heads_k * dim].contiguous()
    copies = [[t.clone() for t in args] for _ in range(2)]
    wide = [t.double() if t.is_floating_point() else t for t in args]
    how = {"interleaved": interleaved, "value_eps": value_eps, "keys_as_values": one}
    q = head_step(*copies[0], **how, norm=norm)
    eager = head_step_reference(*copies[1], **how, norm=norm)
    if norm is not None:
        norm = norm._replace(q=norm.q.double(), k=norm.k.double())
    exact = head_step_reference(*wide, **how, norm=norm)
    assert_rows(q.flatten(0, 1), eager.flatten(0, 1), exact.flatten(0, 1))
    for i in (3, 4):
        assert_rows(*(t.flatten(0, 2) for t in (copies[0][i], copies[1][i], wide[i])))
    if value_eps is None:
        assert torch.equal(copies[0][4], copies[1][4])
    untouched = torch.ones(b * 5, dtype=torch.bool)
    untouched[args[5]] = False
    for made, before in zip(copies[0][3:5], args[3:5], strict=True):
        assert torch.equal(made.flatten(0, 1)[untouched], before.flatten(0, 1)[untouched])


@pytest.mark.parametrize("launched", [False, True])
def test_a_cache_in_e4m3(interpreted, launched):
    """The numbers nearest to those a wide cache gets, in pages too; none overflows."""
    step = head_step if launched else head_step_reference
    qkv, cos, sin, keys, values, at, _ = drawn(3, 2, 1, 16, 16, False, torch.bfloat16, 5)
    qkv[0, -20:] *= 1000
    wide = [torch.zeros_like(t).view(5, 3, 1, 16) for t in (keys, values)]
    narrow = [t.to(torch.float8_e4m3fn) for t in wide]
    q = step(qkv, cos, sin, *wide, at)
    assert torch.equal(q, step(qkv, cos, sin, *narrow, at))
    for ours, exact in zip(narrow, wide, strict=True):
        nearest = exact.clamp(-448, 448).to(torch.float8_e4m3fn)
        assert torch.equal(ours.float(), nearest.float())
    assert wide[1].abs().max() > 448


def test_what_it_refuses():
    *args, _ = drawn(2, 2, 1, 16, 16, False, torch.bfloat16, 1)
    for at, wrong in [
        (0, args[0][:, :-1]),
        (0, args[0].float()),
        (1, args[1][:, :-1]),
        (3, args[3][:, :, :, :8]),
        (4, args[4].transpose(0, 1)),
        (5, args[5][:1]),
    ]:
        with pytest.raises(KernelError, match="expected"):
            head_step(*[wrong if i == at else t for i, t in enumerate(args)])
    for wrong in (torch.ones(15), torch.ones(17), torch.ones(1)):
        for weights in ((wrong, torch.ones(16)), (torch.ones(16), wrong)):
            with pytest.raises(KernelError, match="expected"):
                head_step(*args, norm=HeadNorm(*weights, 1e-5, 0.0, True))


def test_weights_on_another_device_raise(interpreted):
    *args, _ = drawn(2, 2, 1, 16, 16, False, torch.bfloat16, 1)
    norm = HeadNorm(torch.ones(16), torch.ones(16, device="meta"), 1e-5, 0.0, True)
    with pytest.raises(KernelError, match="different devices"):
        head_step(*args, norm=norm)
