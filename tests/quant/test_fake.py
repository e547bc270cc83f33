"""Fake quantization: torchao's values where it is installed, formats that are kept, gradients."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from purelm.errors import KernelError
from purelm.quant import fake
from purelm.quant.fake import SCHEMES, Fake

LEVELS = {"int4": (128, 16), "int8": (None, 256), "int8-int4": (32, 16), "fp8-int4": (128, 16)}


def drawn(rows: int, columns: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    wide = torch.randn(rows, columns, generator=g) * torch.rand(rows, 1, generator=g).exp()
    return wide.to(dtype)


def torchaos(scheme: str):
    """(activations' quantizer, weights' quantizer) of torchao's own configuration."""
    pytest.importorskip("torchao")
    from torchao import quantization as ao
    from torchao.quantization.granularity import PerAxis, PerGroup, PerRow
    from torchao.quantization.qat.fake_quantize_config import _infer_fake_quantize_configs
    from torchao.quantization.qat.fake_quantizer import FakeQuantizerBase

    config = {
        "int4": lambda: ao.Int4WeightOnlyConfig(group_size=128),
        "int8": lambda: ao.IntxWeightOnlyConfig(torch.int8, PerAxis(0)),
        "int8-int4": lambda: ao.Int8DynamicActivationIntxWeightConfig(
            torch.int4, PerGroup(32), intx_packing_format="unpacked_to_int8"
        ),
        "fp8-fp8": lambda: ao.Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()),
        "fp8-int4": lambda: ao.Float8DynamicActivationInt4WeightConfig(),
    }[scheme]()
    found = _infer_fake_quantize_configs(config)
    return [None if c is None else FakeQuantizerBase.from_config(c) for c in found]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_torchaos_values(scheme: str, dtype: torch.dtype) -> None:
    activation, weight = torchaos(scheme)
    w, x = drawn(24, 256, 1, dtype), drawn(7, 256, 2, dtype)
    assert torch.equal(fake.weight_of(Fake(w, scheme)), weight(w))
    ours = SCHEMES[scheme].activation
    assert (ours is None) == (activation is None)
    if ours is not None:
        assert torch.equal(ours(x), activation(x))


@given(
    st.sampled_from(sorted(SCHEMES)),
    st.integers(1, 5),
    st.integers(1, 3),
    st.integers(0, 999),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_weights_lie_on_the_formats_grid(scheme, rows, blocks, seed, dtype) -> None:
    w = drawn(rows, 128 * blocks, seed, dtype)
    rounded = fake.weight_of(Fake(w, scheme))
    assert rounded.dtype == dtype and rounded.shape == w.shape
    if scheme in LEVELS:
        group, levels = LEVELS[scheme]
        groups = rounded if group is None else rounded.unflatten(-1, (-1, group))
        assert all(len(one.unique()) <= levels for one in groups.reshape(-1, groups.shape[-1]))
    largest = w.abs().amax(-1, keepdim=True).float()
    step = {"int8": 1 / 127, "fp8-fp8": 1 / 16}.get(scheme, 1 / 7)
    assert ((rounded.float() - w.float()).abs() <= 1.1 * step * largest).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_hard_values(scheme: str, dtype: torch.dtype) -> None:
    zeros = torch.zeros(2, 128, dtype=dtype)
    assert torch.equal(fake.weight_of(Fake(zeros, scheme)), zeros)
    spike = torch.zeros(1, 128, dtype=dtype)
    spike[0, 5] = 1e4
    assert fake.weight_of(Fake(spike, scheme)).isfinite().all()
    x = torch.zeros(3, 128, dtype=dtype)
    assert torch.equal(fake.linear(x, Fake(zeros, scheme)), torch.zeros(3, 2, dtype=dtype))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients_pass_straight_through(scheme: str) -> None:
    w, x = drawn(6, 128, 3).requires_grad_(), drawn(4, 128, 4).requires_grad_()
    dy = drawn(4, 6, 5)
    y = fake.linear(x, Fake(w, scheme), torch.zeros(6))
    dx, dw = torch.autograd.grad(y, (x, w), dy)
    activation = SCHEMES[scheme].activation or (lambda t: t)
    rounded_w, rounded_x = fake.weight_of(Fake(w.detach(), scheme)), activation(x.detach())
    assert torch.equal(y.detach(), torch.nn.functional.linear(rounded_x, rounded_w, torch.zeros(6)))
    torch.testing.assert_close(dx, dy @ rounded_w)
    torch.testing.assert_close(dw, dy.mT @ rounded_x)


def test_bad_input() -> None:
    with pytest.raises(KernelError, match="expected one of int4"):
        fake.check((4, 128), "int3", "q")
    with pytest.raises(KernelError, match="groups of 128 columns, and 64"):
        fake.check((4, 64), "int4", "q")
    fake.check((4, 64), "int8", "q")
