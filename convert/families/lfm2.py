"""LFM2: gated short convolutions, and attention with q/k norm in some of the layers."""

from ...nn.spec import MLPSpec, ModelSpec, NormSpec, ShortConvSpec
from ..config_fields import Fields
from ..dense import dense_spec, with_layers
from ..hybrid import with_recurrent
from ..names import LLAMA, names

_LAYER = "model.layers.*."
NAMES = names(
    LLAMA,
    {
        "layers.*.attn_norm": _LAYER + "operator_norm",
        "layers.*.attn.o": _LAYER + "self_attn.out_proj",
        "layers.*.attn.q_norm": _LAYER + "self_attn.q_layernorm",
        "layers.*.attn.k_norm": _LAYER + "self_attn.k_layernorm",
        "layers.*.recurrent.in": _LAYER + "conv.in_proj",
        "layers.*.recurrent.conv": _LAYER + "conv.conv",
        "layers.*.recurrent.out": _LAYER + "conv.out_proj",
        "layers.*.mlp_norm": _LAYER + "ffn_norm",
        "layers.*.mlp.gate": _LAYER + "feed_forward.w1",
        "layers.*.mlp.up": _LAYER + "feed_forward.w3",
        "layers.*.mlp.down": _LAYER + "feed_forward.w2",
        "norm": "model.embedding_norm",
    },
)
# What published files say beside the fields that transformers reads.
_IGNORED = ("block_mlp_init_scale", "block_out_init_scale", "block_use_xavier_init")


def spec(fields: Fields) -> ModelSpec:
    """Matches transformers' `Lfm2ForCausalLM`."""
    fields.rename("tie_embedding", "tie_word_embeddings")
    fields.rename("block_ff_dim", "intermediate_size")
    dim, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    norm = NormSpec(fields.number("norm_eps", 1e-5))
    for name in ("block_dim", "conv_dim", "conv_dim_out"):
        fields.expect(name, dim)
    for name in (*_IGNORED, "conv_use_xavier_init"):
        fields.take(name, None)
    fields.expect("num_heads", heads)
    fields.expect("block_norm_eps", norm.eps)
    fields.expect("block_use_swiglu", True)
    fields.expect("use_pos_enc", True)
    made = dense_spec(
        fields,
        kv_heads=8,
        max_positions=128_000,
        theta=1e6,
        tied=True,
        norm=norm,
        qk_norm=True,
        activation="silu",
    )
    conv = ShortConvSpec(dim, fields.integer("conv_L_cache", 3), fields.flag("conv_bias", False))
    made = with_recurrent(made, conv, _convolutions(fields, len(made.layers)))
    return with_layers(made, mlp=MLPSpec(_width(fields)))


def _convolutions(fields: Fields, depth: int) -> list[bool]:
    """Which layers have no attention: by `layer_types`, else those not in `full_attn_idxs`."""
    types = fields.texts("layer_types", depth, ("conv", "full_attention"))
    full = fields.take("full_attn_idxs", list(range(depth)))
    if not isinstance(full, list) or not all(type(i) is int and 0 <= i < depth for i in full):
        raise fields.error(f"full_attn_idxs is {full!r:.200}, expected numbers of layers")
    return [kind == "conv" for kind in types] if types else [i not in full for i in range(depth)]


def _width(fields: Fields) -> int:
    """The MLP's width: two thirds of what is said, scaled, and rounded up to a multiple."""
    width = fields.integer("intermediate_size")
    factor = fields.number_or_null("block_ffn_dim_multiplier", 1.0)
    multiple = fields.integer("block_multiple_of", 256)
    if not fields.flag("block_auto_adjust_ff_dim", True):
        return width
    width = int(2 * width / 3)
    return width if factor is None else -(-int(factor * width) // multiple) * multiple
