"""The MLP of a layer."""

from typing import Any

import torch

from . import tree
from .activation import activated, inputs
from .linear import linear, project, scaled, seed_after
from .remat import remat
from .spec import MLPSpec

# Tiles drop features apart from one another.
TILE_SEEDS = 1_000_003


def mlp(
    x: torch.Tensor,
    p: tree.Tree,
    adapters: tree.Tree,
    spec: MLPSpec,
    seed: int | None = None,
    tile: int | None = None,
) -> torch.Tensor:
    """Normalised x [..., e] -> [..., e]; where there are more, `tile` tokens at a time, of which
    nothing but their input is kept for the backward pass.
    """
    if tile is not None and x.numel() > tile * x.shape[-1]:
        return _in_tiles(x, p, adapters, spec, seed, tile)
    get = (adapters or {}).get
    names = inputs(spec)
    parts = project(x, [p[n] for n in names], [get(n) for n in names], seed)
    first, *rest = parts
    hidden = activated([scaled(first, spec.gate_scale), *rest], spec, p)
    out = linear(hidden, p["down"], get("down"), seed_after(seed, 2))
    return scaled(out, spec.down_scale)


def _in_tiles(
    x: torch.Tensor, p: tree.Tree, adapters: tree.Tree, spec: MLPSpec, seed: int | None, tile: int
) -> torch.Tensor:
    rows = x.reshape(-1, x.shape[-1])
    made = []
    for i, part in enumerate(torch.split(rows, tile)):
        own = seed_after(seed, TILE_SEEDS * i)

        def run(part: Any, p: Any, adapters: Any, own: int | None = own) -> torch.Tensor:
            return mlp(part, p, adapters, spec, own)

        made.append(remat(run)(part, p, adapters))
    return torch.cat(made).view(x.shape)
