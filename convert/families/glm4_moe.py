"""GLM-4.5 to 4.7: mixtures routed by sigmoids and groups, plus an MLP for every token."""

from dataclasses import replace

from ...nn.spec import ModelSpec, NormSpec
from ..config_fields import Fields
from ..dense import dense_spec, head_width
from ..mixture import expert_names, grouped, mlp_spec, moe_spec, stacked, with_experts
from ..names import LLAMA, QK_NORMS, names
from ..rope_config import rope_spec

_SHARED = "model.layers.*.mlp.shared_experts"
NAMES = names(
    LLAMA,
    QK_NORMS,
    expert_names("mlp"),
    {
        "layers.*.mlp.router.bias": "model.layers.*.mlp.gate.e_score_correction_bias",
        "layers.*.mlp.shared.gate": f"{_SHARED}.gate_proj",
        "layers.*.mlp.shared.up": f"{_SHARED}.up_proj",
        "layers.*.mlp.shared.down": f"{_SHARED}.down_proj",
    },
    fused=stacked("mlp"),
    further_layers=True,
)
_POSITIONS = 131072


def spec(fields: Fields) -> ModelSpec:
    """Matches transformers' `Glm4MoeForCausalLM`."""
    depth = fields.integer("num_hidden_layers")
    width = head_width(fields)
    positions = fields.integer("max_position_embeddings", _POSITIONS)
    rope = rope_spec(fields, width, positions, 10000.0, partial=0.5)
    made = dense_spec(
        fields,
        kv_heads=8,
        max_positions=_POSITIONS,
        qkv_bias=fields.flag("attention_bias", False),
        norm=NormSpec(fields.number("rms_norm_eps", 1e-5)),
        qk_norm=fields.flag("use_qk_norm", False),
        ropes=(rope,) * depth,
    )
    # Layers that predict further tokens, which a checkpoint has behind its last one.
    fields.take("num_nextn_predict_layers", 1)
    each = mlp_spec(fields, "moe_intermediate_size", 1408)
    moe = moe_spec(
        fields,
        each,
        count="n_routed_experts",
        experts=128,
        active=8,
        router="sigmoid",
        normalise=fields.flag("norm_topk_prob", True),
        scale=fields.number("routed_scaling_factor", 1.0),
        shared=replace(each, dim=each.dim * fields.integer("n_shared_experts", 1)),
        **grouped(fields, fields.integer("n_routed_experts", 128)),
    )
    return with_experts(
        made, moe, frozenset(range(fields.integer("first_k_dense_replace", 1, low=0)))
    )
