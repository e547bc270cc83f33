"""NF4 and FP4 launches equal the reference bit for bit."""

from unittest import mock

import pytest
import shim
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import assert_rows

from purelm.errors import KernelError
from purelm.kernels import nf4, nf4_quantize_launch

pytestmark = pytest.mark.usefixtures("interpreted", "poisoned")

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
BLOCKS = st.sampled_from([32, 64, 128, 1024, 4096])
COUNTS = st.one_of(st.integers(1, 600), st.sampled_from([1023, 1024, 1025, 4095, 4096, 4097, 8193]))
SEEDS = st.integers(0, 2**31)
KINDS = st.sampled_from(["nf4", "fp4"])


def weights(count: int, seed: int, dtype: torch.dtype, kind: str = "normal") -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(count, generator=g)
    if kind == "zeros":
        w.zero_()
    elif kind == "spike":
        w *= 1e-3
        w[seed % count] = 1e4
    elif kind == "denormal":
        w *= 1e-40
    return w.to(dtype)


def quantized(w: torch.Tensor, block: int, double: bool):
    """The reference's parts of `w`."""
    packed, absmax = nf4.quantize_reference(w.reshape(-1), block)
    if not double:
        return packed, absmax, None, None
    offset = absmax.mean()
    return packed, *nf4.quantize_absmax_reference(absmax, offset), offset


@given(
    count=COUNTS,
    block=BLOCKS,
    seed=SEEDS,
    dtype=st.sampled_from(FLOATS),
    kind=st.sampled_from(["normal", "zeros", "spike", "denormal"]),
    levels=KINDS,
)
def test_quantize(count, block, seed, dtype, kind, levels):
    w = weights(count, seed, dtype, kind)
    packed, absmax = nf4.quantize(w, block, levels)
    want_packed, want_absmax = nf4.quantize_reference(w, block, levels)
    assert torch.equal(packed, want_packed)
    assert torch.equal(absmax, want_absmax)


@given(
    count=st.one_of(st.integers(1, 1100), st.sampled_from([1025, 2300])),
    seed=SEEDS,
    scale=st.sampled_from([1.0, 1e-20, 0.0]),
    summed=st.sampled_from([4, 64, 4096]),
)
def test_quantize_absmax(count, seed, scale, summed):
    absmax = weights(count, seed, torch.float32).abs() * scale
    with mock.patch.object(nf4_quantize_launch, "SUMMED", summed):
        codes, steps, offset = nf4.quantize_absmax(absmax)
    want_codes, want_steps = nf4.quantize_absmax_reference(absmax, offset)
    assert torch.equal(codes, want_codes)
    assert torch.equal(steps, want_steps)
    assert_rows(*(t.view(1, 1) for t in (offset, absmax.mean(), absmax.double().mean())))


@given(
    count=COUNTS,
    block=BLOCKS,
    seed=SEEDS,
    dtype=st.sampled_from(FLOATS),
    double=st.booleans(),
    into=st.booleans(),
    kind=KINDS,
)
def test_dequantize(count, block, seed, dtype, double, into, kind):
    parts = quantized(weights(count, seed, torch.float32), block, double)
    out = torch.full((count,), float("nan"), dtype=dtype) if into else None
    got = nf4.dequantize(*parts, count, block, dtype, out, kind)
    assert got.dtype == dtype and (out is None or got is out)
    assert torch.equal(got, nf4.dequantize_reference(*parts, count, block, dtype, kind))


@pytest.mark.parametrize("shift", [0, 1, 4])
def test_codes_anywhere_in_memory(shift):
    """Whole aligned words are read as such, other codes by bytes."""
    packed, *rest = quantized(weights(1024, 5, torch.float32), 64, True)
    moved = torch.cat([packed.new_zeros(shift), packed])[shift:]
    want = nf4.dequantize_reference(packed, *rest, 1024, 64, torch.bfloat16)
    assert torch.equal(nf4.dequantize(moved, *rest, 1024, 64), want)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_every_byte_at_every_place(kind):
    packed = torch.arange(256, dtype=torch.uint8).repeat(32)
    absmax = torch.linspace(1e-3, 10, packed.numel() * 2 // 64)
    for dtype in FLOATS:
        got = nf4.dequantize(packed, absmax, None, None, packed.numel() * 2, 64, dtype, kind=kind)
        levels = torch.tensor(nf4.codebook.LEVELS[kind])
        codes = torch.stack([packed >> 4, packed & 15], 1).reshape(-1, 64).int()
        assert torch.equal(got.view(-1, 64), (levels[codes] * absmax[:, None]).to(dtype))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("scale", [1.0, 0.37, 3e-5, 811.0, 1e-30])
def test_near_thresholds(scale, kind):
    """At four floats either side of each threshold the launch and the reference agree."""
    mids = nf4.codebook.thresholds_of(kind) * scale
    near = [mids]
    for direction in (float("inf"), float("-inf")):
        at = mids
        for _ in range(4):
            at = torch.nextafter(at, torch.full_like(at, direction))
            near.append(at)
    values = torch.cat(near)
    rows = torch.nn.functional.pad(values.view(-1, 15), (1, 16))
    rows[:, 0] = scale
    packed, absmax = nf4.quantize(rows, 32, kind)
    want = nf4.quantize_reference(rows.reshape(-1), 32, kind)
    assert torch.equal(packed, want[0]) and torch.equal(absmax, want[1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", [0, 63, 64, 100])
def test_bad_weight_shows_in_its_absmax(bad, where):
    w = torch.ones(130)
    w[where] = bad
    for absmax in (nf4.quantize(w, 64)[1], nf4.quantize_reference(w, 64)[1]):
        assert (~absmax.isfinite()).nonzero().flatten().tolist() == [where // 64]


def test_order_of_programs_does_not_matter():
    w = weights(20000, 3, torch.bfloat16)
    with shim.checking(race=True, reverse=True):
        packed, absmax = nf4.quantize(w, 64)
    assert torch.equal(packed, nf4.quantize(w, 64)[0])
    assert torch.equal(absmax, nf4.quantize(w, 64)[1])


@pytest.mark.parametrize("block", [0, 16, 48, 8192])
def test_block_sizes_that_are_refused(block):
    with pytest.raises(KernelError, match=f"block size {block}"):
        nf4.quantize(torch.ones(64), block)
    with pytest.raises(KernelError, match="kind 'int4': expected one of nf4, fp4"):
        nf4.quantize(torch.ones(64), 64, "int4")


def test_parts_that_do_not_fit():
    packed, absmax, scale, offset = quantized(torch.ones(128), 64, True)
    good = [packed, absmax, scale, offset, 128, 64]
    assert nf4.dequantize(*good).shape == (128,)
    for place, part, message in [
        (0, packed[:-1], "packed"),
        (0, packed.int(), "packed"),
        (1, absmax[:1], "absmax"),
        (1, absmax.float(), "absmax"),
        (2, scale.repeat(2), "absmax_scale"),
        (2, None, "absmax"),
        (3, None, "both or neither"),
        (4, 131, "packed"),
        (5, 32, "absmax"),
    ]:
        wrong = [*good]
        wrong[place] = part
        with pytest.raises(KernelError, match=message):
            nf4.dequantize(*wrong)
    with pytest.raises(KernelError, match="out has shape"):
        nf4.dequantize(*good, out=torch.empty(127))
    with pytest.raises(KernelError, match="contiguous"):
        nf4.dequantize(*good, out=torch.empty(256)[::2])
    many = [packed.new_zeros(64 * 256), absmax.new_zeros(512), torch.ones(4)[::2], offset]
    with pytest.raises(KernelError, match="contiguous"):
        nf4.dequantize(*many, 64 * 512, 64)
    with pytest.raises(KernelError, match="dtype"):
        nf4.dequantize(*good, torch.int32)
    for w in (torch.ones(3, dtype=torch.int8), torch.ones(0)):
        with pytest.raises(KernelError):
            nf4.quantize(w)
