"""Qwen2 and Qwen2.5: biases on q, k and v; windows on later layers where switched on."""

from ...nn.spec import ModelSpec
from ..config_fields import Fields
from ..dense import dense_spec, sliding_windows
from ..names import LLAMA, names

NAMES = names(LLAMA)


def spec(fields: Fields) -> ModelSpec:
    """Matches transformers' `Qwen2ForCausalLM`."""
    return dense_spec(
        fields,
        kv_heads=32,
        max_positions=32768,
        qkv_bias=True,
        windows=sliding_windows(fields),
    )
