"""OLMoE: every layer a mixture of many small experts, q and k normalised over their whole width."""

from ...nn.spec import ModelSpec, NormSpec
from ..config_fields import Fields
from ..dense import dense_spec, with_attention
from ..mixture import expert_names, mlp_spec, moe_spec, stacked, with_experts
from ..names import LLAMA, QK_NORMS, names

NAMES = names(LLAMA, QK_NORMS, expert_names("mlp"), fused=stacked("mlp"), peft_joins=True)


def spec(fields: Fields) -> ModelSpec:
    """Matches transformers' `OlmoeForCausalLM`."""
    bias = fields.flag("attention_bias", False)
    fields.expect("clip_qkv")  # null in all published models; it would come after the norms
    # The norms of q and k are as wide as heads of this width make them.
    dim, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    fields.expect("head_dim", dim // heads)
    norm = NormSpec(fields.number("rms_norm_eps", 1e-5))
    made = dense_spec(
        fields, max_positions=4096, qkv_bias=bias, out_bias=bias, norm=norm, qk_norm=True
    )
    moe = moe_spec(
        fields,
        mlp_spec(fields, "intermediate_size", 2048),
        experts=64,
        active=8,
        normalise=fields.flag("norm_topk_prob", False),
    )
    return with_experts(with_attention(made, qk_norm_over="width"), moe)
