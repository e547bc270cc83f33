"""GLM-4.5 to 4.7: mixtures routed by sigmoids and groups, plus an MLP for every token."""

from ...nn.spec import ModelSpec, NormSpec
from ..config_fields import Fields
from ..dense import dense_spec, head_width
from ..mixture import SIGMOID_NAMES, stacked, with_sigmoid_experts
from ..names import LLAMA, QK_NORMS, names
from ..rope_config import rope_spec

NAMES = names(
    LLAMA,
    QK_NORMS,
    SIGMOID_NAMES,
    fused=stacked("mlp"),
    peft_joins=True,
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
    return with_sigmoid_experts(fields, made, experts=128, width=1408, scale=1.0, dense=1)
