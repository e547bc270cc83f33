"""Qwen3.5's text models with mixtures of experts in every layer, and a gated MLP beside each."""

from ...nn.spec import ModelSpec
from ..config_fields import Fields
from ..mixture import mlp_spec, moe_spec, with_experts
from ..names import QK_NORMS, names
from . import qwen2_moe, qwen3_5_text

NAMES = names(
    dict(qwen2_moe.NAMES.table),
    QK_NORMS,
    qwen3_5_text.DELTA_NET,
    fused=dict(qwen2_moe.NAMES.fused),
    further_layers=True,
)


def spec(fields: Fields) -> ModelSpec:
    """Matches transformers' `Qwen3_5MoeForCausalLM`."""
    expert = mlp_spec(fields, "moe_intermediate_size", 512)
    if not fields.has("intermediate_size"):  # no layer is without experts
        fields.put("intermediate_size", expert.dim)
    moe = moe_spec(
        fields,
        expert,
        experts=256,
        active=8,
        shared=mlp_spec(fields, "shared_expert_intermediate_size", 512),
        shared_gate=True,
    )
    return with_experts(qwen3_5_text.spec(fields), moe)
