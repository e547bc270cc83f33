"""Llama 4's text models: chunks, layers without positions, mixtures weighed at their inputs."""

from dataclasses import replace

from ...nn.spec import LayerSpec, ModelSpec, NormSpec, RopeSpec
from ..config_fields import Fields
from ..dense import dense_spec, head_width, rotated_layers
from ..mixture import (
    expert_names,
    layer_numbers,
    mlp_spec,
    moe_spec,
    shared_names,
    stacked,
    with_experts,
)
from ..names import LLAMA, names
from ..rope_config import rope_spec

_BLOCK = "model.layers.*.feed_forward"
_STACKS = stacked("feed_forward")
NAMES = names(
    LLAMA,
    expert_names("feed_forward", router="router"),
    shared_names("feed_forward.shared_expert"),
    {
        "layers.*.mlp.gate": f"{_BLOCK}.gate_proj",
        "layers.*.mlp.up": f"{_BLOCK}.up_proj",
        "layers.*.mlp.down": f"{_BLOCK}.down_proj",
    },
    fused=_STACKS,
    transposed=_STACKS,
)
_POSITIONS = 131072


def spec(fields: Fields) -> ModelSpec:
    """Matches transformers' `Llama4ForCausalLM`."""
    depth = fields.integer("num_hidden_layers")
    bias = fields.flag("attention_bias", False)
    norm = NormSpec(fields.number("rms_norm_eps", 1e-5))
    made = dense_spec(
        fields,
        head_dim=128,
        kv_heads=8,
        max_positions=_POSITIONS,
        theta=5e5,
        qkv_bias=bias,
        out_bias=bias,
        norm=norm,
        ropes=(None,) * depth,
    )
    turns = rotated_layers(fields)
    positions = fields.integer("max_position_embeddings", _POSITIONS)
    rope = rope_spec(fields, head_width(fields, 128), positions, 5e5, interleaved=True)
    tempered = RopeSpec(
        dim=0,
        theta=1.0,
        original_positions=fields.integer("floor_scale", 8192),
        query_beta=fields.number("attn_scale", 0.1, above=-1.0),
        query_shift=1,
    )
    tuned = fields.take("attn_temperature_tuning", True)
    if not isinstance(tuned, bool | int):
        raise fields.error(f"attn_temperature_tuning is {tuned!r:.200}, expected true or false")
    unturned = tempered if tuned else None
    qk_norm = replace(norm, weight=False) if fields.flag("use_qk_norm", True) else None
    kinds = ("full_attention", "chunked_attention")
    types = fields.texts("layer_types", depth, kinds) or [kinds[turned] for turned in turns]
    chunk = fields.integer_or_null("attention_chunk_size", 8192)
    if chunk is None and "chunked_attention" in types:
        raise fields.error("attention_chunk_size is null, and layer_types has chunked_attention")
    dense = mlp_spec(fields, "intermediate_size_mlp", 16384)

    def layer(like: LayerSpec, turned: bool, kind: str) -> LayerSpec:
        assert like.attention is not None
        attention = replace(
            like.attention,
            rope=rope if turned else unturned,
            qk_norm=qk_norm if turned else None,
            qk_norm_after=turned,
            chunk=chunk if kind == "chunked_attention" else None,
        )
        return replace(like, attention=attention, mlp=dense)

    made = replace(made, layers=tuple(map(layer, made.layers, turns, types)))
    step = fields.integer("interleave_moe_layer_step", 1)
    sparse = layer_numbers(fields, "moe_layers", range(step - 1, depth, step))
    for name in ("router_jitter_noise", "for_llm_compressor"):  # which no code reads
        fields.take(name, None)
    each = mlp_spec(fields, "intermediate_size", 8192)
    moe = moe_spec(
        fields,
        each,
        count="num_local_experts",
        experts=16,
        active=1,
        router="top_sigmoid",
        weigh_inputs=True,
        shared=each,
    )
    return with_experts(made, moe, frozenset(range(depth)) - sparse)
