"""NF4 and FP4 leaves: bitsandbytes' bytes, its error table, pytree behaviour, typed errors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from purelm.errors import KernelError
from purelm.kernels import codebook
from purelm.quant.nf4 import NF4, dequantize, nbytes, quantize

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
BLOCKS = [32, 64, 128, 256, 512, 1024, 2048, 4096]
KINDS = st.sampled_from(["nf4", "fp4"])


@pytest.fixture(scope="module")
def bnb():
    functional = pytest.importorskip("bitsandbytes.functional")
    # Some of its plain-torch paths would be compiled, once a shape.
    with torch.compiler.set_stance("force_eager"):
        yield functional


def same_as_bnb(bnb, w, block, double, levels):
    leaf = quantize(w, block=block, double=double, kind=levels)
    packed, state = bnb.quantize_4bit(
        w, blocksize=block, quant_type=levels, compress_statistics=double
    )
    assert torch.equal(leaf.packed, packed.flatten())
    assert torch.equal(leaf.absmax, state.absmax)
    if double:
        assert torch.equal(leaf.absmax_scale, state.state2.absmax)
        assert torch.equal(leaf.absmax_offset, state.offset)
    return leaf, packed, state


def test_tables(bnb):
    assert torch.equal(codebook.dynamic_map(), bnb.create_dynamic_map())
    assert torch.equal(codebook.nf4_levels(), bnb.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(codebook.levels_of("fp4"), bnb.get_4bit_type("fp4", device="cpu"))


@given(
    shape=st.one_of(
        st.tuples(st.integers(1, 5000)), st.tuples(st.integers(1, 40), st.integers(1, 150))
    ),
    block=st.sampled_from(BLOCKS),
    dtype=st.sampled_from(FLOATS),
    double=st.booleans(),
    kind=st.sampled_from(["normal", "heavy", "zeros", "denormal", "spike", "tiny"]),
    seed=st.integers(0, 2**31),
    levels=KINDS,
)
def test_bytes_of_bitsandbytes(bnb, shape, block, dtype, double, kind, seed, levels):
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=g)
    if kind == "heavy":
        w = w / torch.rand(shape, generator=g).clamp(min=1e-3)
    elif kind == "zeros":
        w = torch.where(torch.rand(shape, generator=g) < 0.95, 0.0, w)
    elif kind == "denormal" and not double:
        # The 8-bit step of a denormal maximum is undefined in C.
        w = w * 1e-40
    elif kind == "spike":
        w.view(-1)[seed % w.numel()] = 1e4
    elif kind == "tiny":
        w = w * 1e-3
    leaf, packed, state = same_as_bnb(bnb, w.to(dtype), block, double, levels)
    if len(shape) == 2 and shape[1] < block:
        # Its vectorised CPU path reads the wrong maximum where a row is shorter than a block.
        return
    want = bnb.dequantize_4bit(packed, state).view(shape)
    assert torch.equal(dequantize(leaf), want)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("scale", [1.0, 0.37, 3e-5, 811.0, 1e-30])
def test_bytes_near_thresholds(bnb, scale, kind):
    mids = codebook.thresholds_of(kind) * scale
    near = [mids]
    for direction in (float("inf"), float("-inf")):
        at = mids
        for _ in range(4):
            at = torch.nextafter(at, torch.full_like(at, direction))
            near.append(at)
    rows = torch.nn.functional.pad(torch.stack(near), (1, 48))
    rows[:, 0] = scale
    same_as_bnb(bnb, rows, 64, False, kind)


@pytest.mark.parametrize("double", [False, True])
def test_more_weights_than_the_reference_takes_at_once(bnb, double, monkeypatch):
    w = torch.randn(40_001, generator=torch.Generator().manual_seed(0))
    whole = quantize(w, block=128, double=double)
    values = dequantize(whole)
    monkeypatch.setattr("purelm.kernels.nf4.REFERENCE_CHUNK", 8192)
    pieces = quantize(w, block=128, double=double)
    assert all(torch.equal(a, b) for a, b in zip(whole.tensors, pieces.tensors, strict=True))
    assert torch.equal(dequantize(pieces), values)


# block size, mean absolute error, its standard deviation over draws, the same for the relative
# error: bitsandbytes' published figures for 1024 x 1024 normal weights.
ERRORS = [
    (32, 0.067746, 0.000069, 0.189726, 0.000304),
    (64, 0.072798, 0.000074, 0.203339, 0.000340),
    (128, 0.076831, 0.000091, 0.215237, 0.000391),
    (256, 0.080337, 0.000102, 0.226105, 0.000398),
    (512, 0.083547, 0.000143, 0.236079, 0.000544),
    (1024, 0.086610, 0.000187, 0.245370, 0.000600),
    (2048, 0.089592, 0.000251, 0.254163, 0.000747),
    (4096, 0.092547, 0.000360, 0.262473, 0.000999),
]


@pytest.mark.parametrize(("block", "absolute", "sd_a", "relative", "sd_r"), ERRORS)
def test_error_table(block, absolute, sd_a, relative, sd_r):
    w = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(block))
    for double in (False, True):
        error = (dequantize(quantize(w, block=block, double=double)) - w).abs()
        # Double quantization moves an absmax by under a hundredth.
        slack = 1.01 if double else 1.0
        assert error.mean() <= (absolute + 7 * sd_a) * slack
        assert (error / w.abs().clamp(min=1e-8)).mean() <= (relative + 7 * sd_r) * slack


@given(
    count=st.integers(1, 3000),
    block=st.sampled_from(BLOCKS),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 2**31),
)
def test_round_trip_is_idempotent_and_bounded(count, block, dtype, seed):
    w = torch.randn(count, generator=torch.Generator().manual_seed(seed)).to(dtype)
    leaf = quantize(w, block=block, double=False)
    back = dequantize(leaf, torch.float32)
    again = quantize(back, block=block, double=False)
    assert torch.equal(dequantize(again), back)
    # Half the widest gap between levels, times the block's maximum.
    bound = leaf.absmax.repeat_interleave(block)[:count] * ((1.0 - 0.6961928) / 2 + 1e-6)
    assert bool(((back - w.float()).abs() <= bound).all())


def test_kind_goes_with_the_leaf():
    w = torch.randn(6, 10)
    leaf = quantize(w, kind="fp4")
    parts, structure = torch.utils._pytree.tree_flatten(leaf)
    assert torch.utils._pytree.tree_unflatten(parts, structure).kind == "fp4"
    assert leaf.to("cpu").kind == "fp4" and quantize(w).kind == "nf4"
    assert structure != torch.utils._pytree.tree_structure(quantize(w))
    assert not torch.equal(dequantize(leaf), dequantize(quantize(w)))


def test_leaf_is_a_pytree_node():
    pytree = torch.utils._pytree
    for double in (False, True):
        leaf = quantize(torch.randn(6, 10), double=double)
        leaves, spec = pytree.tree_flatten({"w": leaf})
        assert len(leaves) == (4 if double else 2)
        back = pytree.tree_unflatten(leaves, spec)["w"]
        assert isinstance(back, NF4) and back.shape == (6, 10) and back.dtype == torch.float32
        assert torch.equal(dequantize(back), dequantize(leaf))
        other = quantize(torch.randn(6, 10), double=double)
        assert pytree.tree_structure(other) == pytree.tree_structure(leaf)


def test_nbytes():
    w = torch.randn(256, 512)
    assert nbytes(quantize(w, double=False)) == w.numel() // 2 + w.numel() // 64 * 4
    assert nbytes(quantize(w)) == w.numel() // 2 + w.numel() // 64 + w.numel() // 64 // 256 * 4 + 4


def test_dequantize_into_a_buffer():
    leaf = quantize(torch.randn(6, 10))
    out = torch.empty(6, 10, dtype=torch.bfloat16)
    assert dequantize(leaf, out=out) is not None
    assert torch.equal(out, dequantize(leaf, torch.bfloat16))
    with pytest.raises(KernelError, match="out has shape"):
        dequantize(leaf, out=torch.empty(10, 6))


def test_input_is_not_changed_and_strides_are_respected():
    w = torch.randn(30, 20)
    before = w.clone()
    assert torch.equal(quantize(w.t()).packed, quantize(w.t().contiguous()).packed)
    assert torch.equal(w, before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("double", [False, True])
def test_non_finite_weights_are_named(bad, double):
    w = torch.randn(7, 33)
    w[3, 5] = w[6, 32] = bad
    with pytest.raises(KernelError, match=r"'layers\.0\.up'.*2 of 231 values are NaN or infinite"):
        quantize(w, double=double, name="layers.0.up")


def test_what_cannot_be_quantized():
    for w in (
        torch.ones(4, dtype=torch.int64),
        torch.ones(0),
        torch.ones(4, dtype=torch.complex64),
    ):
        with pytest.raises(KernelError):
            quantize(w)
    with pytest.raises(KernelError, match="block size 48"):
        quantize(torch.ones(64), block=48)
    with pytest.raises(TypeError):
        quantize(torch.ones(64), blocksize=64)
