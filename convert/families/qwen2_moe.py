"""Qwen1.5 and Qwen2 with mixtures of experts, to which a gated MLP for every token is added."""

from ...nn.spec import ModelSpec
from ..config_fields import Fields
from ..dense import dense_spec
from ..mixture import (
    dense_layers,
    expert_names,
    mlp_spec,
    moe_spec,
    shared_names,
    stacked,
    with_experts,
)
from ..names import LLAMA, names

NAMES = names(
    LLAMA,
    expert_names("mlp"),
    shared_names("mlp.shared_expert"),
    {"layers.*.mlp.shared_gate": "model.layers.*.mlp.shared_expert_gate"},
    fused=stacked("mlp"),
)


def spec(fields: Fields) -> ModelSpec:
    """Matches transformers' `Qwen2MoeForCausalLM`."""
    made = dense_spec(
        fields,
        kv_heads=16,
        max_positions=32768,
        qkv_bias=fields.flag("qkv_bias", True),
        windows=_windows(fields),
    )
    moe = moe_spec(
        fields,
        mlp_spec(fields, "moe_intermediate_size", 1408),
        experts=60,
        active=4,
        normalise=fields.flag("norm_topk_prob", False),
        shared=mlp_spec(fields, "shared_expert_intermediate_size", 5632),
        shared_gate=True,
    )
    return with_experts(made, moe, dense_layers(fields))


def _windows(fields: Fields) -> tuple[int | None, ...]:
    """As Qwen2's, but where no layer_types say so, every second of the *first* layers slides."""
    depth = fields.integer("num_hidden_layers")
    last = fields.integer("max_window_layers", 28, low=0)
    types = fields.texts("layer_types", depth, ("full_attention", "sliding_attention"))
    window = fields.take("sliding_window", 4096)
    used = fields.flag("use_sliding_window", False)
    slides = [used and i % 2 == 0 and i < last for i in range(depth)]
    if types is not None:
        slides = [kind == "sliding_attention" for kind in types]
    if not any(slides):
        return (None,) * depth
    if not used:
        raise fields.error("layer_types asks for windows that use_sliding_window turns off")
    if type(window) is not int or window < 1:
        raise fields.error(f"sliding_window is {window!r}, expected a positive integer")
    return tuple(window if sliding else None for sliding in slides)
