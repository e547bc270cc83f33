"""Arcee's AFM: an MLP without a gate, of squared ReLU."""

from ...nn.spec import ModelSpec, NormSpec
from ..config_fields import Fields
from ..dense import ACTIVATIONS, dense_spec, without_gate
from ..names import LLAMA, names

NAMES = names(LLAMA)


def spec(fields: Fields) -> ModelSpec:
    """Matches transformers' `ArceeForCausalLM`."""
    bias = fields.flag("attention_bias", False)
    made = dense_spec(
        fields,
        max_positions=4096,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=fields.flag("mlp_bias", False),
        norm=NormSpec(fields.number("rms_norm_eps", 1e-5)),
        activation=fields.choice("hidden_act", ACTIVATIONS, "relu2"),
    )
    return without_gate(made)
