"""The gated delta net: a short convolution, then a state that each token decays and corrects."""

from collections.abc import Sequence

import torch

from ..kernels import delta_rule_reference
from ..kernels.delta_rule import delta_rule, rates
from ..kernels.gated_norm import gated_norm
from ..kernels.state_step import delta_step
from . import tree
from .short_conv import causal_conv, conv_state
from .spec import DeltaNetSpec

State = dict[str, torch.Tensor]


def core(
    made: Sequence[torch.Tensor],
    p: tree.Tree,
    spec: DeltaNetSpec,
    starts: torch.Tensor | None,
    state: State | None,
) -> torch.Tensor:
    """Yang, Kautz and Hatamizadeh, arXiv 2412.06464, sec. 3.3, as in transformers'
    `Qwen3NextGatedDeltaNet` and `Qwen3_5GatedDeltaNet`; see `recurrent.core`. The rule, its rates
    and decays and the norm after it are fp32.
    """
    qkv, gate, beta, decay = _taken_apart(made, spec) if spec.by_key_head else made
    mixed = causal_conv(qkv, p["conv"], starts, state, spec.activation)
    y = _ruled(mixed, beta, decay, p, spec, starts, state)
    return gated_norm(
        y.flatten(-2), gate, p["norm"]["weight"], spec.norm.eps, spec.value_dim, norm_first=True
    )


def empty(spec: DeltaNetSpec, batch: int, dtype: torch.dtype, device: torch.device | str) -> State:
    """The state before the first token."""
    shape = (batch, spec.value_heads, spec.key_dim, spec.value_dim)
    wide = torch.promote_types(dtype, torch.float32)
    return {
        "conv": conv_state(spec.channels, spec.kernel, batch, dtype, device),
        "delta": torch.zeros(shape, dtype=wide, device=device),
    }


def working_bytes(spec: DeltaNetSpec, itemsize: int) -> int:
    """Bytes a token: the projections and their gradients, the convolution's taps, in fp32 the
    rule's inputs and outputs, a head's keys with and without their decays, what is solved and its
    two sides, the chunks' pairs and states, with gradients.
    """
    keys, values = spec.widths
    projected = 3 * (spec.channels + values + 2 * spec.value_heads) * itemsize
    wide = (spec.kernel + 3) * spec.channels + 4 * keys + 8 * values
    solved = 6 * spec.value_heads * (spec.key_dim + spec.value_dim)
    inside = 8 * spec.value_heads * delta_rule_reference.CHUNK
    states = 4 * values * spec.key_dim // delta_rule_reference.CHUNK
    return projected + 4 * (wide + solved + inside + states)


def _taken_apart(made: Sequence[torch.Tensor], spec: DeltaNetSpec) -> tuple[torch.Tensor, ...]:
    """What two projections make for each key head in turn, all of a kind side by side."""
    keys, values = spec.widths
    each = values // spec.key_heads
    qkv_gate, beta_decay = (t.view(*t.shape[:2], spec.key_heads, -1) for t in made)
    q, k, v, gate = qkv_gate.split_with_sizes([spec.key_dim, spec.key_dim, each, each], -1)
    beta, decay = beta_decay.chunk(2, -1)
    qkv = torch.cat([t.flatten(-2) for t in (q, k, v)], -1)
    return qkv, gate.flatten(-2), beta.flatten(-2), decay.flatten(-2)


def _ruled(
    mixed: torch.Tensor,
    beta: torch.Tensor,
    decay: torch.Tensor,
    p: tree.Tree,
    spec: DeltaNetSpec,
    starts: torch.Tensor | None,
    state: State | None,
) -> torch.Tensor:
    """q, k and v [b, s, c], raw rates and decays [b, s, h] -> [b, s, h, p]."""
    keys, values = spec.widths
    q, k, v = mixed.split_with_sizes([keys, keys, values], -1)
    lead = mixed.shape[:2]
    q, k = (t.view(*lead, spec.key_heads, spec.key_dim) for t in (q, k))
    v = v.view(*lead, spec.value_heads, spec.value_dim)
    raw = beta, decay, p["dt_bias"], p["A_log"]
    if state is not None and lead[1] == 1:
        return delta_step(q, k, v, *raw, starts, state["delta"])
    before = None if state is None else state["delta"]
    y, last = delta_rule(q, k, v, *rates(*raw), starts, before)
    if state is not None:
        assert last is not None
        state["delta"].copy_(last)
    return y
