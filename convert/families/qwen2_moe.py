"""Qwen1.5 and Qwen2 with mixtures of experts, to which a gated MLP for every token is added."""

from ...nn.spec import ModelSpec
from ..config_fields import Fields
from ..dense import dense_spec, sliding_windows
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
    peft_joins=True,
)


def spec(fields: Fields) -> ModelSpec:
    """Matches transformers' `Qwen2MoeForCausalLM`."""
    made = dense_spec(
        fields,
        kv_heads=16,
        max_positions=32768,
        qkv_bias=fields.flag("qkv_bias", True),
        # Where no layer_types say so, every second of the *first* layers slides.
        windows=sliding_windows(fields, lambda i, last: i % 2 == 0 and i < last),
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
