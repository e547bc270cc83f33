"""Helium: rotation of neighbours, norms that round last."""

from ...nn.spec import ModelSpec, NormSpec
from ..config_fields import Fields
from ..dense import dense_spec, head_width
from ..names import LLAMA, names
from ..rope_config import rope_spec

NAMES = names(LLAMA)
_POSITIONS = 4096


def spec(fields: Fields) -> ModelSpec:
    """Matches transformers' `HeliumForCausalLM`."""
    positions = fields.integer("max_position_embeddings", _POSITIONS)
    rope = rope_spec(fields, head_width(fields, 128), positions, 1e5, interleaved=True)
    return dense_spec(
        fields,
        head_dim=128,
        kv_heads=20,
        max_positions=_POSITIONS,
        qkv_bias=fields.flag("attention_bias", False),
        mlp_bias=fields.flag("mlp_bias", False),
        norm=NormSpec(fields.number("rms_norm_eps", 1e-8), cast_first=False),
        ropes=(rope,) * fields.integer("num_hidden_layers"),
    )
