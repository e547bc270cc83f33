"""Qwen3-Next: delta nets, gated attention in each fourth layer, mixtures with a shared MLP."""

from ...nn.spec import ModelSpec
from ..config_fields import Fields
from ..dense import dense_spec, head_width, with_attention
from ..hybrid import delta_net_names, delta_net_spec, linear_layers, with_recurrent
from ..mixture import dense_layers, mlp_spec, moe_spec, with_experts
from ..names import QK_NORMS, names
from ..rope_config import rope_spec
from . import qwen2_moe
from .gemma import norm

NAMES = names(
    dict(qwen2_moe.NAMES.table),
    QK_NORMS,
    delta_net_names(qkv_gate="in_proj_qkvz", beta_decay="in_proj_ba"),
    fused=dict(qwen2_moe.NAMES.fused),
    further_layers=True,
    peft_joins=True,
)
_WIDTH, _POSITIONS = 256, 32768


def spec(fields: Fields) -> ModelSpec:
    """Matches transformers' `Qwen3NextForCausalLM`."""
    made = gated_hybrid(fields, kv_heads=2, by_key_head=True)
    fields.expect("use_sliding_window", False)
    moe = moe_spec(
        fields,
        mlp_spec(fields, "moe_intermediate_size", 512),
        experts=512,
        active=10,
        normalise=fields.flag("norm_topk_prob", True),
        shared=mlp_spec(fields, "shared_expert_intermediate_size", 512),
        shared_gate=True,
    )
    return with_experts(made, moe, dense_layers(fields))


def gated_hybrid(fields: Fields, *, kv_heads: int, by_key_head: bool) -> ModelSpec:
    """Gated attention, norms around 1, and delta nets in place of attention in most layers."""
    bias = fields.flag("attention_bias", False)
    positions = fields.integer("max_position_embeddings", _POSITIONS)
    rope = rope_spec(fields, head_width(fields, _WIDTH), positions, 1e4, partial=0.25)
    made = dense_spec(
        fields,
        head_dim=_WIDTH,
        kv_heads=kv_heads,
        max_positions=_POSITIONS,
        qkv_bias=bias,
        out_bias=bias,
        norm=norm(fields),
        qk_norm=True,
        ropes=(rope,) * fields.integer("num_hidden_layers"),
    )
    delta = delta_net_spec(fields, by_key_head=by_key_head)
    return with_recurrent(with_attention(made, gated=True), delta, linear_layers(fields))
