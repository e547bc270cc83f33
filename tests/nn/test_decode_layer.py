"""A decoding step's fused layer, under the interpreter, against the general one and float64."""

from dataclasses import replace
from typing import Any

import pytest
import shim
import torch
from oracles import assert_rows

from purelm.kernels import launch
from purelm.nn import cache as kv
from purelm.nn import decode as steps
from purelm.nn import decode_layer, lora, params, tree
from purelm.nn.spec import (
    AttentionSpec,
    LayerSpec,
    MLPSpec,
    ModelSpec,
    NormSpec,
    RopeSpec,
)
from purelm.quant.nf4 import NF4, dequantize, quantize

NORM = NormSpec(1e-5)
ATTENTION = AttentionSpec(4, 2, 16, 0.25, RopeSpec(16, 1e4))
LAYER = LayerSpec(NORM, ATTENTION, MLPSpec(64))

PLAIN = {
    "llama": LAYER,
    "biases": replace(
        LAYER,
        attention=replace(ATTENTION, qkv_bias=True, out_bias=True),
        mlp=MLPSpec(64, "gelu_tanh", bias=True),
        residual_scale=0.5,
    ),
    "head norms, window": replace(
        LAYER,
        attention=replace(
            ATTENTION,
            qk_norm=NormSpec(1e-6, offset=1.0, cast_first=False),
            window=3,
            softcap=20.0,
            rope=RopeSpec(8, 1e4, interleaved=True),
        ),
    ),
}


@pytest.fixture
def interpreted():
    pytest.importorskip("triton")
    shim.install()
    with launch.interpreting(), shim.checking(race=True):
        yield


def model(layer: LayerSpec, seed: int) -> tuple[ModelSpec, Any]:
    spec = ModelSpec(32, 64, (layer,), NORM, 64, init_std=0.1)
    made = params.init(spec, generator=torch.Generator().manual_seed(seed), dtype=torch.bfloat16)
    for p in made["layers"]:
        for part in ("attn", "mlp"):
            for name, own in p[part].items():
                if name in ("q", "k", "v", "o", "gate", "up", "down"):
                    own["weight"] = quantize(own["weight"])
                    if "bias" in own:
                        own["bias"] = torch.randn_like(own["bias"])
    return spec, made


def steps_of(
    spec: ModelSpec, made: Any, adapters: Any, dtype: torch.dtype, device: str = "cpu"
) -> torch.Tensor:
    """Logits of two steps after two prompts of different lengths."""
    g = torch.Generator().manual_seed(5)
    cache = kv.empty(spec, 3, 8, padded=False, dtype=dtype, device=device)
    for state in cache.layers:
        for x in state.values():
            x.copy_(torch.randn(x.shape, generator=g).bfloat16())
    cache.end.copy_(torch.tensor([3, 1, 2]))
    token = torch.tensor([7, 8, 9], device=device)
    found = []
    with torch.inference_mode():
        for i in range(2):
            logits, cache = steps.decode(made, spec, token + i, cache, adapters=adapters)
            found.append(logits)
    return torch.cat(found)


def wide(x: Any) -> Any:
    if isinstance(x, NF4):
        return dequantize(x, torch.float32).double()
    return x.double() if x.is_floating_point() else x


@pytest.mark.parametrize(("kind", "rank"), [("llama", 0), ("biases", 4), ("head norms, window", 0)])
def test_steps_are_those_of_the_general_layer(interpreted, monkeypatch, kind, rank):
    spec, made = model(PLAIN[kind], 1)
    adapters = None
    if rank:
        g = torch.Generator().manual_seed(2)
        adapters = lora.init(spec, generator=g, rank=rank)
        adapters = tree.map_tensors(lambda x: torch.randn(x.shape, generator=g) * 0.1, adapters)
    called, fused = [], decode_layer.layer
    monkeypatch.setattr(decode_layer, "layer", lambda *a: called.append(1) or fused(*a))
    ours = steps_of(spec, made, adapters, torch.bfloat16)
    assert len(called) == 2
    monkeypatch.setattr(decode_layer, "covers", lambda *_: False)
    general = steps_of(spec, made, adapters, torch.bfloat16)
    assert len(called) == 2
    exact = steps_of(
        spec,
        tree.map(wide, made),
        None if adapters is None else tree.map_tensors(wide, adapters),
        torch.float64,
    )
    assert_rows(ours, general, exact)


@pytest.mark.parametrize(
    "change",
    [
        {"post_norm": True},
        {"parallel": True},
        {"pre_norm": False},
        {"mlp": MLPSpec(64, gated=False)},
        {"mlp": MLPSpec(64, down_scale=2.0)},
        {"attention": replace(ATTENTION, rope=None)},
        {"attention": replace(ATTENTION, clip=1.0)},
        {"attention": replace(ATTENTION, qk_norm=NORM, qk_norm_over="width")},
        {"attention": replace(ATTENTION, qk_norm=NORM, qk_norm_after=True)},
        {"attention": replace(ATTENTION, qk_norm=NormSpec(1e-5, kind="layer"))},
        {"attention": replace(ATTENTION, out_scale=2.0)},
    ],
)
def test_what_it_leaves_to_the_general_layer(interpreted, change):
    spec, made = model(LAYER, 1)
    x, p = torch.zeros(2, 64, dtype=torch.bfloat16), made["layers"][0]
    table = steps.rope.table(ATTENTION.rope, torch.zeros(2, 1, dtype=torch.int64))
    with torch.inference_mode():
        assert decode_layer.covers(x, p, None, table, LAYER)
        assert not decode_layer.covers(x, p, None, table, replace(LAYER, **change))
        assert not decode_layer.covers(x.float(), p, None, table, LAYER)
        mixed = {**p, "mlp": {**p["mlp"], "up": {"weight": torch.zeros(64, 64)}}}
        assert not decode_layer.covers(x, mixed, None, table, LAYER)
    assert not decode_layer.covers(x, p, None, table, LAYER)  # a graph may be built
