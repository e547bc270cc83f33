"""Falcon: one kv head (7B), one for each query head or groups (40B and later), branches side by
side or in turn, q, k and v in one matrix.
"""

from dataclasses import replace

from ...nn.spec import ModelSpec, NormSpec
from ..config_fields import Fields
from ..dense import ACTIVATIONS, dense_spec, with_attention, with_layers, without_gate
from ..names import Names, names

_LAYER = "transformer.h.*."
# Two norms side by side.
_TWO = {"layers.*.attn_norm": _LAYER + "ln_attn", "layers.*.mlp_norm": _LAYER + "ln_mlp"}
NAMES = names(
    {
        "embed": "transformer.word_embeddings",
        "layers.*.attn_norm": _LAYER + "input_layernorm",
        **{f"layers.*.attn.{x}": f"{_LAYER}self_attention.{x}_proj" for x in "qkv"},
        "layers.*.attn.o": _LAYER + "self_attention.dense",
        "layers.*.mlp_norm": _LAYER + "post_attention_layernorm",
        "layers.*.mlp.up": _LAYER + "mlp.dense_h_to_4h",
        "layers.*.mlp.down": _LAYER + "mlp.dense_4h_to_h",
        "norm": "transformer.ln_f",
        "head": "lm_head",
    },
    fused={_LAYER + "self_attention.query_key_value": tuple(f"layers.*.attn.{x}" for x in "qkv")},
    by_head=True,
    aliases={theirs: ours for ours, theirs in _TWO.items()},
    own_linear=True,
)


def names_of(spec: ModelSpec) -> Names:
    """What `FalconForCausalLM` calls the norms of such layers."""
    layer = spec.layers[0]
    two = layer.parallel and layer.own_norms
    return replace(NAMES, table=tuple((dict(NAMES.table) | _TWO).items())) if two else NAMES


def spec(fields: Fields) -> ModelSpec:
    """Matches transformers' `FalconForCausalLM`, which scales ALiBi's bias as it does scores."""
    fields.expect("apply_residual_connection_post_layernorm", False)
    grouped = fields.flag("new_decoder_architecture", False)
    shared, parallel = fields.flag("multi_query", True), fields.flag("parallel_attn", True)
    norms = fields.integer("num_ln_in_parallel_attn", 2 if grouped else 1)
    if norms > 1 + grouped or (grouped and not parallel):
        raise fields.error(
            f"num_ln_in_parallel_attn {norms} and parallel_attn {parallel} do not go with "
            f"new_decoder_architecture {grouped}"
        )
    heads = fields.integer("num_attention_heads")
    kv_heads = fields.integer("num_kv_heads", heads)
    fields.put("num_key_value_heads", kv_heads if grouped else 1 if shared else heads)
    dim = fields.integer("hidden_size")
    fields.put("intermediate_size", fields.integer("ffn_hidden_size", 4 * dim))
    bias = fields.flag("bias", False)
    made = dense_spec(
        fields,
        tied=True,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
        norm=NormSpec(fields.number("layer_norm_epsilon", 1e-5), kind="layer", bias=True),
        activation=fields.choice("activation", ACTIVATIONS, "gelu"),
    )
    if fields.flag("alibi", False):
        made = with_attention(made, rope=None, alibi=(dim // heads) ** -0.5)
    return with_layers(without_gate(made), parallel=parallel, own_norms=norms == 2)
