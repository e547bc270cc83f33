"""GPT-2: learned positions, LayerNorm, weights stored [in, out], q, k and v in one matrix."""

from dataclasses import replace

from ...nn.spec import ModelSpec, NormSpec
from ..config_fields import Fields
from ..dense import ACTIVATIONS, dense_spec, map_attention, without_gate
from ..names import names

_TABLE = {
    "embed": "wte",
    "positions": "wpe",
    "layers.*.attn_norm": "h.*.ln_1",
    **{f"layers.*.attn.{x}": f"h.*.attn.{x}_proj" for x in "qkv"},
    "layers.*.attn.o": "h.*.attn.c_proj",
    "layers.*.mlp_norm": "h.*.ln_2",
    "layers.*.mlp.up": "h.*.mlp.c_fc",
    "layers.*.mlp.down": "h.*.mlp.c_proj",
    "norm": "ln_f",
}
_QKV = tuple(f"layers.*.attn.{x}" for x in "qkv")
_CONV = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
# Published files have the names with and without the prefix.
_PREFIXES = ("transformer.", "")
NAMES = names(
    {ours: "transformer." + hf for ours, hf in _TABLE.items()},
    {"head": "lm_head"},
    fused={f"{prefix}h.*.attn.c_attn": _QKV for prefix in _PREFIXES},
    aliases={hf: ours for ours, hf in _TABLE.items()},
    transposed=[f"{prefix}h.*.{module}" for prefix in _PREFIXES for module in _CONV],
)
_FIELDS = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings",
    "n_inner": "intermediate_size",
}
# Dropout of the pretraining, an order of operations, and what only classifiers read.
_UNREAD = """
    attn_pdrop embd_pdrop resid_pdrop reorder_and_upcast_attn n_ctx summary_activation
    summary_first_dropout summary_proj_to_labels summary_type summary_use_proj
""".split()


def spec(fields: Fields) -> ModelSpec:
    """Matches transformers' `GPT2LMHeadModel` in eval mode: its published files carry the
    pretraining's dropout, which is left out of fine-tuning.
    """
    for name in _UNREAD:
        fields.take(name, None)
    for old, new in _FIELDS.items():
        fields.rename(old, new)
    fields.expect("add_cross_attention", False)
    if not fields.has("intermediate_size"):
        fields.put("intermediate_size", 4 * fields.integer("hidden_size"))
    depth = fields.integer("num_hidden_layers")
    scaled = fields.flag("scale_attn_weights", True)
    made = dense_spec(
        fields,
        max_positions=1024,
        tied=True,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        norm=NormSpec(fields.number("layer_norm_epsilon", 1e-5), kind="layer", bias=True),
        activation=fields.choice("activation_function", ACTIVATIONS, "gelu_new"),
        scale=None if scaled else 1.0,
        ropes=(None,) * depth,
    )
    made = replace(without_gate(made), learned_positions=True)
    if not fields.flag("scale_attn_by_inverse_layer_idx", False):
        return made
    return map_attention(
        made, lambda i, attention: replace(attention, scale=attention.scale / (i + 1))
    )
