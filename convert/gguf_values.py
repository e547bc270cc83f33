"""What the fields of GGUF files say of a model, out of its spec."""

from collections.abc import Callable
from dataclasses import replace
from itertools import takewhile

import torch

from ..nn.rope import inverse_frequencies
from ..nn.spec import (
    AttentionSpec,
    DeltaNetSpec,
    Mamba2Spec,
    MLPSpec,
    ModelSpec,
    MoESpec,
    RopeSpec,
)
from .gguf_architecture import EXPERTS, ROTATED, WINDOW


def _mixture(spec: ModelSpec) -> MoESpec | None:
    return next((x.mlp for x in spec.layers if isinstance(x.mlp, MoESpec)), None)


def _expert_width(spec: ModelSpec) -> int | None:
    mixture = _mixture(spec)
    return None if mixture is None else mixture.expert.dim


def _shared_width(spec: ModelSpec) -> int | None:
    mixture = _mixture(spec)
    return None if mixture is None or mixture.shared is None else mixture.shared.dim


def width(spec: ModelSpec) -> int:
    """Features inside the MLP of a layer without experts, or of one expert where all have some."""
    mixture = _mixture(spec)
    dense = (x.mlp.dim for x in spec.layers if isinstance(x.mlp, MLPSpec))
    return next(dense, 0 if mixture is None else mixture.expert.dim)


def _first(spec: ModelSpec) -> AttentionSpec:
    return next(spec.attentions())


def _sliding(spec: ModelSpec) -> AttentionSpec | None:
    return next((a for a in spec.attentions() if a.window is not None), None)


def _window(spec: ModelSpec) -> int | None:
    found = _sliding(spec)
    return None if found is None else found.window


def main_rope(spec: ModelSpec) -> RopeSpec | None:
    """The rotation of the layers without a window, or of all others where those have none."""
    full = [a.rope for a in spec.attentions() if a.window is None and a.rope is not None]
    return next(iter([*full, *spec.ropes()]), None)


def divisors(rope: RopeSpec) -> torch.Tensor:
    """What the scaled rotation `rope` divides each plain frequency by, fp32 [dim / 2]."""
    at = torch.zeros(1, 1, dtype=torch.long)
    return inverse_frequencies(replace(rope, kind="default"), at) / inverse_frequencies(rope, at)


def _window_theta(spec: ModelSpec) -> float | None:
    found = _sliding(spec)
    return None if found is None or found.rope is None else found.rope.theta


def _count(spec: ModelSpec) -> int | None:
    mixture = _mixture(spec)
    return None if mixture is None else mixture.experts


def _active(spec: ModelSpec) -> int | None:
    mixture = _mixture(spec)
    return None if mixture is None else mixture.active


def _leading(spec: ModelSpec) -> int:
    """Layers before the first with experts."""
    return len(list(takewhile(lambda layer: isinstance(layer.mlp, MLPSpec), spec.layers)))


def _shared_count(spec: ModelSpec) -> int:
    return (_shared_width(spec) or 0) // (_expert_width(spec) or 1)


def _groups(spec: ModelSpec) -> tuple[int | None, int | None]:
    """Groups of experts and those among which a token chooses, if there are several."""
    mixture = _mixture(spec)
    several = mixture is not None and mixture.groups > 1
    return (mixture.groups, mixture.active_groups) if mixture and several else (None, None)


def _weighing(spec: ModelSpec) -> tuple[float | None, bool | None]:
    """What multiplies the weights of experts, and whether they are divided by their sum."""
    mixture = _mixture(spec)
    return (None, None) if mixture is None else (mixture.scale, mixture.normalise)


def _recurrent(spec: ModelSpec) -> dict[str, int]:
    """The sizes of the mixers that carry a state, by the end of a field's name."""
    found = next((x.recurrent for x in spec.layers if x.recurrent is not None), None)
    if isinstance(found, Mamba2Spec):
        sizes = (found.state, found.groups, found.dim, found.heads)
    elif isinstance(found, DeltaNetSpec):
        sizes = (found.key_dim, found.key_heads, found.widths[1], found.value_heads)
    else:
        return {} if found is None else {"l_cache": found.kernel}
    names = ("conv_kernel", "state_size", "group_count", "inner_size", "time_step_rank")
    return dict(zip(names, (found.kernel, *sizes), strict=True))


def _interval(spec: ModelSpec) -> int:
    """The number of the first layer with attention, from one on."""
    return next(i for i, layer in enumerate(spec.layers, 1) if layer.attention is not None)


# The value of a key that some architectures have; None where a model has no such thing.
VALUES: dict[str, Callable[[ModelSpec], int | float | None]] = {
    "attention.scale": lambda spec: _first(spec).scale,
    "embedding_scale": lambda spec: spec.embed_scale,
    "residual_scale": lambda spec: spec.layers[0].residual_scale,
    "logit_scale": lambda spec: spec.logit_scale,
    "attn_logit_softcapping": lambda spec: _first(spec).softcap,
    "final_logit_softcapping": lambda spec: spec.logit_softcap,
    WINDOW: _window,
    "rope.freq_base_swa": _window_theta,
    EXPERTS: _count,
    "expert_used_count": _active,
    "expert_feed_forward_length": _expert_width,
    "expert_shared_feed_forward_length": _shared_width,
    "expert_shared_count": _shared_count,
    "expert_group_count": lambda spec: _groups(spec)[0],
    "expert_group_used_count": lambda spec: _groups(spec)[1],
    "leading_dense_block_count": _leading,
    "full_attention_interval": _interval,
    "shortconv.l_cache": lambda spec: _recurrent(spec)["l_cache"],
    "ssm.conv_kernel": lambda spec: _recurrent(spec)["conv_kernel"],
    "ssm.state_size": lambda spec: _recurrent(spec)["state_size"],
    "ssm.group_count": lambda spec: _recurrent(spec)["group_count"],
    "ssm.inner_size": lambda spec: _recurrent(spec)["inner_size"],
    "ssm.time_step_rank": lambda spec: _recurrent(spec)["time_step_rank"],
    ROTATED: lambda spec: main_rope(spec) is not None,
    "expert_weights_scale": lambda spec: _weighing(spec)[0],
    "expert_weights_norm": lambda spec: _weighing(spec)[1],
}
BOOLEANS = ("expert_weights_norm", ROTATED)
_NUMBERS = (*BOOLEANS, "expert_weights_scale")
INTEGERS = (
    WINDOW,
    "leading_dense_block_count",
    "full_attention_interval",
    *(
        key
        for key in VALUES
        if key.startswith(("expert_", "shortconv.", "ssm.")) and key not in _NUMBERS
    ),
)
