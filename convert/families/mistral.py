"""Mistral 7B and its dense successors: one sliding window for all layers, or none."""

from ...nn.spec import ModelSpec
from ..config_fields import Fields
from ..dense import dense_spec
from ..names import LLAMA, names

NAMES = names(LLAMA)


def spec(fields: Fields) -> ModelSpec:
    """Matches transformers' `MistralForCausalLM`."""
    # Absent means 4096, null means no window.
    window = fields.raw.get("sliding_window", 4096)
    fields.taken.add("sliding_window")
    if window is not None and (type(window) is not int or window < 1):
        raise fields.error(f"sliding_window is {window!r}, expected a positive integer or null")
    return dense_spec(
        fields,
        kv_heads=8,
        max_positions=131072,
        windows=(window,) * fields.integer("num_hidden_layers"),
    )
