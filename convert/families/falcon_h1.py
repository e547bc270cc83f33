"""Falcon-H1: attention and Mamba 2 side by side in every layer, with muP multipliers."""

from dataclasses import replace

from ...nn.spec import LayerSpec, MLPSpec, ModelSpec, NormSpec
from ..config_fields import Fields
from ..dense import dense_spec, head_width, with_attention
from ..hybrid import mamba2_names, mamba2_spec
from ..names import LLAMA, names

_LAYER = "model.layers.*."
NAMES = names(
    LLAMA,
    mamba2_names("mamba"),
    {
        "layers.*.mlp_norm": _LAYER + "pre_ff_layernorm",
        "layers.*.mlp.gate": _LAYER + "feed_forward.gate_proj",
        "layers.*.mlp.up": _LAYER + "feed_forward.up_proj",
        "layers.*.mlp.down": _LAYER + "feed_forward.down_proj",
        "norm": "model.final_layernorm",
    },
    # Its kernels for training read the weight itself, past an adapter.
    peft_refuses=("out_proj",),
)


def spec(fields: Fields) -> ModelSpec:
    """Matches transformers' `FalconH1ForCausalLM`."""
    bias = fields.flag("attention_bias", False)
    norm = NormSpec(fields.number("rms_norm_eps", 1e-5))
    for name in ("num_logits_to_keep", "mlp_expansion_factor"):
        fields.take(name, None)
    fields.expect("mamba_use_mlp", True)
    fields.expect("attn_layer_indices")
    made = dense_spec(
        fields,
        kv_heads=8,
        max_positions=8192,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=fields.flag("mlp_bias", False),
        norm=norm,
        # Queries meet keys times a multiplier.
        scale=head_width(fields) ** -0.5 * fields.number("key_multiplier", 1.0),
    )
    made = replace(
        with_attention(
            made,
            in_scale=fields.number("attention_in_multiplier", 1.0),
            out_scale=fields.number("attention_out_multiplier", 1.0),
        ),
        embed_scale=fields.number("embedding_multiplier", 1.0),
        logit_scale=fields.number("lm_head_multiplier", 1.0),
    )
    normed = fields.flag("mamba_rms_norm", False)
    first = fields.flag("mamba_norm_before_gate", True)
    expanded = fields.integer("mamba_expand", 2) * made.dim
    gate, x, b, c, dt = fields.numbers("ssm_multipliers", 5, 1.0)
    mamba = mamba2_spec(
        fields,
        fields.integer_or_null("mamba_d_ssm", 1024) or expanded,
        out_bias=fields.flag("projectors_bias", False),
        norm=norm if normed else None,
        norm_first=first,
        in_scale=fields.number("ssm_in_multiplier", 1.0),
        scales=(gate, x, b, c, dt),
        out_scale=fields.number("ssm_out_multiplier", 1.0),
    )
    gate, down = fields.numbers("mlp_multipliers", 2, 1.0)

    def hybrid(layer: LayerSpec) -> LayerSpec:
        assert isinstance(layer.mlp, MLPSpec)
        mlp = replace(layer.mlp, gate_scale=gate, down_scale=down)
        return replace(layer, recurrent=mamba, mlp=mlp)

    return replace(made, layers=tuple(map(hybrid, made.layers)))
