"""What is counted for a mixture of experts, beside the bytes that its backward really takes."""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from live_bytes import LiveBytes

from purelm.kernels.gated import gated_reference
from purelm.nn import (
    activation,
    dispatch,
    expert_products,
    experts,
    fast_experts,
    lora,
    params,
    stacks,
    tree,
)
from purelm.nn.mlp_memory import fast_mixture_bytes, mixture_bytes
from purelm.nn.plan import GIB, plan
from purelm.nn.remat import remat
from purelm.nn.residuals import KEEP, OFFLOAD, RECOMPUTE, Policy
from purelm.nn.spec import AttentionSpec, LayerSpec, MLPSpec, ModelSpec, MoESpec, NormSpec, RopeSpec
from purelm.nn.step_memory import peak, residual_bytes
from purelm.nn.step_shape import Shape
from purelm.quant import grouped, nf4

TOKENS, RANK = 512, 4
SPECS = {
    "narrow": (128, MoESpec(8, 2, MLPSpec(64))),
    "wide": (64, MoESpec(8, 2, MLPSpec(256))),
    "shared": (64, MoESpec(8, 4, MLPSpec(64), shared=MLPSpec(512))),
    "weighed": (128, MoESpec(8, 1, MLPSpec(64), router="top_sigmoid", weigh_inputs=True)),
    "plain": (64, MoESpec(8, 2, MLPSpec(128, "gelu", gated=False))),
}


def of_model(dim: int, moe: MoESpec, layers: int = 1, heads: Any = (1, 1, 16)) -> ModelSpec:
    norm = NormSpec(1e-6)
    attention = AttentionSpec(*heads, heads[2] ** -0.5, RopeSpec(heads[2], 1e6))
    return ModelSpec(1000, dim, (LayerSpec(norm, attention, moe),) * layers, norm, 4096)


@contextmanager
def one_launch(live: LiveBytes) -> Iterator[None]:
    """As on a GPU: all experts in one launch a projection, whose insides take no memory."""

    class Gated(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, gate: Any, up: Any, kind: str) -> Any:
            ctx.save_for_backward(gate, up)
            ctx.kind = kind
            return live.as_kernel(gated_reference)(gate, up, kind)

        @staticmethod
        def backward(ctx: Any, dh: Any) -> Any:
            def pulled(gate: Any, up: Any) -> Any:
                with torch.enable_grad():
                    pair = [t.detach().requires_grad_() for t in (gate, up)]
                    return torch.autograd.grad(gated_reference(*pair, ctx.kind), pair, dh)

            return (*live.as_kernel(pulled)(*ctx.saved_tensors), None)

    def pulled_in_place(dh: Any, gate: Any, up: Any, kind: str, *, spend: bool) -> Any:
        with live.hidden():
            pair = [t.detach().requires_grad_() for t in (gate, up)]
            with torch.enable_grad():
                h = gated_reference(*pair, kind)
            dgate, dup = torch.autograd.grad(h, pair, dh)
            dh.copy_(h.detach())
        if spend:
            return dh, gate.copy_(dgate), up.copy_(dup)
        live.note([dgate, dup])
        return dh, dgate, dup

    with ExitStack() as stack:
        for name in ("matmul", "matmul_nf4", "outer"):
            kernel = live.as_kernel(getattr(grouped.kernel, name))
            stack.enter_context(mock.patch.object(grouped.kernel, name, kernel))
        stack.enter_context(mock.patch.object(activation, "gated_pull", pulled_in_place))
        for module, name in (
            (expert_products, "matmul"),
            (expert_products, "outer"),
            (fast_experts, "row_dots"),
            (fast_experts, "weighted_sum"),
            (dispatch, "weighted_sum"),
        ):
            stack.enter_context(
                mock.patch.object(module, name, live.as_kernel(getattr(module, name)))
            )
        stack.enter_context(mock.patch("purelm.nn.activation.gated", Gated.apply))
        yield


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("how", ["keep", "recompute", "autograd", "one_by_one"])
@pytest.mark.parametrize("name", SPECS)
def test_a_mixture_takes_what_is_counted(name: str, how: str, dtype: torch.dtype) -> None:
    dim, moe = SPECS[name]
    one_by_one = how == "one_by_one"
    generator = torch.Generator().manual_seed(0)
    spec = of_model(dim, moe)
    p = params.init(spec, generator=generator, dtype=dtype)["layers"][0]["mlp"]
    p["experts"] = stacks.joined(tree.map(nf4.quantize, stacks.apart(p["experts"])))
    targets = ("gate", "up", "down")
    adapters = lora.init(spec, rank=RANK, generator=generator, targets=targets)["layers"][0]["mlp"]
    leaves = [t.requires_grad_() for t in tree.tensors(adapters)]
    x = torch.randn(1, TOKENS, dim, generator=generator).to(dtype).requires_grad_()
    live = LiveBytes()
    policy = RECOMPUTE if how == "recompute" else KEEP
    shape = Shape(1, TOKENS, dtype.itemsize, offload=not one_by_one, ranks=3 * RANK * moe.active)
    function = fast_experts.FastExperts(moe, policy)
    residuals = function.forward(x.detach(), p, adapters, None)[1]
    live.know(residuals)
    with ExitStack() as stack:
        if one_by_one:
            said = mock.patch.object(experts, "waits_for", lambda *_: "to be measured")
            stack.enter_context(said)
        else:
            stack.enter_context(one_launch(live))
        if how in ("one_by_one", "autograd"):
            shape = replace(shape, one_by_one=one_by_one, ranks=3 * RANK)
            counted = mixture_bytes(moe, dim, shape)
            y = remat(lambda x, p, own: experts.moe(x, p, own, moe))(x, p, adapters)
            live.now = live.most = 0  # y is there before
            with live:
                torch.autograd.grad(y, [x, *leaves], torch.ones_like(y))
        else:
            counted = fast_mixture_bytes(moe, dim, shape, policy)
            dy = torch.ones_like(x)
            with torch.no_grad(), live:
                _held = function.backward(dy, x.detach(), residuals, p, adapters, None, True)
    # Beside it a layer counts the gradients of what is trained, and hidden states.
    counted += sum(t.nbytes for t in leaves) + 2 * x.nbytes
    # Measured, and the same each time: 0.98 to 1.23 times what is taken by autograd in one launch,
    # 0.92 to 1.09 one by one and by hand, since in some shapes moments that are counted at once
    # follow each other, and some small tensors are not counted. The bands are these, with a little
    # room for other torches.
    low, high = (0.95, 1.25) if how == "autograd" else (0.9, 1.1)
    assert low * live.most < counted < high * live.most


@pytest.mark.parametrize(
    ("policy", "measured"),
    [(KEEP, 6.36), (RECOMPUTE, 4.23), (OFFLOAD, 3.82)],
    ids=["keep", "recompute", "offload"],
)
def test_a_mixture_of_the_measured_shape(policy: Policy, measured: float) -> None:
    """examples/measurements/grouped_h100.md: 8 rows of 2048; at the peak a layer's gradients."""
    spec = of_model(2048, MoESpec(128, 8, MLPSpec(768)), layers=4, heads=(32, 4, 128))
    weights = sum(math.prod(p.shape) for p in tree.leaves(params.param_specs(spec)["layers"]))
    adapted = 4 * 16 * (3 * 128 * (2048 + 768) + 2 * (2048 + 4096) + 2 * (2048 + 512))
    fixed = int(weights * (0.5 + 1 / 64)) + 2 * 2 * 1000 * 2048 + 4 * adapted
    shape = Shape(8, 2048, 2, ranks=16 * (4 + 3 * 8), gradients=adapted)
    planned = peak(spec, shape, (policy,) * 4, fixed) / GIB
    assert 0.95 * measured < planned < 1.1 * measured


def test_what_is_said_of_mixtures() -> None:
    """Tiles are of dense MLPs; and experts that run one by one keep no residuals."""
    moe = MoESpec(128, 8, MLPSpec(768))
    spec = of_model(2048, moe, layers=2)
    shape = Shape(8, 2048, 2)
    found = plan(spec, shape, budget=2**60, fixed=0)
    assert "layers 0-1: all kept" in str(found) and "run again" not in str(found)
    tiled = plan(spec, replace(shape, tile=512), budget=2**60, fixed=0)
    assert tiled.peak == found.peak
    waiting = plan(spec, replace(shape, one_by_one=True), budget=2**60, fixed=0)
    assert "layers 0-1: all kept, the MLP run again, for experts one after" in str(waiting)
    gate_up = shape.tokens * 8 * 2 * 768 * 2
    sizes = [
        residual_bytes(spec.layers[0], spec, s)["gate_up"]
        for s in (shape, replace(shape, one_by_one=True))
    ]
    assert sizes == [gate_up, 0]
    mixed = replace(spec, layers=(replace(spec.layers[0], mlp=MLPSpec(4096)), spec.layers[1]))
    text = str(plan(mixed, replace(shape, one_by_one=True), budget=2**60, fixed=0))
    assert "layer 0: all kept; layer 1: all kept, the MLP run again" in text


def test_products_in_fp8_take_their_casts() -> None:
    """examples/measurements/train_h100.md: 10.45 GiB for 10.01 in bf16, all kept, the input's cast
    left out.
    """
    attention = AttentionSpec(32, 8, 128, 128**-0.5, RopeSpec(128, 5e5))
    layer = LayerSpec(NormSpec(1e-5), attention, MLPSpec(14336))
    spec = ModelSpec(128256, 4096, (layer,) * 32, NormSpec(1e-5), 131072)
    shape = Shape(8, 2048, 2, ranks=112)
    more = peak(spec, replace(shape, fp8=True), (KEEP,) * 32, 0) - peak(
        spec, shape, (KEEP,) * 32, 0
    )
    # The gradients of gate and up, beside the hidden product, and the input; the codes of two
    # weights are fewer bytes than the two counted in bf16.
    assert more == shape.tokens * (2 * 14336 + 4096)


def test_gradients_are_counted_beside_what_is_there() -> None:
    spec = of_model(64, MoESpec(8, 2, MLPSpec(64)))
    plain = Shape(1, 128, 4, one_by_one=True)
    more = replace(plain, gradients=12345)
    assert peak(spec, more, (KEEP,), 0) - peak(spec, plain, (KEEP,), 0) == 12345
