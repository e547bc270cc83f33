"""What stands between an MLP's projections."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..kernels.clamped import clamped
from ..kernels.fp8 import Rows, cast_rows
from ..kernels.fp8_made import gated_pull_rows, gated_rows
from ..kernels.gated import gated, gated_pull
from . import tree
from .spec import XIELU_BETA, XIELU_EPS, Activation, MLPSpec


def inputs(spec: MLPSpec) -> tuple[str, ...]:
    """The projections that read the MLP's input."""
    return ("gate", "up") if spec.gated else ("up",)


def activated(parts: Sequence[torch.Tensor], spec: MLPSpec, p: tree.Tree) -> torch.Tensor:
    """The outputs of `inputs`, each [..., f] -> the input [..., f] of `down`; `p` is the MLP's."""
    if spec.gated:
        gate, up = parts
        if spec.activation == "clamped":
            return clamped(gate, up, spec.alpha, spec.limit)
        return gated(gate, up, spec.activation)
    (up,) = parts
    if spec.activation == "xielu":
        return xielu(up, p["act"]["alpha_p"], p["act"]["alpha_n"])
    return act(up, spec.activation)


def activated_rows(
    parts: Sequence[torch.Tensor], spec: MLPSpec, p: tree.Tree
) -> tuple[torch.Tensor, Rows]:
    """`activated`, and its rows in e4m3: of a kernel that makes both, where there is one."""
    if spec.gated and spec.activation != "clamped":
        gate, up = parts
        return gated_rows(gate, up, spec.activation)
    hidden = activated(parts, spec, p)
    return hidden, cast_rows(hidden.flatten(0, -2))


def act(x: torch.Tensor, kind: Activation) -> torch.Tensor:
    """x through an activation that has no parameters."""
    if kind == "silu":
        return F.silu(x)
    if kind == "relu2":
        return F.relu(x).square()
    return F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")


def pull(
    dhidden: torch.Tensor,
    parts: Sequence[torch.Tensor],
    spec: MLPSpec,
    p: tree.Tree,
    *,
    spend: bool = False,
) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
    """The backward of `activated`, with what it made: (hidden [..., f], gradients of the parts).

    dhidden's memory is used up; with `spend` that of the parts too, where a kernel can.
    """
    if spec.gated and spec.activation != "clamped":
        gate, up = parts
        hidden, *grads = gated_pull(dhidden, gate, up, spec.activation, spend=spend)
        return hidden, grads
    with torch.enable_grad():
        parts = [t.detach().requires_grad_() for t in parts]
        hidden = activated(parts, spec, p)
    return hidden.detach(), torch.autograd.grad(hidden, parts, dhidden)


def pull_rows(
    dhidden: torch.Tensor,
    parts: Sequence[torch.Tensor],
    spec: MLPSpec,
    p: tree.Tree,
    *,
    spend: bool = False,
) -> tuple[torch.Tensor, Sequence[torch.Tensor], Rows]:
    """`pull`, and the rows of the parts' gradients, side by side, in e4m3."""
    if spec.gated and spec.activation != "clamped":
        gate, up = parts
        hidden, *grads, rows = gated_pull_rows(dhidden, gate, up, spec.activation, spend=spend)
        return hidden, grads, rows
    hidden, found = pull(dhidden, parts, spec, p, spend=spend)
    return hidden, found, cast_rows([grad.flatten(0, -2) for grad in found])


def xielu(x: torch.Tensor, alpha_p: torch.Tensor, alpha_n: torch.Tensor) -> torch.Tensor:
    """x [..., f] through the integral of an expanded ELU (arXiv 2411.13010); the alphas are [1].

    a_p x^2 + beta x above 0, a_n (expm1(min(x, eps)) - x) + beta x below it, with
    a_p = softplus(alpha_p) and a_n = beta + softplus(alpha_n).
    """
    above, below = F.softplus(alpha_p), XIELU_BETA + F.softplus(alpha_n)
    curved = torch.where(x > 0, above * x * x, (torch.expm1(x.clamp(max=XIELU_EPS)) - x) * below)
    return curved + XIELU_BETA * x
