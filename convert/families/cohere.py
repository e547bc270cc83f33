"""Cohere's Command R: one LayerNorm for both branches, side by side; rotation of neighbours."""

from dataclasses import replace

from ...nn.spec import AttentionSpec, ModelSpec, NormSpec
from ..config_fields import Fields
from ..dense import dense_spec, map_attention, with_attention, with_layers
from ..names import LLAMA, QK_NORMS, names

NAMES = names(LLAMA, QK_NORMS)
_POSITIONS = 8192


def spec(fields: Fields) -> ModelSpec:
    """Matches transformers' `CohereForCausalLM`."""
    norm = layer_norm(fields)
    bias = fields.flag("attention_bias", False)
    made = dense_spec(
        fields,
        max_positions=_POSITIONS,
        tied=True,
        qkv_bias=bias,
        out_bias=bias,
        norm=norm,
        qk_norm=fields.flag("use_qk_norm", False),
    )
    made = with_attention(made, qk_norm_over="heads")
    # The context that published files were trained for; the other field is smaller.
    reach = fields.integer("model_max_length", made.max_positions)
    return side_by_side(fields, replace(made, max_positions=max(reach, made.max_positions)))


def layer_norm(fields: Fields) -> NormSpec:
    """LayerNorm without a bias."""
    return NormSpec(fields.number("layer_norm_eps", 1e-5), kind="layer")


def side_by_side(fields: Fields, spec: ModelSpec) -> ModelSpec:
    """With parallel branches, neighbouring features rotated, and the logits' multiplier."""

    def turned(_: int, attention: AttentionSpec) -> AttentionSpec:
        rope = attention.rope
        return replace(attention, rope=None if rope is None else replace(rope, interleaved=True))

    made = with_layers(map_attention(spec, turned), parallel=True)
    return replace(made, logit_scale=fields.number("logit_scale", 0.0625))
