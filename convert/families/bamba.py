"""Bamba: Mamba 2, and attention in some of the layers."""

from ...nn.spec import ModelSpec, NormSpec
from ..config_fields import Fields
from ..dense import dense_spec, head_width
from ..hybrid import mamba2_spec, with_recurrent
from ..mixture import layer_numbers
from ..rope_config import rope_spec
from . import falcon_h1

NAMES = falcon_h1.NAMES
_POSITIONS = 262144


def spec(fields: Fields) -> ModelSpec:
    """Matches transformers' `BambaForCausalLM`, half of whose heads' features are turned."""
    for name in ("num_logits_to_keep", "z_loss_coefficient"):
        fields.take(name, None)
    norm = NormSpec(fields.number("rms_norm_eps", 1e-5))
    bias, depth = fields.flag("attention_bias", False), fields.integer("num_hidden_layers")
    positions = fields.integer("max_position_embeddings", _POSITIONS)
    rope = rope_spec(fields, head_width(fields), positions, 10000.0, partial=0.5)
    made = dense_spec(
        fields,
        kv_heads=8,
        max_positions=_POSITIONS,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=fields.flag("mlp_bias", False),
        norm=norm,
        ropes=(rope,) * depth,
    )
    mamba = mamba2_spec(
        fields,
        fields.integer("mamba_expand", 2) * made.dim,
        out_bias=fields.flag("mamba_proj_bias", False),
        norm=norm,
    )
    attends = layer_numbers(fields, "attn_layer_indices", ())
    fields.put("layer_types", [_TYPES[i in attends] for i in range(depth)])
    fields.take("layer_types")
    return with_recurrent(made, mamba, [i not in attends for i in range(depth)])


_TYPES = ("linear_attention", "full_attention")
