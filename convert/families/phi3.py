"""Phi-3, Phi-3.5 and Phi-4: fused projections, taken apart while loading, and LongRoPE."""

from ...nn.spec import ModelSpec, NormSpec
from ..config_fields import Fields
from ..dense import dense_spec, head_width
from ..names import GATE_UP, LLAMA, names
from ..rope_config import rope_spec

NAMES = names(
    LLAMA,
    fused={
        "model.layers.*.self_attn.qkv_proj": tuple(f"layers.*.attn.{x}" for x in "qkv"),
        **GATE_UP,
    },
)
_POSITIONS = 4096
# What published files say beside the fields that transformers reads.
_KNOWN = {
    "attention_bias": (False,),
    "full_attn_mod": (1,),
    "interpolate_factor": (1,),
    "lm_head_bias": (False,),
    "mlp_bias": (False,),
}


def spec(fields: Fields) -> ModelSpec:
    """Matches transformers' `Phi3ForCausalLM`."""
    for name, values in _KNOWN.items():
        fields.expect(name, *values)
    depth = fields.integer("num_hidden_layers")
    rope = rope_spec(
        fields,
        head_width(fields),
        fields.integer("max_position_embeddings", _POSITIONS),
        10000.0,
        aliases={"su": "longrope", "yarn": "longrope"},
        original=fields.integer("original_max_position_embeddings", _POSITIONS),
    )
    if rope.kind not in ("default", "longrope"):
        raise fields.error(f"rope type {rope.kind!r} is none of Phi-3's, default and longrope")
    return dense_spec(
        fields,
        max_positions=_POSITIONS,
        norm=NormSpec(fields.number("rms_norm_eps", 1e-5)),
        windows=(fields.integer_or_null("sliding_window", None),) * depth,
        ropes=(rope,) * depth,
    )
