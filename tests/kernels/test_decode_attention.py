"""Decode attention: the reference is torch's attention row by row, the launch keeps to the rule."""

import contextlib
from unittest import mock

import pytest
import shim
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import assert_rows

from purelm.errors import KernelError
from purelm.kernels import decode_attention as launches
from purelm.kernels.decode_attention import (
    decode_attention,
    decode_attention_reference,
    splits_for,
)

FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def drawn(seed, spans, heads_k, groups, dim, dtype, capacity):
    """Inputs whose columns outside of the spans are NaN: whoever reads them shows it."""
    g = torch.Generator().manual_seed(seed)
    first, end = torch.tensor(spans).unbind(-1)
    q = torch.randn(len(spans), heads_k * groups, dim, generator=g)
    k, v = torch.randn(2, len(spans), capacity, heads_k, dim, generator=g).unbind(0)
    return *(t.to(dtype) for t in (q, k, v)), first, end


def outside(keys, first, end):
    column = torch.arange(keys.shape[1])
    return ((column < first[:, None]) | (column >= end[:, None]))[:, :, None, None]


def paged(x, page, seed):
    """x [b, s, ...] in pages of any order, among pages of NaN; the table of them."""
    b, s = x.shape[:2]
    wide = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, -s % page), value=float("nan"))
    pages = wide.unflatten(1, (-1, page)).flatten(0, 1)
    order = torch.randperm(2 * len(pages), generator=torch.Generator().manual_seed(seed))
    order = order[: len(pages)]
    pool = x.new_full((order.max() + 1, *pages.shape[1:]), float("nan"))
    pool[order] = pages
    return pool, order.view(b, -1)


@given(
    data=st.data(),
    rows=st.integers(1, 3),
    heads_k=st.integers(1, 3),
    groups=st.sampled_from([1, 2, 3, 7]),
    dim=st.sampled_from([8, 16, 20, 64, 96]),
    dtype=st.sampled_from(FLOATS),
    softcap=st.sampled_from([None, 5.0]),
    sinks=st.booleans(),
    biased=st.booleans(),
    capacity=st.sampled_from([1, 40, 64, 200, 333]),
    splits=st.sampled_from([None, 1, 2]),
    page=st.sampled_from([None, 4, 16]),
    narrow=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_launch(
    interpreted, poisoned, data, rows, heads_k, groups, dim, dtype, softcap, sinks, biased,
    capacity, splits, page, narrow, seed,
):  # fmt: skip
    ends = [data.draw(st.integers(0, capacity)) for _ in range(rows)]
    spans = [(data.draw(st.integers(0, end)), end) for end in ends]
    q, k, v, first, end = drawn(seed, spans, heads_k, groups, dim, dtype, capacity)
    g = torch.Generator().manual_seed(seed + 1)
    heads = heads_k * groups
    how = {
        "scale": dim**-0.5,
        "softcap": softcap,
        "sinks": torch.randn(heads, generator=g) if sinks else None,
        "bias": torch.randn(heads, capacity, generator=g) if biased else None,
    }
    if narrow:
        k, v = (t.to(torch.float8_e4m3fn).to(dtype) for t in (k, v))
    eager = decode_attention_reference(q, k, v, first, end, **how)
    wide = (t.double() for t in (q, k, v))
    exact = decode_attention_reference(*wide, first, end, **how)
    hidden = outside(k, first, end)
    k, v = (t.masked_fill(hidden, float("nan")) for t in (k, v))
    table = None
    if page is not None:
        (k, table), (v, _) = (paged(t, page, seed) for t in (k, v))
    if narrow:
        k, v = (t.to(torch.float8_e4m3fn) for t in (k, v))
    cut = mock.patch.object(launches, "splits_for", lambda *_: splits)
    with cut if splits else contextlib.nullcontext():
        ours = decode_attention(q, k, v, first, end, table, **how)
    # A pool of heads: the error of a single one may be small by luck.
    assert_rows(*(t.reshape(1, -1) for t in (ours, eager, exact)))


@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_reference_equals_attention_over_each_rows_keys(softcap, extra):
    spans = [(0, 9), (3, 12), (11, 12), (4, 4)]
    q, k, v, first, end = drawn(0, spans, 2, 3, 8, torch.float64, 12)
    g = torch.Generator().manual_seed(1)
    bias, sinks = torch.randn(6, 12, generator=g).double(), torch.randn(6, generator=g).double()
    more = {"bias": bias, "sinks": sinks} if extra else {}
    out = decode_attention(q, k, v, first, end, scale=0.3, softcap=softcap, **more)
    for i, (a, b) in enumerate(spans):
        for head in range(6):
            scores = 0.3 * k[i, a:b, head // 3] @ q[i, head]
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            if extra:
                scores = torch.cat([scores + bias[head, : b - a], sinks[head : head + 1]])
            want = scores.softmax(0)[: b - a] @ v[i, a:b, head // 3]
            torch.testing.assert_close(out[i, head], want)
    assert not out[3].any()


def test_the_order_of_programs_does_not_matter(interpreted):
    q, k, v, first, end = drawn(1, [(5, 300)], 2, 2, 16, torch.float32, 320)
    once = decode_attention(q, k, v, first, end, scale=0.25)
    with shim.checking(reverse=True):
        assert torch.equal(once, decode_attention(q, k, v, first, end, scale=0.25))


def test_few_rows_share_their_keys_among_programs():
    assert splits_for(1, 8, 32768, 64) == 64
    assert splits_for(8, 8, 32768, 64) == 8
    assert splits_for(1, 8, 64, 64) == 1
    assert splits_for(512, 8, 32768, 64) == 1


def test_bad_input():
    q, k, v, first, end = drawn(0, [(0, 4)], 2, 2, 8, torch.float32, 4)
    with pytest.raises(KernelError, match="multiple of k"):
        decode_attention(q[:, :3], k, v, first, end, scale=1.0)
    with pytest.raises(KernelError, match="expected \\[1\\]"):
        decode_attention(q, k, v, first[0], end, scale=1.0)
    with pytest.raises(KernelError, match="table"):
        decode_attention(q, k, v, first, end, torch.zeros(3, dtype=torch.int64), scale=1.0)
    with pytest.raises(KernelError, match="gradient"):
        decode_attention(q.requires_grad_(), k, v, first, end, scale=1.0)
