"""Gemma 3's text models: q/k norms, five windows to one full layer, a rotary base for each."""

from dataclasses import replace

from ...nn.spec import ModelSpec
from ..config_fields import Fields
from ..dense import dense_spec, head_width, layer_types, typed_windows, with_layers
from ..names import LLAMA, QK_NORMS, SANDWICH_NORMS, names
from ..rope_config import typed_ropes
from .gemma import norm, scaled
from .gemma2 import activation

NAMES = names(LLAMA, QK_NORMS, SANDWICH_NORMS)
_THETAS = {"full_attention": 1e6, "sliding_attention": 1e4}
_POSITIONS = 131072


def spec(fields: Fields) -> ModelSpec:
    """Matches transformers' `Gemma3ForCausalLM`."""
    bias = fields.flag("attention_bias", False)
    types = layer_types(fields, every=fields.integer("sliding_window_pattern", 6))
    positions = fields.integer("max_position_embeddings", _POSITIONS)
    ropes = typed_ropes(fields, head_width(fields, 256), positions, _THETAS)
    made = dense_spec(
        fields,
        head_dim=256,
        kv_heads=4,
        max_positions=_POSITIONS,
        tied=True,
        qkv_bias=bias,
        out_bias=bias,
        norm=norm(fields),
        qk_norm=True,
        activation=activation(fields),
        scale=fields.number("query_pre_attn_scalar", 256) ** -0.5,
        windows=typed_windows(fields, types, 4096),
        ropes=tuple(ropes[kind] for kind in types),
    )
    made = replace(made, logit_softcap=fields.number_or_null("final_logit_softcapping", None))
    return scaled(with_layers(made, post_norm=True))
