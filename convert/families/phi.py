"""Phi-1, Phi-1.5 and Phi-2: branches side by side over one LayerNorm, biases on the head too."""

from dataclasses import replace

from ...nn.spec import ModelSpec, NormSpec
from ..config_fields import Fields
from ..dense import ACTIVATIONS, dense_spec, head_width, with_layers, without_gate
from ..names import LLAMA, names
from ..rope_config import rope_spec

_LAYER = "model.layers.*."
NAMES = names(
    LLAMA,
    {
        "layers.*.attn.o": _LAYER + "self_attn.dense",
        "layers.*.attn.q_norm": _LAYER + "self_attn.q_layernorm",
        "layers.*.attn.k_norm": _LAYER + "self_attn.k_layernorm",
        "layers.*.mlp.up": _LAYER + "mlp.fc1",
        "layers.*.mlp.down": _LAYER + "mlp.fc2",
        "norm": "model.final_layernorm",
    },
)
_POSITIONS = 2048


def spec(fields: Fields) -> ModelSpec:
    """Matches transformers' `PhiForCausalLM`."""
    positions = fields.integer("max_position_embeddings", _POSITIONS)
    rope = rope_spec(fields, head_width(fields), positions, 10000.0, partial=0.5)
    made = dense_spec(
        fields,
        max_positions=_POSITIONS,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        norm=NormSpec(fields.number("layer_norm_eps", 1e-5), kind="layer", bias=True),
        qk_norm=fields.flag("qk_layernorm", False),
        activation=fields.choice("hidden_act", ACTIVATIONS, "gelu_new"),
        ropes=(rope,) * fields.integer("num_hidden_layers"),
    )
    return replace(with_layers(without_gate(made), parallel=True), head_bias=True)
