"""Llama 4's text models: chunks, layers without positions, mixtures weighed at their inputs."""

from dataclasses import replace

from ...nn.spec import LayerSpec, ModelSpec, NormSpec
from ..config_fields import Fields
from ..dense import dense_spec, head_width, rotated_layers, typed_windows
from ..mixture import (
    expert_names,
    interleaved_layers,
    mlp_spec,
    moe_spec,
    shared_names,
    stacked,
    with_experts,
)
from ..names import LLAMA, names
from ..rope_config import rope_spec, temperature

_BLOCK, _STACKS = "model.layers.*.feed_forward", stacked("feed_forward")
NAMES = names(
    LLAMA,
    expert_names("feed_forward", router="router"),
    shared_names("feed_forward.shared_expert"),
    {f"layers.*.mlp.{x}": f"{_BLOCK}.{x}_proj" for x in ("gate", "up", "down")},
    fused=_STACKS,
    transposed=_STACKS,
    peft_swaps=True,
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
    unturned = temperature(fields)
    qk_norm = replace(norm, weight=False) if fields.flag("use_qk_norm", True) else None
    kinds = ("full_attention", "chunked_attention")
    types = fields.texts("layer_types", depth, kinds) or [kinds[turned] for turned in turns]
    chunks = typed_windows(fields, types, 8192, name="attention_chunk_size", of=kinds[1])
    dense = mlp_spec(fields, "intermediate_size_mlp", 16384)

    def layer(like: LayerSpec, turned: bool, chunk: int | None) -> LayerSpec:
        assert like.attention is not None
        attention = replace(
            like.attention,
            rope=rope if turned else unturned,
            qk_norm=qk_norm if turned else None,
            qk_norm_after=turned,
            chunk=chunk,
        )
        return replace(like, attention=attention, mlp=dense)

    made = replace(made, layers=tuple(map(layer, made.layers, turns, chunks)))
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
    return with_experts(made, moe, interleaved_layers(fields))
