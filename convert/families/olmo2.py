"""OLMo 2: norms after the branches only, q and k normalised over their whole width."""

from ...nn.spec import ModelSpec, NormSpec
from ..config_fields import Fields
from ..dense import dense_spec, with_attention, with_layers
from ..names import LLAMA, QK_NORMS, names

NAMES = names(
    LLAMA,
    QK_NORMS,
    {
        "layers.*.attn_post_norm": "model.layers.*.post_attention_layernorm",
        "layers.*.mlp_post_norm": "model.layers.*.post_feedforward_layernorm",
    },
)


def spec(fields: Fields) -> ModelSpec:
    """Matches transformers' `Olmo2ForCausalLM`."""
    bias = fields.flag("attention_bias", False)
    norm = NormSpec(fields.number("rms_norm_eps", 1e-5), cast_first=False)
    made = dense_spec(fields, qkv_bias=bias, out_bias=bias, norm=norm, qk_norm=True)
    return with_layers(with_attention(made, qk_norm_over="width"), pre_norm=False, post_norm=True)
