"""Qwen3 with mixtures of experts in some layers, Qwen3's own MLP in the others."""

from ...nn.spec import ModelSpec
from ..config_fields import Fields
from ..dense import dense_spec
from ..mixture import dense_layers, expert_names, mlp_spec, moe_spec, stacked, with_experts
from ..names import LLAMA, QK_NORMS, names

NAMES = names(LLAMA, QK_NORMS, expert_names("mlp"), fused=stacked("mlp"), peft_joins=True)


def spec(fields: Fields) -> ModelSpec:
    """Matches transformers' `Qwen3MoeForCausalLM`."""
    bias = fields.flag("attention_bias", False)
    fields.take("max_window_layers", None)  # all layers have the window, or none
    window = fields.integer_or_null("sliding_window", 4096)
    if not fields.flag("use_sliding_window", False):
        window = None
    made = dense_spec(
        fields,
        kv_heads=4,
        max_positions=32768,
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=True,
        windows=(window,) * fields.integer("num_hidden_layers"),
    )
    mlp = mlp_spec(fields, "moe_intermediate_size", 768)
    moe = moe_spec(
        fields,
        mlp,
        # transformers writes the second name, and published files have the first.
        count="num_experts" if fields.has("num_experts") else "num_local_experts",
        experts=128,
        active=8,
        normalise=fields.flag("norm_topk_prob", False),
    )
    return with_experts(made, moe, dense_layers(fields))
