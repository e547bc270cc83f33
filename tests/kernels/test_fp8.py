"""fp8 launches equal the reference bit for bit; casts and products keep to e4m3's bounds."""

import pytest
import shim
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import assert_rows

from purelm.errors import KernelError
from purelm.kernels import fp8, launch, nf4

pytestmark = pytest.mark.usefixtures("interpreted", "poisoned")

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
SEEDS = st.integers(0, 2**31)
KINDS = ["normal", "zeros", "spike", "denormal", "heavy", "huge"]


def bits(codes: torch.Tensor) -> torch.Tensor:
    return codes.view(torch.uint8)


def values(m: int, k: int, seed: int, dtype: torch.dtype, kind: str = "normal") -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=g)
    if kind == "zeros":
        x[seed % m] = 0.0
    elif kind == "spike":
        x[seed % m, seed % k] = 3e4
    elif kind == "denormal":
        x *= 1e-40
    elif kind == "heavy":
        x = x**5
    elif kind == "huge":
        x = (x.double() * 0.2 * torch.finfo(dtype).max).clamp(-6e37, 6e37)
    return x.to(dtype)


def packed_parts(shape, block, double, seed, kind="nf4"):
    w = values(*shape, seed, torch.float32)
    packed, absmax = nf4.quantize_reference(w.reshape(-1), block, kind)
    if not double:
        return packed, absmax, None, None
    offset = absmax.mean()
    return packed, *nf4.quantize_absmax_reference(absmax, offset), offset


@given(
    m=st.integers(1, 4),
    widths=st.lists(st.integers(1, 300), min_size=1, max_size=3),
    seed=SEEDS,
    dtype=st.sampled_from(FLOATS),
    kind=st.sampled_from(KINDS),
    strided=st.booleans(),
)
def test_cast_rows(m, widths, seed, dtype, kind, strided):
    parts = [values(m, k, seed + i, dtype, kind) for i, k in enumerate(widths)]
    if strided:  # rows apart, or no unit stride
        parts = [torch.cat([p, p], 1)[:, : p.shape[1]] for p in parts[:-1]] + [
            parts[-1].mT.clone().mT
        ]
    got, want = fp8.cast_rows(parts), fp8.cast_rows_reference(parts)
    assert torch.equal(bits(got.codes), bits(want.codes)) and torch.equal(got.scale, want.scale)
    # Half a step of three mantissa bits, or half of the smallest step there is.
    exact = torch.cat([p.double() for p in parts], 1)
    scale = got.scale.double()[:, None]
    error = (got.codes.double() * scale - exact).abs()
    assert (error <= (exact.abs() * 2**-4).clamp(min=0) * 1.0001 + scale * 2**-10 * 1.0001).all()


@pytest.mark.parametrize("width", [4097, 33000])
def test_cast_of_rows_wider_than_a_tile(width):
    x = values(2, width, width, torch.bfloat16, "heavy")
    x[1, 0] = 1e6  # the largest of all, where a row begins
    y, z = x[:, 7:107], x[:, 5:50]
    for parts in ([x], [x, y], [x, y, z], [y, x], [y, z, x]):
        got, want = fp8.cast_rows(parts), fp8.cast_rows_reference(parts)
        assert torch.equal(bits(got.codes), bits(want.codes))
        assert torch.equal(got.scale, want.scale)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(bad):
    x = values(3, 40, 0, torch.float32)
    x[1, 7] = bad
    for made in (fp8.cast_rows(x), fp8.cast_rows_reference([x])):
        assert made.codes.float().isfinite().all(1).tolist() == [True, False, True]
        y = fp8.product(made, fp8.cast_rows(values(16, 40, 1, torch.float32)), torch.float32)
        assert y.isnan().all(1).tolist() == [False, True, False]


@given(
    n=st.integers(1, 6).map(lambda i: 16 * i),
    k=st.integers(1, 20).map(lambda i: 16 * i),
    block=st.sampled_from([32, 64, 128, 4096]),
    double=st.booleans(),
    transposed=st.booleans(),
    into=st.booleans(),
    seed=SEEDS,
    kind=st.sampled_from(["nf4", "fp4"]),
)
def test_nf4_rows(n, k, block, double, transposed, into, seed, kind):
    parts = packed_parts((n, k), block, double, seed, kind)
    dense = nf4.dequantize_reference(*parts, n * k, block, torch.float32, kind).view(n, k)
    dense = dense.mT if transposed else dense
    scale = fp8.scale_of(dense.abs().amax(1))
    out = None
    if into:  # a slice of a wider buffer, and nothing beside it is touched
        wide = torch.full((dense.shape[0], dense.shape[1] + 32), 7.0).to(fp8.E4M3)
        out = wide[:, 16:-16]
    got = fp8.nf4_rows(*parts, (n, k), block, scale, transposed=transposed, kind=kind, out=out)
    want = fp8.cast_rows_reference([dense])
    assert torch.equal(bits(got), bits(want.codes)) and torch.equal(scale, want.scale)
    with launch.interpreting(False):
        plain = fp8.nf4_rows(*parts, (n, k), block, scale, transposed=transposed, kind=kind)
    assert torch.equal(bits(plain), bits(got))
    if into:
        assert (
            got is out and (wide[:, :16].float() == 7).all() and (wide[:, -16:].float() == 7).all()
        )


@pytest.mark.parametrize("at, more", [(1, 32), (16, 33)])
def test_nf4_rows_into_memory_off_the_words(at, more):
    """At any byte, and with packed codes at any."""
    packed, *rest = packed_parts((32, 48), 64, True, 5)
    packed = torch.cat([packed[:3], packed])[3:]
    scale = torch.full((32,), 0.01)
    wide = torch.full((32, 48 + more), 7.0).to(fp8.E4M3)
    fp8.nf4_rows(packed, *rest, (32, 48), 64, scale, out=wide[:, at : at + 48])
    with launch.interpreting(False):
        want = fp8.nf4_rows(packed, *rest, (32, 48), 64, scale)
    assert torch.equal(bits(wide[:, at : at + 48]), bits(want))
    assert (wide[:, :at].float() == 7).all() and (wide[:, at + 48 :].float() == 7).all()


def test_programs_in_any_order():
    parts = packed_parts((80, 144), 64, True, 3)
    x = values(5, 70, 1, torch.bfloat16)
    found = []
    for reverse in (False, True):
        with shim.checking(race=True, reverse=reverse):
            codes = fp8.nf4_rows(*parts, (80, 144), 64, torch.full((144,), 0.01), transposed=True)
            found.append((bits(codes), bits(fp8.cast_rows(x).codes)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@given(m=st.integers(1, 9), n=st.integers(1, 30), k=st.integers(1, 90), seed=SEEDS)
def test_product(m, n, k, seed):
    a, b = (fp8.cast_rows(values(r, k, seed + r, torch.float32)) for r in (m, n))
    wide_a, wide_b = (r.codes.double() * r.scale.double()[:, None] for r in (a, b))
    eager = wide_a.float() @ wide_b.float().mT
    assert_rows(fp8.product(a, b, torch.float32), eager, wide_a @ wide_b.mT)
    assert fp8.product(a, b, torch.bfloat16).dtype == torch.bfloat16


def test_under_transforms():
    x = values(6, 48, 2, torch.float32).view(2, 3, 48)
    codes, scale = torch.vmap(lambda rows: tuple(fp8.cast_rows(rows)))(x)
    want = fp8.cast_rows_reference([x.view(6, 48)])
    assert torch.equal(bits(codes).view(6, 48), bits(want.codes))
    assert torch.equal(scale.view(6), want.scale)


def test_bad_input(monkeypatch):
    x = values(2, 32, 0, torch.float32)
    for bad in (x.double(), x[0], x.int(), [x, x[:1]], [x, x.half()], x[:, :0], []):
        with pytest.raises(KernelError, match="side by side"):
            fp8.cast_rows(bad)
    parts = packed_parts((16, 32), 64, True, 0)
    scale = torch.ones(16)
    with pytest.raises(KernelError, match="multiples of 16"):
        fp8.nf4_rows(*parts, (8, 64), 64, scale)
    with pytest.raises(KernelError, match=r"expected float32 \[32\]"):
        fp8.nf4_rows(*parts, (16, 32), 64, scale, transposed=True)
    with pytest.raises(KernelError, match="unit stride"):
        fp8.nf4_rows(*parts, (16, 32), 64, scale, out=torch.empty(32, 16).to(fp8.E4M3).mT)
    with pytest.raises(KernelError, match="packed is"):
        fp8.nf4_rows(*parts, (32, 32), 64, torch.ones(32))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(KernelError, match=r"capability 8\.0: they need 8\.9"):
        fp8.check_device(torch.device("cuda", 0))
