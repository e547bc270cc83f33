"""Nemotron and Minitron: LayerNorm around 1, half of each head rotated, squared ReLU."""

from ...nn.spec import ModelSpec, NormSpec
from ..config_fields import Fields
from ..dense import ACTIVATIONS, dense_spec, head_width, without_gate
from ..names import LLAMA, names
from ..rope_config import rope_spec

NAMES = names(LLAMA)
_POSITIONS = 4096


def spec(fields: Fields) -> ModelSpec:
    """Matches transformers' `NemotronForCausalLM`."""
    bias = fields.flag("attention_bias", False)
    positions = fields.integer("max_position_embeddings", _POSITIONS)
    rope = rope_spec(fields, head_width(fields), positions, 10000.0, partial=0.5)
    eps = fields.number("norm_eps", 1e-5)
    made = dense_spec(
        fields,
        max_positions=_POSITIONS,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=fields.flag("mlp_bias", False),
        norm=NormSpec(eps, offset=1.0, kind="layer", bias=True),
        activation=fields.choice("hidden_act", ACTIVATIONS, "relu2"),
        ropes=(rope,) * fields.integer("num_hidden_layers"),
    )
    return without_gate(made)
