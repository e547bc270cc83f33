"""Qwen3, dense: a norm per head on q and k instead of biases."""

from ...nn.spec import ModelSpec
from ..config_fields import Fields
from ..dense import dense_spec, sliding_windows
from ..names import LLAMA, QK_NORMS, names

NAMES = names(LLAMA, QK_NORMS)


def spec(fields: Fields) -> ModelSpec:
    """Matches transformers' `Qwen3ForCausalLM`."""
    bias = fields.flag("attention_bias", False)
    return dense_spec(
        fields,
        head_dim=128,
        kv_heads=32,
        max_positions=32768,
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=True,
        windows=sliding_windows(fields),
    )
