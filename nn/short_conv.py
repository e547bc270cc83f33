"""Short causal convolutions over the tokens of a row, each feature for itself."""

from collections.abc import Sequence

import torch

from ..kernels.short_conv import short_conv
from . import tree
from .activation import act
from .spec import Activation, ShortConvSpec

State = dict[str, torch.Tensor]


def core(
    made: Sequence[torch.Tensor],
    p: tree.Tree,
    spec: ShortConvSpec,
    starts: torch.Tensor | None,
    state: State | None,
) -> torch.Tensor:
    """LFM2's gated convolution (transformers' `Lfm2ShortConv`): see `recurrent.core`."""
    b, c, inner = made[0].chunk(3, -1)
    return c * causal_conv(b * inner, p["conv"], starts, state)


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
    activation: Activation | None = None,
) -> torch.Tensor:
    """`kernels.short_conv` of x [b, s, c] with the weight [c, 1, kernel] of torch's Conv1d, then
    the activation. state["conv"] [b, kernel - 1, c] holds what came before x, zeros where nothing
    did, and is written in place.
    """
    past = None if state is None else state["conv"]
    fused = activation == "silu"
    y = short_conv(x, p["weight"][:, 0], p.get("bias"), starts, past, fused)
    return y if fused or activation is None else act(y, activation)
