"""Granite 3, dense: four multipliers over Llama's layout."""

from dataclasses import replace

from ...nn.spec import ModelSpec
from ..config_fields import Fields
from ..dense import dense_spec, with_layers
from ..names import LLAMA, names

NAMES = names(LLAMA)


def spec(fields: Fields) -> ModelSpec:
    """Matches transformers' `GraniteForCausalLM`."""
    bias = fields.flag("attention_bias", False)
    made = dense_spec(
        fields,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=fields.flag("mlp_bias", False),
        scale=fields.number("attention_multiplier", 1.0),
    )
    made = replace(
        made,
        embed_scale=fields.number("embedding_multiplier", 1.0),
        logit_scale=1.0 / fields.number("logits_scaling", 1.0),
    )
    return with_layers(made, residual_scale=fields.number("residual_multiplier", 1.0))
