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
    LayerInputSpec,
    LayerSpec,
    MLPSpec,
    ModelSpec,
    MoESpec,
    NormSpec,
    RopeSpec,
)
from purelm.quant.nf4 import NF4, dequantize, quantize

NORM = NormSpec(1e-5)
GEMMA = NormSpec(1e-6, offset=1.0, cast_first=False)
UNWEIGHTED = NormSpec(1e-5, weight=False)
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
    "norms after": replace(
        LAYER,
        norm=GEMMA,
        attention=replace(ATTENTION, qk_norm=GEMMA, softcap=20.0, window=2),
        mlp=MLPSpec(64, "gelu_tanh"),
        post_norm=True,
    ),
    "norms after alone": replace(LAYER, pre_norm=False, post_norm=True, residual_scale=0.5),
    "shared": replace(
        LAYER,
        attention=replace(
            ATTENTION, qk_norm=NORM, v_norm=UNWEIGHTED, keys_as_values=True, lends=True
        ),
        inputs=LayerInputSpec(16, 32, NORM),
        scaled=True,
    ),
    "a mixture": replace(LAYER, mlp=MoESpec(4, 2, MLPSpec(64))),
    "clipped": replace(LAYER, attention=replace(ATTENTION, clip=1.0)),
}
# Which halves are fused, where not both of all layers.
HALVES = {"a mixture": (True, False), "clipped": (False, True)}


@pytest.fixture
def interpreted():
    pytest.importorskip("triton")
    shim.install()
    with launch.interpreting(), shim.checking(race=True):
        yield


def model(layer: LayerSpec, seed: int) -> tuple[ModelSpec, Any]:
    """One layer, and one that reads its keys where it lends them."""
    layers = (layer,)
    if layer.attention is not None and layer.attention.lends:
        reads = replace(layer.attention, lends=False, kv_from=0)
        layers = (layer, replace(layer, attention=reads))
    spec = ModelSpec(32, 64, layers, NORM, 64, init_std=0.1)
    g = torch.Generator().manual_seed(seed)
    made = params.init(spec, generator=g, dtype=torch.bfloat16)

    def spread(path: str, x: torch.Tensor, may: bool) -> Any:
        drawn = torch.randn(x.shape, generator=g).to(x.dtype)
        if path.startswith("layers") and may and "experts" not in path:
            return quantize(x)
        if path.endswith("bias"):
            return drawn
        return x + drawn * 0.2 if "norm" in path else x

    may = tree.map(lambda p: p.quantize, params.param_specs(spec))
    return spec, tree.map_with_path(lambda path, x: spread(path, x, tree.at(may, path)), made)


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


RANKS = {"biases": 4, "norms after": 4, "shared": 4}


@pytest.mark.parametrize(
    ("kind", "rank"),
    [
        pytest.param(kind, RANKS.get(kind, 0), marks=[] if kind in RANKS else pytest.mark.full)
        for kind in PLAIN
    ],
)
def test_steps_are_those_of_the_general_layer(interpreted, monkeypatch, kind, rank):
    spec, made = model(PLAIN[kind], 1)
    adapters = None
    if rank:
        g = torch.Generator().manual_seed(2)
        adapters = lora.init(spec, generator=g, rank=rank)
        adapters = tree.map_tensors(lambda x: torch.randn(x.shape, generator=g) * 0.1, adapters)
    called, fused = [], decode_layer.layer

    def noted(*args: Any, **more: Any) -> Any:
        called.append(args[-1])
        return fused(*args, **more)

    monkeypatch.setattr(decode_layer, "layer", noted)
    ours = steps_of(spec, made, adapters, torch.bfloat16)
    assert called == [HALVES.get(kind, (True, True))] * 2 * len(spec.layers)
    monkeypatch.setattr(decode_layer, "covers", lambda *_: decode_layer.Fused(False, False))
    general = steps_of(spec, made, adapters, torch.bfloat16)
    assert len(called) == 2 * len(spec.layers)
    exact = steps_of(
        spec,
        tree.map(wide, made),
        None if adapters is None else tree.map_tensors(wide, adapters),
        torch.float64,
    )
    assert_rows(ours, general, exact)


@pytest.mark.parametrize(
    ("change", "left"),
    [
        ({"parallel": True}, (False, False)),
        ({"mlp": MLPSpec(64, gated=False)}, (True, False)),
        ({"mlp": MLPSpec(64, down_scale=2.0)}, (True, False)),
        *(
            ({"attention": replace(ATTENTION, **change)}, (False, True))
            for change in (
                {"rope": None},
                {"clip": 1.0},
                {"qk_norm": NORM, "qk_norm_over": "width"},
                {"qk_norm": NORM, "qk_norm_after": True},
                {"qk_norm": NormSpec(1e-5, kind="layer")},
                {"out_scale": 2.0},
                {"gated": True},
            )
        ),
    ],
)
def test_what_it_leaves_to_the_general_layer(interpreted, change, left):
    spec, made = model(LAYER, 1)
    x, p = torch.zeros(2, 64, dtype=torch.bfloat16), made["layers"][0]
    table = steps.rope.table(ATTENTION.rope, torch.zeros(2, 1, dtype=torch.int64))
    with torch.inference_mode():
        assert decode_layer.covers(x, p, None, table, LAYER) == (True, True)
        assert decode_layer.covers(x, p, None, table, replace(LAYER, **change)) == left
        assert decode_layer.covers(x, p, None, None, LAYER) == (False, True)
        assert not any(decode_layer.covers(x.float(), p, None, table, LAYER))
        mixed = {**p, "mlp": {**p["mlp"], "up": {"weight": torch.zeros(64, 64)}}}
        assert decode_layer.covers(x, mixed, None, table, LAYER) == (True, False)
    assert not any(decode_layer.covers(x, p, None, table, LAYER))  # a graph may be built
