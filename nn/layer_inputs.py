"""What a layer gets of each token beside the residual stream, and how a layer ends with it.

transformers' `Gemma4TextModel` (get_per_layer_inputs, project_per_layer_inputs) and the end of its
`Gemma4TextDecoderLayer`.
"""

from functools import partial

import torch

from ..kernels.gated import gated
from . import host_table, tree
from .linear import linear, seed_after
from .norm import norm
from .remat import remat
from .spec import LayerSpec, ModelSpec

# Dropout seeds of what is here lie apart from those of all other projections.
_SEEDS = 500_009


def every(
    params: tree.Tree,
    spec: ModelSpec,
    tokens: torch.Tensor,
    x: torch.Tensor,
    adapters: tree.Tree,
    seed: int | None = None,
) -> tuple[torch.Tensor | None, ...]:
    """Each layer's own input [b, s, p] for tokens [b, s] with embeddings x [b, s, e], or None."""
    how, depth = spec.inputs, len(spec.layers)
    if how is None:
        return (None,) * depth
    p, shape = params["inputs"], (*tokens.shape, depth, how.dim)
    scale = torch.tensor(how.dim**0.5, dtype=x.dtype).item()
    own = host_table.rows(p["table"]["weight"], tokens).view(shape) * scale
    adapter = tree.get(adapters, "inputs", "project")
    made = linear(x, p["project"], adapter, seed_after(seed, _SEEDS)) * spec.dim**-0.5
    both = (norm(made.view(shape), p["norm"], how.norm) + own) * 2.0**-0.5
    return tuple(both.unbind(2))


def ended_again(
    x: torch.Tensor,
    p: tree.Tree,
    adapters: tree.Tree,
    given: torch.Tensor | None,
    spec: LayerSpec,
    seed: int | None = None,
) -> torch.Tensor:
    """`ended`, of which nothing but x and `given` is kept for the backward pass."""
    end = partial(ended, spec=spec, seed=seed)
    return (end if given is None else remat(end))(x, p, adapters, given)


def ended(
    x: torch.Tensor,
    p: tree.Tree,
    adapters: tree.Tree,
    given: torch.Tensor | None,
    spec: LayerSpec,
    seed: int | None = None,
) -> torch.Tensor:
    """x [b, s, e] after the MLP -> the layer's output; given [b, s, p]: its own input."""
    if given is not None and spec.inputs is not None:
        own, worn = p["inputs"], tree.get(adapters, "inputs") or {}
        gate = linear(x, own["gate"], worn.get("gate"), seed_after(seed, _SEEDS + 1))
        gate = gated(gate, given, spec.inputs.activation)
        branch = linear(gate, own["out"], worn.get("out"), seed_after(seed, _SEEDS + 2))
        x = x + norm(branch, own["norm"], spec.inputs.norm)
    return x * p["scale"] if spec.scaled else x
