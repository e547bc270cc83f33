"""Ministral: Mistral with a window or none for each layer."""

from ...nn.spec import ModelSpec
from ..config_fields import Fields
from ..dense import dense_spec, layer_types, typed_windows
from ..names import LLAMA, names

NAMES = names(LLAMA)


def spec(fields: Fields) -> ModelSpec:
    """Matches transformers' `MinistralForCausalLM`."""
    depth = fields.integer("num_hidden_layers")
    window = fields.integer_or_null("sliding_window", 4096)
    # Without layer_types all layers slide, or none.
    types = layer_types(fields, every=depth + 1 if window else 1)
    return dense_spec(
        fields,
        kv_heads=8,
        max_positions=131072,
        windows=typed_windows(fields, types, 4096),
    )
