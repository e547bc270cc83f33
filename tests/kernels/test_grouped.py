"""Grouped products over rows sorted by group: the launches keep to the tolerance rule."""

import pytest
import shim
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import assert_rows

from purelm.errors import KernelError
from purelm.kernels import grouped, grouped_dense_launch, grouped_nf4_launch, nf4

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
# Empty groups, one that takes all, ragged ends, a single row, full tiles.
COUNTS = st.one_of(
    st.lists(st.integers(0, 20), min_size=1, max_size=6),
    st.sampled_from([[0, 37, 0], [1], [0, 1, 0, 0, 0], [16, 32, 64], [0, 0, 130], [1, 1, 1, 1, 1]]),
)


def offsets(counts):
    return torch.tensor([0, *counts]).cumsum(0).int()


def near(ours, eager, exact):
    """By rows in 16 bits; in fp32 eager is as near as luck has it, so all values are one row."""
    if ours.dtype == torch.float32:
        ours, eager, exact = (y.reshape(1, -1) for y in (ours, eager, exact))
    assert_rows(ours, eager, exact)


def stack(groups, count, block, double, kind, g):
    """The stacked parts of `groups` matrices, each quantized alone."""
    made = []
    for _ in range(groups):
        packed, absmax = nf4.quantize_reference(torch.randn(count, generator=g), block, kind)
        parts = [packed, absmax, None, None]
        if double:
            offset = absmax.mean()
            parts = [packed, *nf4.quantize_absmax_reference(absmax, offset), offset]
        made.append(parts)
    return [None if c[0] is None else torch.stack(c) for c in zip(*made, strict=True)]


def term(rows, groups, outputs, rank, dtype, g):
    if not rank:
        return None, None
    # low is a part of several projections' and b a transpose, as some callers have them.
    low = torch.randn(rows, rank + 3, generator=g).to(dtype)[:, 1 : 1 + rank]
    return low, torch.randn(groups, rank, outputs, generator=g).to(dtype).mT


def sliced(rows, width, dtype, g):
    """Rows [rows, width] of wider ones."""
    return torch.randn(rows, width + 5, generator=g).to(dtype)[:, 3 : 3 + width]


def wide(*given):
    return [None if t is None else t.double() for t in given]


@given(
    counts=COUNTS,
    outputs=st.sampled_from([1, 8, 16, 33, 65, 130]),
    depth=st.sampled_from([1, 16, 40, 64, 130]),
    turned=st.booleans(),
    dtype=st.sampled_from(FLOATS),
    rank=st.sampled_from([0, 0, 1, 16, 17]),
    seed=st.integers(0, 2**31),
)
def test_dense(interpreted, poisoned, counts, outputs, depth, turned, dtype, rank, seed):
    g = torch.Generator().manual_seed(seed)
    rows, groups = sum(counts), len(counts)
    x = sliced(rows, depth, dtype, g)
    w = torch.randn(groups, depth, outputs, generator=g).to(dtype).mT
    w = w if turned else w.contiguous()
    low, b = term(rows, groups, outputs, rank, dtype, g)
    at = offsets(counts)
    ours = grouped.matmul(x, w, at, low, b)
    # What a loop of two products in this dtype computes.
    eager = torch.zeros_like(ours)
    for i, own in grouped._slices(at):
        eager[own] = x[own] @ w[i].mT
        if low is not None:
            eager[own] += low[own] @ b[i].mT
    exact = grouped.matmul_reference(x.double(), w.double(), at, *wide(low, b))
    near(ours, eager, exact)


@given(
    counts=COUNTS,
    outputs=st.sampled_from([32, 65, 128]),
    runs=st.sampled_from([1, 2, 3]),
    block=st.sampled_from([32, 64, 128, 4096]),
    double=st.booleans(),
    kind=st.sampled_from(["nf4", "fp4"]),
    turned=st.booleans(),
    dtype=st.sampled_from(FLOATS),
    rank=st.sampled_from([0, 1, 16]),
    seed=st.integers(0, 2**31),
)
def test_packed(
    interpreted, poisoned, counts, outputs, runs, block, double, kind, turned, dtype, rank, seed
):
    g = torch.Generator().manual_seed(seed)
    rows, groups, width = sum(counts), len(counts), runs * min(block, 64)
    parts = stack(groups, outputs * width, block, double, kind, g)
    x = sliced(rows, outputs if turned else width, dtype, g)
    low, b = term(rows, groups, width if turned else outputs, rank, dtype, g)
    at, shape = offsets(counts), (outputs, width)
    ours = grouped.matmul_nf4(x, *parts, at, shape, block, kind, low, b, turned=turned)
    eager = torch.zeros_like(ours)
    for i, own in grouped._slices(at):
        each = [None if t is None else t[i] for t in parts]
        w = nf4.dequantize_reference(*each, outputs * width, block, dtype, kind).view(shape)
        eager[own] = x[own] @ (w if turned else w.mT)
        if low is not None:
            eager[own] += low[own] @ b[i].mT
    exact = grouped.matmul_nf4_reference(
        x.double(), *parts, at, shape, block, kind, *wide(low, b), turned=turned
    )
    near(ours, eager, exact)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("parts_at_once", [1, 2, 4])
def test_in_parts(interpreted, poisoned, monkeypatch, double, turned, parts_at_once):
    """Many rows a matrix: dequantized in parts, with the same numbers but for the order of sums."""
    g = torch.Generator().manual_seed(4)
    shape, counts = (32, 192), [5, 0, 20, 9, 1]
    parts = stack(5, 32 * 192, 64, double, "nf4", g)
    x = torch.randn(35, 32 if turned else 192, generator=g).to(torch.bfloat16)
    low, b = term(35, 5, 192 if turned else 32, 8, x.dtype, g)
    monkeypatch.setattr(grouped, "PARTS", parts_at_once)
    monkeypatch.setattr(grouped, "PACKED_ROWS", 6)
    ours = grouped.matmul_nf4(x, *parts, offsets(counts), shape, 64, "nf4", low, b, turned=turned)
    monkeypatch.setattr(grouped, "PACKED_ROWS", 7)
    packed = grouped.matmul_nf4(x, *parts, offsets(counts), shape, 64, "nf4", low, b, turned=turned)
    exact = grouped.matmul_nf4_reference(
        x.double(), *parts, offsets(counts), shape, 64, "nf4", *wide(low, b), turned=turned
    )
    near(ours, packed, exact)


@given(
    counts=COUNTS,
    left=st.sampled_from([1, 16, 33, 130]),
    right=st.sampled_from([1, 16, 65, 130]),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 2**31),
)
def test_outer(interpreted, poisoned, counts, left, right, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    dy, x = (torch.randn(sum(counts), n, generator=g).to(dtype) for n in (left, right))
    at = offsets(counts)
    ours = grouped.outer(dy, x, at)
    eager = torch.zeros_like(ours)
    for i, own in grouped._slices(at):
        eager[i] = dy[own].mT @ x[own]
    near(ours, eager, grouped.outer_reference(dy.double(), x.double(), at, torch.float64))
    assert grouped.outer(dy, x, at, torch.float32).dtype == torch.float32


def test_some_groups_write_their_rows_alone(interpreted):
    g = torch.Generator().manual_seed(0)
    counts = [3, 20, 0, 7]
    x, w = torch.randn(30, 32, generator=g), torch.randn(4, 48, 32, generator=g)
    at, out = offsets(counts), torch.full((30, 48), 7.0)
    grouped.matmul(x, w[1:3], at[1:4], out=out)
    whole = grouped.matmul(x, w, at)
    torch.testing.assert_close(out[3:23], whole[3:23])  # cut otherwise, it sums otherwise
    assert (out[:3] == 7).all() and (out[23:] == 7).all()


def test_order_of_programs(interpreted, poisoned):
    g = torch.Generator().manual_seed(1)
    parts = stack(3, 40 * 64, 64, True, "nf4", g)
    x = torch.randn(37, 64, generator=g).to(torch.bfloat16)
    at = offsets([0, 33, 4])

    def every():
        y = grouped.matmul_nf4(x, *parts, at, (40, 64), 64)
        return (
            y,
            grouped.matmul_nf4(y, *parts, at, (40, 64), 64, turned=True),
            grouped.outer(y, x, at),
        )

    with shim.checking(race=True, reverse=True):
        backwards = every()
    assert all(torch.equal(a, b) for a, b in zip(backwards, every(), strict=True))


@pytest.mark.parametrize("counts", [[0, 5, 0, 0, 2], [9], [0, 0]])
def test_offsets_from_sorted_ids(counts):
    ids = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    assert torch.equal(grouped.offsets_of(ids, len(counts)), offsets(counts))


def test_ops(interpreted):
    g = torch.Generator().manual_seed(3)
    parts = stack(2, 32 * 64, 64, True, "nf4", g)
    x = torch.randn(5, 64, generator=g).to(torch.bfloat16)
    at, checks = offsets([2, 3]), ("test_schema", "test_faketensor")
    for name, args in (
        ("grouped_nf4", (x, *parts, at, None, None, 32, 64, 64, "nf4", False)),
        ("grouped_outer", (x, x, at, torch.float32)),
        ("grouped_dense", (x, x.new_ones(2, 8, 64), at, None, None, x.new_ones(5, 8))),
    ):
        torch.library.opcheck(getattr(torch.ops.purelm, name), args, test_utils=checks)


@pytest.mark.parametrize("capability", [8, 9])
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_cut_is_whole(dtype, capability):
    for rows in (1, 8, 64, 256, 16384, 131072):
        for outputs, depth in ((16, 2048), (768, 2048), (2048, 768), (2048, 16)):
            cuts = [grouped_dense_launch.dense_config(rows, 128, outputs, depth, dtype, capability)]
            for block in nf4.BLOCKS:
                unit = min(block, 64)
                for turned in (False, True):
                    cut = grouped_nf4_launch.nf4_config(
                        rows, 128, outputs, depth, block, dtype, turned, capability
                    )
                    assert (cut.outputs if turned else cut.depth) % unit == 0
                    cuts.append(cut)
            for cut in cuts:  # a tensor core product has at least 16 of each
                assert all(n >= 16 and n & (n - 1) == 0 for n in cut[:3])


def test_what_it_refuses():
    g = torch.Generator().manual_seed(3)
    x, w, at = torch.randn(5, 64, generator=g), torch.randn(2, 8, 64, generator=g), offsets([2, 3])
    parts = stack(2, 32 * 64, 64, True, "nf4", g)
    low, b = torch.ones(5, 4), torch.ones(2, 8, 4)
    for call, message in [
        (lambda: grouped.matmul(x[0], w, at), "expected floating point"),
        (lambda: grouped.matmul(x, w, at.long()), "expected int32"),
        (lambda: grouped.matmul(x, w, at[1:]), "expected one more"),
        (lambda: grouped.matmul(x, w.bfloat16(), at), "w is torch.bfloat16"),
        (lambda: grouped.matmul(x, w[:, :, :8], at), "expected torch.float32"),
        (lambda: grouped.matmul(x, w, at, low), "both or neither"),
        (lambda: grouped.matmul(x, w, at, low, b[:, :3]), "low"),
        (lambda: grouped.matmul(x, w, at, out=x), "out is"),
        (lambda: grouped.matmul_nf4(x, *parts, at, (64, 32), 64), "a multiple of 64"),
        (lambda: grouped.matmul_nf4(x, *parts, at, (16, 64), 64), "packed is"),
        (lambda: grouped.matmul_nf4(x, *parts[:3], None, at, (32, 64), 64), "both or neither"),
        (lambda: grouped.outer(low, x[:3], at), "dy is"),
    ]:
        with pytest.raises(KernelError, match=message):
            call()
