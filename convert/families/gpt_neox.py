"""GPT-NeoX and Pythia: LayerNorm, branches side by side with a norm each, q, k and v in one matrix
head by head, a quarter of each head rotated.
"""

from ...nn.spec import ModelSpec, NormSpec
from ..config_fields import Fields
from ..dense import ACTIVATIONS, dense_spec, head_width, with_layers, without_gate
from ..names import names
from ..rope_config import rope_spec

_LAYER = "gpt_neox.layers.*."
NAMES = names(
    {
        "embed": "gpt_neox.embed_in",
        "layers.*.attn_norm": _LAYER + "input_layernorm",
        **{f"layers.*.attn.{x}": f"{_LAYER}attention.{x}_proj" for x in "qkv"},
        "layers.*.attn.o": _LAYER + "attention.dense",
        "layers.*.mlp_norm": _LAYER + "post_attention_layernorm",
        "layers.*.mlp.up": _LAYER + "mlp.dense_h_to_4h",
        "layers.*.mlp.down": _LAYER + "mlp.dense_4h_to_h",
        "norm": "gpt_neox.final_layer_norm",
        "head": "lm_head",
    },
    fused={_LAYER + "attention.query_key_value": tuple(f"layers.*.attn.{x}" for x in "qkv")},
    by_head=True,
    # As files have it.
    aliases={"embed_out": "head"},
)
_POSITIONS = 2048


def spec(fields: Fields) -> ModelSpec:
    """Matches transformers' `GPTNeoXForCausalLM`."""
    fields.take("classifier_dropout", None)
    fields.rename("rotary_emb_base", "rope_theta")
    fields.rename("rotary_pct", "partial_rotary_factor")
    bias = fields.flag("attention_bias", True)
    positions = fields.integer("max_position_embeddings", _POSITIONS)
    rope = rope_spec(fields, head_width(fields), positions, 10000.0, partial=0.25)
    made = dense_spec(
        fields,
        max_positions=_POSITIONS,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=True,
        norm=NormSpec(fields.number("layer_norm_eps", 1e-5), kind="layer", bias=True),
        activation=fields.choice("hidden_act", ACTIVATIONS, "gelu"),
        ropes=(rope,) * fields.integer("num_hidden_layers"),
    )
    parallel = fields.flag("use_parallel_residual", True)
    return with_layers(without_gate(made), parallel=parallel, own_norms=parallel)
