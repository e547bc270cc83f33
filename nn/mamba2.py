"""The Mamba 2 mixer: a short convolution, then a state that each token decays and adds to."""

from collections.abc import Sequence
from functools import cache

import torch

from ..kernels import ssd_reference
from ..kernels.gated_norm import gated_norm
from ..kernels.ssd import rates, ssd
from ..kernels.state_step import ssd_step
from . import tree
from .short_conv import causal_conv, conv_state
from .spec import Mamba2Spec

State = dict[str, torch.Tensor]


def core(
    made: Sequence[torch.Tensor],
    p: tree.Tree,
    spec: Mamba2Spec,
    starts: torch.Tensor | None,
    state: State | None,
) -> torch.Tensor:
    """Dao and Gu, arXiv 2405.21060, sec. 7, as in transformers' `FalconH1Mixer` and
    `GraniteMoeHybridMambaLayer`; see `recurrent.core`. Steps, decays, states and sums are fp32.
    """
    (inner,) = made
    if any(scale != 1.0 for scale in spec.scales):
        inner = inner * _scales(spec, inner.dtype, inner.device)
    gate, mixed, dt = inner.split_with_sizes([spec.dim, spec.channels, spec.heads], -1)
    mixed = causal_conv(mixed, p["conv"], starts, state, spec.activation)
    y = _scanned(mixed, dt, p, spec, starts, state)
    weight, eps = (None, 0.0) if spec.norm is None else (p["norm"]["weight"], spec.norm.eps)
    return gated_norm(y, gate, weight, eps, spec.dim // spec.groups, norm_first=spec.norm_first)


def empty(spec: Mamba2Spec, batch: int, dtype: torch.dtype, device: torch.device | str) -> State:
    """The state before the first token."""
    shape = (batch, spec.heads, spec.head_dim, spec.state)
    wide = torch.promote_types(dtype, torch.float32)
    return {
        "conv": conv_state(spec.channels, spec.kernel, batch, dtype, device),
        "ssm": torch.zeros(shape, dtype=wide, device=device),
    }


def working_bytes(spec: Mamba2Spec, itemsize: int) -> int:
    """Bytes a token: the projection and its gradient, the convolution's taps, the scan's inputs and
    outputs in fp32, the chunks' weights and states with their gradients.
    """
    projected = 3 * (spec.dim + spec.channels + spec.heads) * itemsize
    wide = (spec.kernel + 3) * spec.channels + 6 * spec.dim
    inside = 4 * spec.heads * ssd_reference.CHUNK
    states = 4 * spec.dim * spec.state // ssd_reference.CHUNK
    return projected + 4 * (wide + inside + states)


def _scanned(
    mixed: torch.Tensor,
    dt: torch.Tensor,
    p: tree.Tree,
    spec: Mamba2Spec,
    starts: torch.Tensor | None,
    state: State | None,
) -> torch.Tensor:
    """x, b and c [b, s, c] and the raw steps [b, s, h] -> [b, s, h * p]."""
    sizes = [spec.dim, spec.groups * spec.state, spec.groups * spec.state]
    x, b, c = mixed.split_with_sizes(sizes, -1)
    x = x.view(*x.shape[:2], spec.heads, spec.head_dim)
    b, c = (t.view(*t.shape[:2], spec.groups, spec.state) for t in (b, c))
    raw = p["dt_bias"], p["A_log"]
    if state is not None and x.shape[1] == 1:
        y = ssd_step(x, dt, b, c, *raw, p["D"], spec.limits, starts, state["ssm"])
        return y.flatten(-2)
    dt, decay = rates(dt, *raw, spec.limits)
    before = None if state is None else state["ssm"]
    y, last = ssd(x, dt, decay, b, c, p["D"].to(dt.dtype), starts, before)
    if state is not None:
        assert last is not None
        state["ssm"].copy_(last)
    return y.flatten(-2)


@cache  # for good: graphs read it
def _scales(spec: Mamba2Spec, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The multipliers of all that the input projection makes, copied once to the device."""
    sizes = (spec.dim, spec.dim, *[spec.groups * spec.state] * 2, spec.heads)
    with torch.inference_mode(False):
        made = [torch.full((n,), s) for n, s in zip(sizes, spec.scales, strict=True)]
        return torch.cat(made).to(device, dtype)
