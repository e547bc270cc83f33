"""Gemma 1: scaled embeddings, norms around 1, GeGLU."""

from dataclasses import replace

from ...nn.spec import Activation, ModelSpec, NormSpec
from ..config_fields import Fields
from ..dense import ACTIVATIONS, dense_spec
from ..names import LLAMA, names

NAMES = names(LLAMA)


def spec(fields: Fields) -> ModelSpec:
    """Matches transformers' `GemmaForCausalLM`."""
    bias = fields.flag("attention_bias", False)
    made = dense_spec(
        fields,
        head_dim=256,
        kv_heads=16,
        max_positions=8192,
        tied=True,
        qkv_bias=bias,
        out_bias=bias,
        norm=norm(fields),
        activation=_activation(fields),
    )
    return scaled(made)


def norm(fields: Fields) -> NormSpec:
    """Gemma's norm: the stored weight is the difference from 1, and the product is fp32."""
    return NormSpec(fields.number("rms_norm_eps", 1e-6), offset=1.0, cast_first=False)


def scaled(spec: ModelSpec) -> ModelSpec:
    """With embeddings multiplied by the root of their width, rounded to their dtype."""
    return replace(spec, embed_scale=spec.dim**0.5, embed_scale_rounded=True)


def _activation(fields: Fields) -> Activation:
    # Early files say "gelu" and mean its tanh form.
    choices = {**ACTIVATIONS, "gelu": ACTIVATIONS["gelu_pytorch_tanh"]}
    found = fields.choice("hidden_act", choices, "gelu_pytorch_tanh")
    if fields.choice("hidden_activation", choices, fields.take("hidden_act", "gelu")) != found:
        raise fields.error("hidden_act and hidden_activation contradict each other")
    return found
