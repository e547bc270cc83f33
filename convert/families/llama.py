"""Llama 1 to 3.x, and what reuses its model_type (SmolLM, TinyLlama, Yi, Vicuna...)."""

from ...nn.spec import ModelSpec
from ..config_fields import Fields
from ..dense import dense_spec
from ..names import LLAMA, names

NAMES = names(LLAMA)


def spec(fields: Fields) -> ModelSpec:
    """Matches transformers' `LlamaForCausalLM`."""
    bias = fields.flag("attention_bias", False)
    return dense_spec(fields, qkv_bias=bias, out_bias=bias, mlp_bias=fields.flag("mlp_bias", False))
