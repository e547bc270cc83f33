"""Apertus: an MLP without a gate around xIELU, whose scalars are trained; q and k normalised."""

from ...nn.spec import XIELU_BETA, XIELU_EPS, Activation, ModelSpec, NormSpec
from ..config_fields import Fields
from ..dense import ACTIVATIONS, dense_spec, without_gate
from ..names import LLAMA, QK_NORMS, names

_ACT = "model.layers.*.mlp.act_fn"
NAMES = names(
    LLAMA,
    QK_NORMS,
    {
        "layers.*.attn_norm": "model.layers.*.attention_layernorm",
        "layers.*.mlp_norm": "model.layers.*.feedforward_layernorm",
        "layers.*.mlp.act": _ACT,
    },
    constants={_ACT + ".beta": XIELU_BETA, _ACT + ".eps": XIELU_EPS},
)
_ACTIVATIONS: dict[str, Activation] = {**ACTIVATIONS, "xielu": "xielu"}
# What transformers takes where a config has no rope_parameters.
_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 12000000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 8192,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}


def spec(fields: Fields) -> ModelSpec:
    """Matches transformers' `ApertusForCausalLM`."""
    if not any(fields.has(name) for name in ("rope_parameters", "rope_scaling", "rope_theta")):
        fields.put("rope_parameters", _ROPE)
    bias = fields.flag("attention_bias", False)
    made = dense_spec(
        fields,
        max_positions=65536,
        theta=12000000.0,
        qkv_bias=bias,
        out_bias=bias,
        norm=NormSpec(fields.number("rms_norm_eps", 1e-5)),
        qk_norm=True,
        activation=fields.choice("hidden_act", _ACTIVATIONS, "xielu"),
    )
    return without_gate(made)
