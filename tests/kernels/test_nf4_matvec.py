"""Few rows times a packed 4-bit weight: the launch keeps to the tolerance rule."""

from unittest import mock

import pytest
import shim
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import assert_rows

from purelm.errors import KernelError
from purelm.kernels import codebook, nf4, nf4_decode, nf4_products
from purelm.kernels import nf4_matvec_launch as launches
from purelm.kernels.nf4_matvec import matvec, matvec_reference

FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def drawn(rows, outputs, width, block, double, kind, dtype, rank, seed, size=1.0):
    """x, the weight's parts, the low-rank pair (None where rank is 0)."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(outputs * width, generator=g) * size
    packed, absmax = nf4.quantize_reference(w, block, kind)
    parts = [packed, absmax, None, None]
    if double:
        offset = absmax.mean()
        parts = [packed, *nf4.quantize_absmax_reference(absmax, offset), offset]
    x = torch.randn(rows, width, generator=g).to(dtype)
    low = torch.randn(rows, rank, generator=g).to(dtype) if rank else None
    b = torch.randn(outputs, rank, generator=g).to(dtype) if rank else None
    return x, parts, low, b


def dense(x, parts, outputs, block, kind, low, b):
    """What the dense path computes, in the dtype of x."""
    count = outputs * x.shape[1]
    y = x @ nf4.dequantize_reference(*parts, count, block, x.dtype, kind).view(outputs, -1).mT
    return y if low is None else y + low @ b.mT


def check(x, parts, outputs, block, kind, low, b):
    ours = matvec(x, *parts, outputs, block, kind, low, b)
    wide = [None if t is None else t.double() for t in (low, b)]
    exact = dense(x.double(), parts, outputs, block, kind, *wide)
    eager = dense(x, parts, outputs, block, kind, low, b)
    if (
        x.dtype == torch.float32
    ):  # there eager is as near as luck has it: all values count as one row
        ours, eager, exact = (y.reshape(1, -1) for y in (ours, eager, exact))
    assert_rows(ours, eager, exact)


@given(
    rows=st.one_of(st.just(1), st.integers(2, 64)),
    outputs=st.one_of(st.integers(1, 70), st.sampled_from([127, 129])),
    runs=st.one_of(st.integers(1, 9), st.sampled_from([33, 65])),
    block=st.sampled_from([32, 64, 128, 4096]),
    double=st.booleans(),
    kind=st.sampled_from(["nf4", "fp4"]),
    dtype=st.sampled_from(FLOATS),
    rank=st.sampled_from([0, 0, 1, 8, 16, 17]),
    seed=st.integers(0, 2**31),
    size=st.sampled_from([1.0, 1e-3]),
)
def test_launch(
    interpreted, poisoned, rows, outputs, runs, block, double, kind, dtype, rank, seed, size
):
    width = runs * min(block, 64)
    if dtype == torch.float32:
        outputs = max(outputs, 32)
    x, parts, low, b = drawn(rows, outputs, width, block, double, kind, dtype, rank, seed, size)
    check(x, parts, outputs, block, kind, low, b)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_inputs_of_one_sign(interpreted, poisoned, rows, kind):
    """Errors of the levels would add up here."""
    x, parts, low, b = drawn(rows, 24, 1024, 64, True, kind, torch.bfloat16, 0, 5)
    check(torch.ones_like(x), parts, 24, 64, kind, low, b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_table(kind, dtype):
    """The decoder's scaled levels are the levels, as near as a dense weight is to its own value and
    on the whole without bias."""
    planes = nf4_decode.table(kind, dtype, torch.device("cpu")).view(torch.uint8).view(2, 16)
    scaled = planes.mT.contiguous().view(dtype).double().flatten()
    error = scaled / nf4_decode.SCALES[kind, dtype] - codebook.levels_of(kind).double()
    eps = torch.finfo(dtype).eps
    assert float(error.abs().max()) < eps / 4 and abs(float(error.mean())) < eps / 32


@pytest.mark.parametrize("rows", [1, 3])
def test_sharing_and_order_of_programs(interpreted, poisoned, rows):
    """In fp32 programs may share an output, in 16 bits the warps of one do."""
    for dtype in (torch.float32, torch.bfloat16):
        x, parts, low, b = drawn(rows, 40, 64 * 13, 64, True, "nf4", dtype, 5, 1)
        with shim.checking(race=True, reverse=True):
            backwards = matvec(x, *parts, 40, 64, "nf4", low, b)
        assert torch.equal(backwards, matvec(x, *parts, 40, 64, "nf4", low, b))
        for split, runs in ((1, 2), (3, 2), (16, 4), (16, 1), (2, 16)):
            cut = launches.Config(16, runs, split, 4)
            warps = nf4_products.Config(split if split != 3 else 4, 1 + runs % 2)
            with (
                mock.patch.object(launches, "config_for", lambda *_, c=cut: c),
                mock.patch.object(nf4_products, "config_for", lambda *_, c=warps: c),
            ):
                check(x, parts, 40, 64, "nf4", low, b)


def test_strided_x(interpreted, poisoned):
    x, parts, _, _ = drawn(64, 20, 128, 64, True, "nf4", torch.bfloat16, 0, 2)
    for view in (x[::2], x[3:4], torch.randn(128, 7).to(torch.bfloat16).mT, x[0].expand(3, 128)):
        check(view, parts, 20, 64, "nf4", None, None)
        assert torch.equal(matvec(view, *parts, 20, 64), matvec(view.contiguous(), *parts, 20, 64))


@pytest.mark.parametrize("rows", [1, 2])
def test_non_finite_x_stays_in_its_row(interpreted, poisoned, rows):
    x, parts, _, _ = drawn(rows, 20, 128, 64, True, "nf4", torch.bfloat16, 0, 2)
    x[0, 5] = float("nan")
    y = matvec(x, *parts, 20, 64)
    assert y[0].isnan().all() and y[1:].isfinite().all()


def test_reference_serves_without_a_gpu_and_in_float64():
    x, parts, low, b = drawn(3, 20, 96, 32, True, "nf4", torch.bfloat16, 4, 3)
    want = matvec_reference(x, *parts, 20, 32, "nf4", low, b)
    assert torch.equal(matvec(x, *parts, 20, 32, "nf4", low, b), want)
    wide = matvec(x.double(), *parts, 20, 32)
    assert wide.dtype == torch.float64
    torch.testing.assert_close(wide, dense(x.double(), parts, 20, 32, "nf4", None, None))


def test_op(interpreted):
    x, parts, low, b = drawn(3, 20, 64, 64, True, "nf4", torch.bfloat16, 4, 3)
    op = torch.ops.purelm.nf4_matvec
    torch.library.opcheck(op, (x, *parts, low, b, 20, 64, "nf4"), test_utils="test_schema")
    torch.library.opcheck(op, (x, *parts, low, b, 20, 64, "nf4"), test_utils="test_faketensor")
    many = torch.vmap(lambda x: op(x, *parts, None, None, 20, 64, "nf4"))(x[:, None])
    one = torch.stack([matvec(row[None], *parts, 20, 64) for row in x])
    assert torch.equal(many, one)


@pytest.mark.parametrize("block", nf4.BLOCKS)
@pytest.mark.parametrize("rows", [1, 2, 64])
def test_every_cut_is_whole(rows, block):
    for outputs, width in ((1, 64), (512, 2048), (1024, 4096), (14336, 4096), (4096, 14336)):
        config = launches.config_for(rows, outputs, width, block)
        assert config.split >= 1 and config.outputs & (config.outputs - 1) == 0
        # A tensor core product sums at least 16 values.
        assert rows == 1 or config.runs * min(block, 64) >= 16
        assert config.runs & (config.runs - 1) == 0
        runs = width // min(block, 64)
        for pair in (False, True):
            cut = nf4_products.config_for(rows, outputs, runs, pair)
            assert cut.num_warps & (cut.num_warps - 1) == 0 and cut.num_warps <= 2 * runs
            assert cut.turns in (1, 2)


def test_what_it_refuses():
    x, parts, low, b = drawn(2, 20, 64, 64, True, "nf4", torch.float32, 4, 3)
    for arguments, message in [
        ((x[0], *parts, 20, 64), "expected floating point"),
        ((x.int(), *parts, 20, 64), "expected floating point"),
        ((x.repeat(33, 1), *parts, 20, 64), "1 to 64 rows"),
        ((x[:0], *parts, 20, 64), "1 to 64 rows"),
        ((x[:, :32], *parts, 40, 64), "a multiple of 64"),
        ((x, *parts, 21, 64), "packed"),
        ((x, *parts, 20, 48), "block size 48"),
        ((x, *parts, 20, 64, "nf5"), "kind 'nf5'"),
        ((x, *parts, 20, 64, "nf4", low), "both or neither"),
        ((x, *parts, 20, 64, "nf4", low[:1], b), "low"),
        ((x, *parts, 20, 64, "nf4", low, b[:, :3]), "low"),
        ((x.clone().requires_grad_(), *parts, 20, 64), "gradient"),
    ]:
        with pytest.raises(KernelError, match=message):
            matvec(*arguments)
