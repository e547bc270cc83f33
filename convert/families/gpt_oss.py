"""gpt-oss: attention sinks, alternating windows, clamped experts with biases, stored as stacks."""

from ...nn.spec import MLPSpec, ModelSpec, NormSpec
from ..config_fields import Fields
from ..dense import dense_spec, head_width, layer_types, typed_windows, with_attention
from ..mixture import expert_names, moe_spec, stacked, with_experts
from ..names import LLAMA, names
from ..rope_config import rope_spec

_STACKS = stacked("mlp")
NAMES = names(
    LLAMA,
    expert_names("mlp", router="router"),
    {"layers.*.attn": "model.layers.*.self_attn"},  # the sinks
    fused=_STACKS
    | {f"{name}_bias": tuple(f"{p}.bias" for p in paths) for name, paths in _STACKS.items()},
    in_turn=True,
    transposed=_STACKS,
)
_POSITIONS = 131072
_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def spec(fields: Fields) -> ModelSpec:
    """Matches transformers' `GptOssForCausalLM`."""
    fields.rename("experts_per_token", "num_experts_per_tok")
    fields.take("initial_context_length", None)  # YaRN's own field says the same
    if not fields.has("rope_parameters") and not fields.has("rope_scaling"):
        fields.put("rope_parameters", _YARN)
    bias = fields.flag("attention_bias", True)
    positions = fields.integer("max_position_embeddings", _POSITIONS)
    rope = rope_spec(fields, head_width(fields, 64), positions, 150000.0)
    depth = fields.integer("num_hidden_layers")
    made = dense_spec(
        fields,
        head_dim=64,
        kv_heads=8,
        max_positions=_POSITIONS,
        qkv_bias=bias,
        out_bias=bias,
        norm=NormSpec(fields.number("rms_norm_eps", 1e-5), cast_first=False),
        windows=typed_windows(fields, layer_types(fields, 2), 128),
        ropes=(rope,) * depth,
        activation="clamped",
    )
    fields.expect("hidden_act", "silu")
    mlp = MLPSpec(
        dim=fields.integer("intermediate_size"),
        activation="clamped",
        bias=True,
        alpha=fields.number("swiglu_alpha", 1.702),
        limit=fields.number("swiglu_limit", 7.0),
    )
    moe = moe_spec(
        fields,
        mlp,
        count="num_local_experts",
        experts=128,
        active=4,
        router="top_softmax",
        router_bias=True,
    )
    return with_experts(with_attention(made, sinks=True), moe)
