"""GLM-4-9B (the first): half of each head rotated by neighbours, gate and up in one matrix."""

from ...nn.spec import ModelSpec, NormSpec
from ..config_fields import Fields
from ..dense import dense_spec, head_width
from ..names import GATE_UP, LLAMA, names
from ..rope_config import rope_spec

NAMES = names(LLAMA, fused=GATE_UP)
_POSITIONS = 131072


def spec(fields: Fields) -> ModelSpec:
    """Matches transformers' `GlmForCausalLM`."""
    positions = fields.integer("max_position_embeddings", _POSITIONS)
    width = head_width(fields, 128)
    rope = rope_spec(fields, width, positions, 10000.0, partial=0.5, interleaved=True)
    return dense_spec(
        fields,
        head_dim=128,
        kv_heads=2,
        max_positions=_POSITIONS,
        qkv_bias=fields.flag("attention_bias", True),
        norm=NormSpec(fields.number("rms_norm_eps", 1.5625e-7)),
        ropes=(rope,) * fields.integer("num_hidden_layers"),
    )
