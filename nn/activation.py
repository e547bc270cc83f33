"""What stands between an MLP's projections."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..kernels.gated import gated
from .spec import MLPSpec


def inputs(spec: MLPSpec) -> tuple[str, ...]:
    """The projections that read the MLP's input."""
    return ("gate", "up") if spec.gated else ("up",)


def activated(parts: Sequence[torch.Tensor], spec: MLPSpec) -> torch.Tensor:
    """The outputs of `inputs`, each [..., f] -> the input [..., f] of `down`."""
    if spec.gated:
        gate, up = parts
        return gated(gate, up, spec.activation)
    (up,) = parts
    if spec.activation == "silu":
        return F.silu(up)
    if spec.activation == "relu2":
        return F.relu(up).square()
    return F.gelu(up, approximate="tanh" if spec.activation == "gelu_tanh" else "none")
