"""SmolLM3: every fourth layer without positions."""

from ...nn.spec import ModelSpec
from ..config_fields import Fields
from ..dense import dense_spec, head_width, rotated_layers
from ..names import LLAMA, names
from ..rope_config import rope_spec

NAMES = names(LLAMA)
_POSITIONS, _THETA = 32768, 2e6


def spec(fields: Fields) -> ModelSpec:
    """Matches transformers' `SmolLM3ForCausalLM`."""
    bias = fields.flag("attention_bias", False)
    rotated = rotated_layers(fields)
    positions = fields.integer("max_position_embeddings", _POSITIONS)
    rope = rope_spec(fields, head_width(fields), positions, _THETA)
    return dense_spec(
        fields,
        kv_heads=4,
        max_positions=_POSITIONS,
        tied=True,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=fields.flag("mlp_bias", False),
        windows=_windows(fields, rotated),
        ropes=tuple(rope if turned else None for turned in rotated),
    )


def _windows(fields: Fields, rotated: list[bool]) -> tuple[int | None, ...]:
    used = fields.flag("use_sliding_window", False)
    window = fields.integer_or_null("sliding_window", None)
    types = fields.texts("layer_types", len(rotated), ("full_attention", "sliding_attention"))
    if types is None:
        slides = [used and window is not None and not turned for turned in rotated]
    else:
        slides = [kind == "sliding_attention" for kind in types]
    if any(slides) and (not used or window is None):
        raise fields.error(
            "layer_types has sliding_attention, and use_sliding_window or sliding_window is off"
        )
    return tuple(window if slide else None for slide in slides)
