"""EXAONE 4: norms after the branches and on q and k; positions only where there is a window."""

from ...nn.spec import ModelSpec, NormSpec
from ..config_fields import Fields
from ..dense import dense_spec, head_width, layer_types, typed_windows, with_layers
from ..names import LLAMA, POST_NORMS, QK_NORMS, names
from ..rope_config import rope_spec

NAMES = names(LLAMA, QK_NORMS, POST_NORMS)


def spec(fields: Fields) -> ModelSpec:
    """Matches transformers' `Exaone4ForCausalLM`."""
    window = fields.integer_or_null("sliding_window", 4096)
    if fields.has("layer_types"):
        fields.take("sliding_window_pattern", None)  # may be a text; layer_types says it all
    elif window is None:
        raise fields.error("sliding_window is null, and there are no layer_types")
    types = layer_types(fields, _every(fields))
    positions = fields.integer("max_position_embeddings", 2048)
    rope = rope_spec(fields, head_width(fields), positions, 10000.0)
    made = dense_spec(
        fields,
        kv_heads=32,
        norm=NormSpec(fields.number("rms_norm_eps", 1e-5)),
        qk_norm=True,
        windows=typed_windows(fields, types, 4096),
        ropes=tuple(rope if not window or t == "sliding_attention" else None for t in types),
    )
    return with_layers(made, pre_norm=False, post_norm=True)


def _every(fields: Fields) -> int:
    return 4 if fields.has("layer_types") else fields.integer("sliding_window_pattern", 4)
