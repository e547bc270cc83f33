"""Small models in fp64, of attention alone and of every mixer that stands beside or for it."""

from dataclasses import replace
from typing import Any

import torch

from purelm.nn import params
from purelm.nn import tree as trees
from purelm.nn.spec import (
    AttentionSpec,
    DeltaNetSpec,
    LatentSpec,
    LayerInputSpec,
    LayerSpec,
    Mamba2Spec,
    MLPSpec,
    ModelSpec,
    NormSpec,
    RecurrentSpec,
    RopeSpec,
    ShortConvSpec,
)

UNWEIGHTED = NormSpec(1e-5, weight=False)
# Kind of layer: what is particular about its attention, and the mixer beside or for it.
MIXERS: dict[str, tuple[dict[str, Any], RecurrentSpec | None]] = {
    "full": ({}, None),
    "window": ({"window": 4}, None),
    "chunk": ({"chunk": 3}, None),
    "keys as values": ({"keys_as_values": True, "v_norm": UNWEIGHTED}, None),
    "shared": ({"lends": True, "qk_norm": NormSpec(1e-5), "v_norm": UNWEIGHTED}, None),
    "latent": ({"latent": LatentSpec(16, 24, 10, NormSpec(1e-6)), "rope": RopeSpec(4, 1e4)}, None),
    "conv": ({}, ShortConvSpec(32, 3, bias=True)),
    "delta": ({"gated": True}, DeltaNetSpec(2, 4, 6, 5, 3, NormSpec(1e-5))),
    "delta by head": ({}, DeltaNetSpec(2, 6, 5, 4, 3, NormSpec(1e-5), by_key_head=True)),
    "mamba2": ({"window": 4}, Mamba2Spec(4, 8, 2, 5, 3, norm=NormSpec(1e-5))),
}


def small(kind: str) -> tuple[ModelSpec, Any]:
    """Two layers of attention, of which one may read the other's keys; or one with a recurrent
    mixer beside it, and one of that alone.
    """
    norm = NormSpec(1e-5)
    how, recurrent = MIXERS[kind]
    attention = replace(AttentionSpec(4, 2, 8, 8**-0.5, RopeSpec(8, 1e4)), **how)
    first = LayerSpec(norm, attention, MLPSpec(40), recurrent)
    layers = (first, first if recurrent is None else replace(first, attention=None))
    if attention.lends:
        first = replace(first, inputs=LayerInputSpec(6, 60, norm), scaled=True)
        reads = replace(attention, lends=False, kv_from=0)
        layers = (first, replace(first, attention=reads))
    spec = ModelSpec(50, 32, layers, norm, max_positions=2048, init_std=0.5)
    tree = params.init(spec, generator=torch.Generator().manual_seed(3))
    return spec, trees.map(torch.Tensor.double, tree)


def prompt(seed: int, rows: int, length: int) -> torch.Tensor:
    return torch.randint(1, 50, (rows, length), generator=torch.Generator().manual_seed(seed))
