"""StarCoder 2: LayerNorm, biases everywhere, an MLP without a gate."""

from ...nn.spec import ModelSpec, NormSpec
from ..config_fields import Fields
from ..dense import ACTIVATIONS, dense_spec, without_gate
from ..names import LLAMA, names

NAMES = names(
    LLAMA,
    {
        "layers.*.mlp.up": "model.layers.*.mlp.c_fc",
        "layers.*.mlp.down": "model.layers.*.mlp.c_proj",
    },
)
# What published files say beside the fields that transformers reads.
_KNOWN = {"mlp_type": ("default",), "norm_type": ("layer_norm",)}


def spec(fields: Fields) -> ModelSpec:
    """Matches transformers' `Starcoder2ForCausalLM`."""
    for name, values in _KNOWN.items():
        fields.expect(name, *values)
    bias = fields.flag("use_bias", True)
    window = fields.integer_or_null("sliding_window", None)
    made = dense_spec(
        fields,
        kv_heads=2,
        max_positions=4096,
        tied=True,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
        norm=NormSpec(fields.number("norm_epsilon", 1e-5), kind="layer", bias=True),
        activation=fields.choice("hidden_act", ACTIVATIONS, "gelu_pytorch_tanh"),
        windows=(window,) * fields.integer("num_hidden_layers"),
    )
    return without_gate(made)
