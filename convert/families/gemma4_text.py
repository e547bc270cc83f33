"""Gemma 4's text models: heads by type of layer, keys and values that layers share or that are one,
an input of each layer's own, a mixture beside the MLP.
"""

from dataclasses import replace

from ...nn.spec import ModelSpec, NormSpec
from ..config_fields import Fields
from ..dense import dense_spec, layer_types, typed_windows, with_layers
from ..layer_fields import FULL, layer_heads, layer_ropes, with_heads, with_inputs, with_lending
from ..mixture import beside, shared_names, stacked
from ..names import LLAMA, QK_NORMS, SANDWICH_NORMS, names
from .gemma import scaled
from .gemma2 import activation

_LAYER = "model.layers.*."
_OWN = {
    "inputs.gate": "per_layer_input_gate",
    "inputs.out": "per_layer_projection",
    "inputs.norm": "post_per_layer_input_norm",
    "scale": "layer_scalar",
    "mlp.router": "router.proj",
    "mlp.router.scale": "router.scale",
    "mlp.router.expert_scale": "router.per_expert_scale",
    "mlp.norm": "pre_feedforward_layernorm_2",
    "mlp.post_norm": "post_feedforward_layernorm_2",
    "mlp.shared_norm": "pre_feedforward_layernorm",
    "mlp.shared_post_norm": "post_feedforward_layernorm_1",
    **{f"mlp.experts.*.{part}": f"experts.*.{part}_proj" for part in ("gate", "up", "down")},
}
NAMES = names(
    *(LLAMA, QK_NORMS, SANDWICH_NORMS, shared_names("mlp")),
    {f"layers.*.{ours}": _LAYER + theirs for ours, theirs in _OWN.items()},
    {
        "layers.*": "model.layers.*",  # the scale
        "inputs.table": "model.embed_tokens_per_layer",
        "inputs.project": "model.per_layer_model_projection",
        "inputs.norm": "model.per_layer_projection_norm",
    },
    fused=stacked(),
)
_ROPES = {
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
_POSITIONS = 131072


def spec(fields: Fields) -> ModelSpec:
    """Matches transformers' `Gemma4ForCausalLM`, in which `use_bidirectional_attention` "vision" is
    of images.
    """
    fields.expect("use_bidirectional_attention", "vision", False)
    types, bias = layer_types(fields, 6, FULL), fields.flag("attention_bias", False)
    heads = layer_heads(fields, types, width=256, wide=512, kv_heads=4)
    norm = NormSpec(fields.number("rms_norm_eps", 1e-6), cast_first=False)
    made = dense_spec(
        fields,
        head_dim=256,
        kv_heads=4,
        max_positions=_POSITIONS,
        tied=True,
        qkv_bias=bias,
        out_bias=bias,
        norm=norm,
        qk_norm=True,
        activation=activation(fields),
        scale=1.0,
        windows=typed_windows(fields, types, 512),
        ropes=layer_ropes(fields, types, heads, _ROPES, _POSITIONS),
    )
    made = with_heads(fields, made, heads, v_norm=replace(norm, weight=False))
    made = with_layers(with_lending(fields, made, types), post_norm=True, scaled=True)
    cap = fields.number_or_null("final_logit_softcapping", None)
    made = beside(fields, with_inputs(fields, made, width=256))
    return replace(scaled(made), logit_softcap=cap)
