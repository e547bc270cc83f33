"""Cohere's Command R7B and A: windows with positions, every fourth layer full and without."""

from ...nn.spec import ModelSpec
from ..config_fields import Fields
from ..dense import dense_spec, head_width, layer_types, typed_windows
from ..names import LLAMA, names
from ..rope_config import rope_spec
from .cohere import layer_norm, side_by_side

NAMES = names(LLAMA)
_POSITIONS = 8192
# What published files say beside the fields that transformers reads.
_KNOWN = {
    "order_of_interleaved_layers": ("local_attn_first",),
    "position_embedding_type": ("rope_gptj",),
    "rotary_pct": (1.0,),
    "use_embedding_sharing": (True,),
    "use_gated_activation": (True,),
    "use_parallel_block": (True,),
    "use_parallel_embedding": (True, False),
    "use_qk_norm": (False,),
}


def spec(fields: Fields) -> ModelSpec:
    """Matches transformers' `Cohere2ForCausalLM`."""
    for name, values in _KNOWN.items():
        fields.expect(name, *values)
    bias = fields.flag("attention_bias", False)
    every = fields.integer("sliding_window_pattern", 4)
    fields.expect("layer_switch", every)
    types = layer_types(fields, every)
    positions = fields.integer("max_position_embeddings", _POSITIONS)
    rope = rope_spec(fields, head_width(fields), positions, 10000.0)
    made = dense_spec(
        fields,
        max_positions=_POSITIONS,
        tied=True,
        qkv_bias=bias,
        out_bias=bias,
        norm=layer_norm(fields),
        windows=typed_windows(fields, types, 4096),
        ropes=tuple(rope if kind == "sliding_attention" else None for kind in types),
    )
    return side_by_side(fields, made)
