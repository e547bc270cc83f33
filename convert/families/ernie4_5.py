"""ERNIE 4.5, dense: rotation of neighbours."""

from ...nn.spec import ModelSpec, NormSpec
from ..config_fields import Fields
from ..dense import dense_spec, head_width
from ..names import LLAMA, names
from ..rope_config import rope_spec

NAMES = names(LLAMA)
_POSITIONS = 131072


def spec(fields: Fields) -> ModelSpec:
    """Matches transformers' `Ernie4_5ForCausalLM`."""
    bias = fields.flag("use_bias", False)
    positions = fields.integer("max_position_embeddings", _POSITIONS)
    rope = rope_spec(fields, head_width(fields, 128), positions, 5e5, interleaved=True)
    return dense_spec(
        fields,
        head_dim=128,
        kv_heads=2,
        max_positions=_POSITIONS,
        tied=True,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
        norm=NormSpec(fields.number("rms_norm_eps", 1e-5)),
        ropes=(rope,) * fields.integer("num_hidden_layers"),
    )
