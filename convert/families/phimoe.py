"""Phi-3.5-MoE: Mixtral's shape with LayerNorms, biases, LongRoPE and SparseMixer's routing."""

from dataclasses import replace

from ...nn.spec import ModelSpec, NormSpec
from ..config_fields import Fields
from ..dense import dense_spec, head_width
from ..mixture import expert_names, mlp_spec, moe_spec, stacked, with_experts
from ..names import LLAMA, names
from ..rope_config import rope_spec

NAMES = names(
    LLAMA,
    expert_names("block_sparse_moe", "w1", "w3", "w2"),
    # As transformers 5 has them in memory.
    fused=stacked("mlp"),
    aliases={"model.layers.*.mlp.router": "layers.*.mlp.router"},
)
_POSITIONS = 131072


def spec(fields: Fields) -> ModelSpec:
    """Matches transformers' `PhimoeForCausalLM` in evaluation.

    Past `original_max_position_embeddings` the long factors act, as in Microsoft's own model code;
    transformers 5 takes the short ones there. Training is routed as inference is, without the
    reference's noise: it draws an expert among those within the tolerance, and jitters inputs, to
    estimate the gradient of a router that is trained. Beside a frozen one it would only train the
    adapters for other experts than will be taken, and make an accumulated step unlike a whole one.
    `input_jitter_noise` acts on nothing.
    """
    depth = fields.integer("num_hidden_layers")
    bias = fields.flag("attention_bias", False)
    positions = fields.integer("max_position_embeddings", _POSITIONS)
    original = fields.take("original_max_position_embeddings", None)
    rope = rope_spec(fields, head_width(fields), positions, 1e6, original=original, magnitudes=True)
    if rope.kind not in ("default", "longrope"):
        raise fields.error(f"rope type {rope.kind!r}: the model has only default and longrope")
    made = dense_spec(
        fields,
        kv_heads=8,
        max_positions=_POSITIONS,
        qkv_bias=bias,
        out_bias=bias,
        norm=NormSpec(fields.number("rms_norm_eps", 1e-5), kind="layer", bias=True),
        windows=(fields.integer_or_null("sliding_window", None),) * depth,
        ropes=(rope,) * depth,
    )
    fields.take("input_jitter_noise", 0.0)
    fields.expect("num_experts_per_tok", 2)
    moe = moe_spec(
        fields,
        mlp_spec(fields, "intermediate_size", 6400),
        count="num_local_experts",
        experts=16,
        active=2,
        router="sparse_mixer",
        tolerance=2 * fields.number("router_jitter_noise", 0.01, above=-1.0),
    )
    head_bias = fields.flag("lm_head_bias", False)
    return replace(with_experts(made, moe), head_bias=head_bias)
