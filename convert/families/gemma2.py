"""Gemma 2: norms before and after each branch, soft caps, a window in every other layer."""

from dataclasses import replace

from ...nn.spec import Activation, ModelSpec
from ..config_fields import Fields
from ..dense import (
    ACTIVATIONS,
    dense_spec,
    layer_types,
    typed_windows,
    with_attention,
    with_layers,
)
from ..names import LLAMA, SANDWICH_NORMS, names
from .gemma import norm, scaled

NAMES = names(LLAMA, SANDWICH_NORMS)


def spec(fields: Fields) -> ModelSpec:
    """Matches transformers' `Gemma2ForCausalLM`."""
    bias = fields.flag("attention_bias", False)
    made = dense_spec(
        fields,
        head_dim=256,
        kv_heads=4,
        max_positions=8192,
        tied=True,
        qkv_bias=bias,
        out_bias=bias,
        norm=norm(fields),
        activation=activation(fields),
        scale=fields.number("query_pre_attn_scalar", 256) ** -0.5,
        windows=typed_windows(fields, layer_types(fields, every=2), 4096),
    )
    made = with_attention(made, softcap=fields.number_or_null("attn_logit_softcapping", 50.0))
    made = replace(made, logit_softcap=fields.number_or_null("final_logit_softcapping", 30.0))
    return scaled(with_layers(made, post_norm=True))


def activation(fields: Fields) -> Activation:
    """`hidden_activation`; published files repeat it as `hidden_act`."""
    found = fields.choice("hidden_activation", ACTIVATIONS, "gelu_pytorch_tanh")
    if fields.has("hidden_act") and fields.choice("hidden_act", ACTIVATIONS) != found:
        raise fields.error("hidden_act and hidden_activation contradict each other")
    return found
