"""The fields that dense decoders have in common, read into a `ModelSpec`."""

from ..nn.spec import (
    Activation,
    AttentionSpec,
    LayerSpec,
    MLPSpec,
    ModelSpec,
    NormSpec,
)
from .config_fields import Fields
from .rope_config import context, rope_spec

# HF's names of activations (`ACT2FN`) and what they compute.
ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu2": "relu2",
}


def dense_spec(
    fields: Fields,
    *,
    head_dim: int | None = None,
    kv_heads: int | None = None,
    max_positions: int = 2048,
    qkv_bias: bool = False,
    out_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
    windows: tuple[int | None, ...] | None = None,
) -> ModelSpec:
    """A pre-norm decoder in Llama's vocabulary; the keywords are the family's own defaults."""
    dim = fields.integer("hidden_size")
    heads = fields.integer("num_attention_heads")
    depth = fields.integer("num_hidden_layers")
    kv = fields.integer("num_key_value_heads", kv_heads or heads)
    if heads % kv:
        raise fields.error(
            f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv}"
        )
    width = fields.integer("head_dim", head_dim or dim // heads)
    if not fields.has("head_dim") and head_dim is None and dim % heads:
        raise fields.error(f"hidden_size {dim} is no multiple of num_attention_heads {heads}")
    positions = fields.integer("max_position_embeddings", max_positions)
    norm = NormSpec(eps=fields.number("rms_norm_eps", 1e-6))
    rope = rope_spec(fields, width, positions, theta=10000.0)
    mlp = MLPSpec(
        dim=fields.integer("intermediate_size"),
        activation=fields.choice("hidden_act", ACTIVATIONS, "silu"),
        bias=mlp_bias,
    )

    def layer(window: int | None) -> LayerSpec:
        attention = AttentionSpec(
            heads=heads,
            kv_heads=kv,
            head_dim=width,
            scale=width**-0.5,
            rope=rope,
            qkv_bias=qkv_bias,
            out_bias=out_bias,
            qk_norm=norm if qk_norm else None,
            window=window,
        )
        return LayerSpec(norm=norm, attention=attention, mlp=mlp)

    return ModelSpec(
        vocab=fields.integer("vocab_size"),
        dim=dim,
        layers=tuple(layer(w) for w in windows or (None,) * depth),
        norm=norm,
        max_positions=context(rope, positions),
        tied=fields.flag("tie_word_embeddings", False),
        init_std=fields.number("initializer_range", 0.02, above=-1.0),
    )


def sliding_windows(fields: Fields) -> tuple[int | None, ...]:
    """Each layer's window by `use_sliding_window`, `max_window_layers` and `layer_types` (Qwen)."""
    depth = fields.integer("num_hidden_layers")
    used = fields.flag("use_sliding_window", False)
    window = fields.take("sliding_window", 4096)
    first = fields.integer("max_window_layers", 28, low=0)
    types = fields.texts("layer_types", depth, ("full_attention", "sliding_attention"))
    if not used:
        if types and "sliding_attention" in types:
            raise fields.error("layer_types asks for windows that use_sliding_window turns off")
        return (None,) * depth
    if types is None:
        types = ["sliding_attention" if i >= first else "full_attention" for i in range(depth)]
    if type(window) is not int or window < 1:
        raise fields.error(f"sliding_window is {window!r}, expected a positive integer")
    return tuple(window if kind == "sliding_attention" else None for kind in types)
