"""Short causal convolutions over the tokens of a row, each feature for itself."""

import torch
import torch.nn.functional as F

from . import tree
from .linear import linear, seed_after
from .spec import ShortConvSpec

State = dict[str, torch.Tensor]


def mix(
    x: torch.Tensor,
    p: tree.Tree,
    adapters: tree.Tree,
    spec: ShortConvSpec,
    starts: torch.Tensor | None,
    state: State | None,
    seed: int | None,
) -> torch.Tensor:
    """LFM2's gated convolution (transformers' `Lfm2ShortConv`): see `recurrent.mix`."""
    get = (adapters or {}).get
    b, c, inner = linear(x, p["in"], get("in"), seed).chunk(3, -1)
    mixed = c * causal_conv(b * inner, p["conv"], starts, state)
    return linear(mixed, p["out"], get("out"), seed_after(seed, 1))


def empty(spec: ShortConvSpec, batch: int, dtype: torch.dtype, device: torch.device | str) -> State:
    """The state before the first token."""
    return {"conv": conv_state(spec.dim, spec.kernel, batch, dtype, device)}


def working_bytes(spec: ShortConvSpec, itemsize: int) -> int:
    """Bytes a token: b, c, x and their gradients, the products, the convolution's sum in fp32."""
    return spec.dim * (9 * itemsize + 2 * 4)


def conv_state(
    channels: int, kernel: int, batch: int, dtype: torch.dtype, device: torch.device | str
) -> torch.Tensor:
    """The inputs [b, kernel - 1, c] of the tokens before the first: zeros."""
    return torch.zeros((batch, kernel - 1, channels), dtype=dtype, device=device)


def causal_conv(
    x: torch.Tensor,
    p: tree.Tree,
    starts: torch.Tensor | None,
    state: State | None = None,
) -> torch.Tensor:
    """y_t = sum_j w_j x_{t - kernel + 1 + j} + bias for x [b, s, c], summed in fp32, in x's dtype.

    Weight [c, 1, kernel] as in torch's Conv1d. `starts` [b, s]: no token sees beyond the last of
    these at or before it. state["conv"] [b, kernel - 1, c] holds what came before x, zeros where
    nothing did, and is written in place.
    """
    weight = p["weight"][:, 0]
    before = weight.shape[1] - 1
    if state is None:
        past = x.new_zeros(x.shape[0], before, x.shape[2])
    else:
        past = state["conv"]
    narrow, s = torch.cat([past.to(x.dtype), x], 1), x.shape[1]
    wide = narrow.to(torch.promote_types(x.dtype, torch.float32))
    weight = weight.to(wide.dtype)
    segments = None
    if starts is not None:
        # Of the tokens before x, 0: they belong to its first ones unless a start lies between.
        segments = F.pad(starts.cumsum(1), (before, 0))
    y: torch.Tensor = wide[:, before:] * weight[:, before]
    for j in range(before):
        tap = wide[:, j : j + s]
        if segments is not None:
            tap = tap * (segments[:, j : j + s] == segments[:, before:])[..., None]
        y = torch.addcmul(y, tap, weight[:, j])
    if "bias" in p:
        y = y + p["bias"]
    if state is not None:
        last = narrow[:, s:]
        if segments is not None:
            last = last * (segments[:, s:] == segments[:, -1:])[..., None]
        state["conv"].copy_(last)
    return y.to(x.dtype)
