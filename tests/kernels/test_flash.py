"""Our attention kernels: values and all gradients against float64, with every term."""

import pytest
import shim
import torch
from drawn_attention import draw, excess, hold, reference, written_out
from hypothesis import given
from hypothesis import strategies as st
from oracles import assert_rows

from purelm.errors import KernelError
from purelm.kernels import attention as dispatch
from purelm.kernels import flash_launch
from purelm.kernels.attention import (
    Documents,
    attention,
    attention_backward,
    attention_forward,
    attention_reference,
    backend_for,
)
from purelm.kernels.flash_launch import Config, Configs

HALVES = [torch.float16, torch.bfloat16]  # what the kernels serve on a GPU
EXTRAS = ("softcap", "sinks", "bias")


def small(queries, keys, apart):
    """Tiles so small that short rows have several; dk and dv in one launch or `apart`."""
    one, other = Config(queries, keys, 4, 2), Config(keys, queries, 4, 2)
    return Configs(one, one, other, one if apart else None)


@given(
    data=st.data(),
    packed=st.booleans(),
    rows=st.integers(1, 2),
    heads=st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 2)]),
    d=st.sampled_from([16, 24, 32, 40]),
    dtype=st.sampled_from(HALVES),
    window=st.none() | st.integers(2, 50),
    extras=st.sets(st.sampled_from(EXTRAS), min_size=1),
    tiles=st.sampled_from([(16, 16), (32, 16), (16, 32), (64, 32)]),
    apart=st.booleans(),
    strided=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_launch(
    interpreted, poisoned, data, packed, rows, heads, d, dtype, window, extras, tiles, apart,
    strided, seed,
):  # fmt: skip
    # With one key all is exact, and the gradients of scores vanish: no yardstick.
    lengths = [data.draw(st.integers(3, 45))]
    lengths += [data.draw(st.integers(0, 45)) for _ in range(rows - 1)]
    drawn = draw(seed, lengths, packed, *heads, d, dtype, window, extras, strided)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flash_launch, "configs_for", lambda *_: small(*tiles, apart))
        hold(drawn)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("extras", [{"softcap"}, {"sinks"}, {"bias"}, set(EXTRAS)])
def test_the_roundings_that_the_kernels_are_held_to_are_within_the_rule(extras, dtype):
    """The yardstick of `hold` beside torch's own arithmetic of that dtype."""
    drawn = draw(9, [30, 30], False, 2, 2, 32, dtype, 9, extras, False)
    exact = drawn.gradients(reference, torch.float64)
    ratios = excess(written_out(drawn), drawn.gradients(reference), exact, 30)
    assert all(ratio <= 2 for ratio in ratios[:4]), ratios


def test_rows_of_documents_are_one_row(interpreted):
    """Documents may be cut from several rows, such as padding and what it pads."""
    drawn = draw(3, [8, 8], False, 2, 2, 16, torch.float32, None, {"softcap"}, False)
    ends = torch.tensor([0, 3, 8, 8, 16], dtype=torch.int32)
    drawn.how["documents"] = Documents(ends, 8)
    whole = drawn.gradients(attention)
    exact = drawn.gradients(reference, torch.float64)
    ratios = excess(whole, drawn.gradients(reference), exact, 8)
    assert all(ratio <= 2 for ratio in ratios), ratios
    alone = attention(*(t[1:] for t in (drawn.q, drawn.k, drawn.v)), scale=0.25, softcap=3.0)
    assert torch.equal(whole[0][1:], alone)


def test_a_sink_takes_its_share():
    q, k, v = (torch.ones(1, 1, 1, 16, dtype=torch.float64) for _ in range(3))
    sinks = torch.tensor([2.0], dtype=torch.float64)
    out = attention(q, k, v, scale=0.125, sinks=sinks)
    share = torch.tensor([2.0, 2.0]).softmax(0)[0]
    torch.testing.assert_close(out, torch.full_like(out, float(share)))


@pytest.mark.parametrize("extras", [{"softcap"}, {"sinks", "bias"}])
def test_reference_gradients_are_autograds(extras):
    drawn = draw(1, [9, 9], False, 2, 2, 16, torch.float64, 5, extras, False)
    mine, auto = drawn.gradients(attention), drawn.gradients(reference)
    for a, x in zip(mine, auto, strict=True):
        torch.testing.assert_close(a, x, rtol=1e-10, atol=1e-10)


def test_two_runs_and_two_orders_give_the_same_bits(interpreted):
    drawn = draw(2, [50, 50], False, 2, 2, 16, torch.float32, 20, {"softcap", "sinks"}, False)
    once = drawn.gradients(attention)
    with shim.checking(reverse=True):
        again = drawn.gradients(attention)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def test_the_two_functions_are_the_differentiable_one(interpreted):
    drawn = draw(4, [20], False, 1, 2, 16, torch.float32, None, {"softcap", "bias"}, False)
    saved = attention_forward(drawn.q, drawn.k, drawn.v, **drawn.how)
    tensors = (drawn.dout, drawn.q, drawn.k, drawn.v)
    grads = attention_backward(*tensors, saved, **drawn.how)
    want = drawn.gradients(attention)
    assert all(torch.equal(a, b) for a, b in zip((saved.out, *grads), want, strict=True))


@pytest.mark.parametrize("launched", [False, True])
def test_transforms(launched, request):
    if launched:
        request.getfixturevalue("interpreted")
    drawn = draw(5, [7, 7, 7], False, 1, 2, 16, torch.float32, 4, {"softcap", "sinks"}, False)
    how = {**drawn.how, "sinks": None}
    q, k, v, sinks = drawn.q[:, None], drawn.k[:, None], drawn.v[:, None], drawn.how["sinks"]

    def ours(q, k, v, sinks):
        return attention(q, k, v, **{**how, "sinks": sinks}).pow(3).sum()

    def plain(q, k, v, sinks):
        return attention_reference(q, k, v, **{**how, "sinks": sinks})[0].pow(3).sum()

    every = (0, 1, 2, 3)
    for make in (
        lambda f, q, k, v, sinks: torch.func.grad(f, every)(q[0], k[0], v[0], sinks),
        lambda f, *given: (torch.func.vmap(f, (0, 0, 0, None))(*given),),
        lambda f, *given: torch.func.vmap(torch.func.grad(f, every), (0, 0, 0, None))(*given),
    ):
        exact = make(plain, *(t.double() for t in (q, k, v, sinks)))
        for tensors in zip(
            make(ours, q, k, v, sinks), make(plain, q, k, v, sinks), exact, strict=True
        ):
            assert_rows(*(t.flatten() for t in tensors))
            torch.testing.assert_close(*tensors[:2], rtol=1e-4, atol=1e-5)


def test_which_backend_is_taken(interpreted, monkeypatch):
    q = torch.empty(1, 4, 2, 64)
    assert backend_for(q, plain=False) == "triton"
    assert backend_for(q) == "flash_cpu"
    assert backend_for(q.double(), plain=False) == "reference"
    assert backend_for(q.repeat(1, 1, 1, 5), plain=False) == "reference"
    taken = []
    real = dispatch.ops.flash_forward
    monkeypatch.setattr(dispatch.ops, "flash_forward", lambda *a: taken.append(1) or real(*a))
    drawn = draw(6, [9], False, 1, 2, 16, torch.float32, None, {"softcap"}, False)
    attention(drawn.q, drawn.k, drawn.v, **drawn.how)
    assert taken
    attention(drawn.q, drawn.k, drawn.v, scale=0.25)
    assert len(taken) == 1


def test_every_cut_fits_its_kernel():
    for (_, width), configs in flash_launch.CONFIGS.items():
        assert width in (64, 128, 256)
        for config in filter(None, configs):
            assert config.queries % 16 == config.keys % 16 == 0
    assert flash_launch.configs_for(80, 9, 232_448) is flash_launch.CONFIGS[9, 128]
    assert flash_launch.configs_for(16, 8, 166_912) is flash_launch.CONFIGS[8, 64]
    assert flash_launch.configs_for(256, 10, 232_448) is flash_launch.CONFIGS[10, 256]
    assert flash_launch.configs_for(256, 12, 101_376) is flash_launch.CONFIGS[8, 256]


def test_bad_input(interpreted):
    drawn = draw(7, [9], False, 1, 2, 16, torch.float32, None, {"bias"}, False)
    with pytest.raises(KernelError, match="a column for each of 9 keys"):
        attention(drawn.q, drawn.k, drawn.v, scale=1.0, bias=drawn.how["bias"][:, :8])
    with pytest.raises(KernelError, match="belong together"):
        attention(drawn.q, drawn.k, drawn.v[:, :3], scale=1.0, softcap=1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("lengths", "packed", "k", "groups", "d", "window", "extras"),
    [
        ([300, 300], False, 2, 2, 256, None, {"softcap"}),
        ([300, 300], False, 2, 2, 256, 100, {"softcap"}),
        ([1, 200, 0, 333], True, 2, 2, 256, 100, {"softcap"}),
        ([1, 200, 0, 333], True, 1, 8, 64, 128, {"sinks"}),
        ([257, 257], False, 8, 1, 64, None, {"bias"}),
        ([100, 31], True, 1, 3, 80, None, {"softcap", "sinks", "bias"}),
        ([190], False, 2, 2, 128, 64, {"softcap", "sinks", "bias"}),
    ],
)
def test_on_a_gpu(lengths, packed, k, groups, d, window, extras, dtype):
    drawn = draw(8, lengths, packed, k, groups, d, dtype, window, extras, True, "cuda")
    assert backend_for(drawn.q, drawn.how["documents"], window, False) == "triton"
    hold(drawn)
    first, again = drawn.gradients(attention), drawn.gradients(attention)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
