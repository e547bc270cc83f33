"""DeepSeek-V3 and R1: latent attention, and mixtures routed by sigmoids and groups."""

from ...nn.spec import LatentSpec, ModelSpec, NormSpec
from ..config_fields import Fields
from ..dense import dense_spec, with_attention
from ..mixture import SIGMOID_NAMES, stacked, with_sigmoid_experts
from ..names import LLAMA, names
from ..rope_config import rope_spec, tempered_scale

_ATTENTION = "model.layers.*.self_attn"
NAMES = names(
    LLAMA,
    SIGMOID_NAMES,
    {
        "layers.*.attn.q_a": f"{_ATTENTION}.q_a_proj",
        "layers.*.attn.q_a_norm": f"{_ATTENTION}.q_a_layernorm",
        "layers.*.attn.q_b": f"{_ATTENTION}.q_b_proj",
        "layers.*.attn.kv_a": f"{_ATTENTION}.kv_a_proj_with_mqa",
        "layers.*.attn.kv_a_norm": f"{_ATTENTION}.kv_a_layernorm",
        "layers.*.attn.kv_b": f"{_ATTENTION}.kv_b_proj",
    },
    fused=stacked("mlp"),
    peft_joins=True,
    further_layers=True,
)


def latent_spec(
    fields: Fields,
    *,
    positions: int = 4096,
    plain: int = 128,
    value: int = 128,
    q_rank: int = 1536,
    eps: float = 1e-6,
) -> ModelSpec:
    """A decoder with latent attention; the keywords are the family's own defaults."""
    turned = fields.integer("qk_rope_head_dim", 64)
    width = fields.integer("qk_nope_head_dim", plain) + turned
    # What transformers computes, and writes too.
    fields.put("head_dim", turned)
    fields.put("qk_head_dim", width)
    fields.take("qk_head_dim")
    heads = fields.integer("num_attention_heads")
    fields.expect("num_key_value_heads", heads)
    interleaved = fields.flag("rope_interleave", True)
    context = fields.integer("max_position_embeddings", positions)
    rope = rope_spec(fields, turned, context, 10000.0, interleaved=interleaved)
    bias = fields.flag("attention_bias", False)
    made = dense_spec(
        fields,
        max_positions=positions,
        norm=NormSpec(fields.number("rms_norm_eps", eps)),
        qkv_bias=bias,
        out_bias=bias,
        scale=tempered_scale(rope, width),
        ropes=(rope,) * fields.integer("num_hidden_layers"),
    )
    latent = LatentSpec(
        kv_rank=fields.integer("kv_lora_rank", 512),
        q_rank=fields.integer_or_null("q_lora_rank", q_rank),
        value_dim=fields.integer("v_head_dim", value),
        norm=NormSpec(1e-6),
    )
    return with_attention(made, latent=latent, head_dim=width)


def spec(fields: Fields) -> ModelSpec:
    """Matches transformers' `DeepseekV3ForCausalLM`."""
    made = latent_spec(fields)
    # Of published configs: the only way of choosing experts, and losses that no model code adds.
    fields.expect("topk_method", "noaux_tc")
    fields.expect("scoring_func", "sigmoid")
    fields.expect("moe_layer_freq", 1)
    for name in ("ep_size", "aux_loss_alpha", "seq_aux", "num_nextn_predict_layers"):
        fields.take(name, None)
    return with_sigmoid_experts(
        fields, made, experts=256, width=2048, scale=2.5, dense=3, groups=8, best=4
    )
