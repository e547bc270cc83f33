"""The MLP of a layer."""

import torch

from . import tree
from .activation import activated, inputs
from .linear import linear, project, seed_after
from .spec import MLPSpec


def mlp(
    x: torch.Tensor, p: tree.Tree, adapters: tree.Tree, spec: MLPSpec, seed: int | None = None
) -> torch.Tensor:
    """Normalised x [..., e] -> [..., e]."""
    get = (adapters or {}).get
    names = inputs(spec)
    parts = project(x, [p[n] for n in names], [get(n) for n in names], seed)
    if spec.gate_scale != 1.0:
        gate, *rest = parts
        parts = gate * spec.gate_scale, *rest
    hidden = activated(parts, spec, p)
    out = linear(hidden, p["down"], get("down"), seed_after(seed, 2))
    return out if spec.down_scale == 1.0 else out * spec.down_scale
