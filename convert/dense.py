"""The fields that dense decoders have in common, read into a `ModelSpec`."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..nn.spec import (
    Activation,
    AttentionSpec,
    LayerSpec,
    MLPSpec,
    ModelSpec,
    NormSpec,
    RopeSpec,
)
from .config_fields import Fields
from .rope_config import context, rope_spec

# HF's names of activations (`ACT2FN`) and what they compute.
ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu2": "relu2",
}


def dense_spec(
    fields: Fields,
    *,
    head_dim: int | None = None,
    kv_heads: int | None = None,
    max_positions: int = 2048,
    theta: float = 10000.0,
    tied: bool = False,
    qkv_bias: bool = False,
    out_bias: bool = False,
    mlp_bias: bool = False,
    norm: NormSpec | None = None,
    qk_norm: NormSpec | bool = False,
    activation: Activation | None = None,
    scale: float | None = None,
    windows: tuple[int | None, ...] | None = None,
    ropes: tuple[RopeSpec | None, ...] | None = None,
) -> ModelSpec:
    """A pre-norm decoder in Llama's vocabulary; the keywords are the family's own defaults.

    norm, activation, scale: in place of what rms_norm_eps, hidden_act and the head width say.
    qk_norm: True for one like `norm`. windows, ropes: one a layer.
    """
    dim = fields.integer("hidden_size")
    heads = fields.integer("num_attention_heads")
    depth = fields.integer("num_hidden_layers")
    kv = fields.integer("num_key_value_heads", kv_heads or heads)
    if heads % kv:
        raise fields.error(
            f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv}"
        )
    width = head_width(fields, head_dim)
    positions = fields.integer("max_position_embeddings", max_positions)
    norm = norm or NormSpec(eps=fields.number("rms_norm_eps", 1e-6))
    ropes = ropes or (rope_spec(fields, width, positions, theta),) * depth
    windows = windows or (None,) * depth
    mlp = MLPSpec(
        dim=fields.integer("intermediate_size"),
        activation=fields.choice("hidden_act", ACTIVATIONS, "silu")
        if activation is None
        else activation,
        bias=mlp_bias,
    )

    def layer(window: int | None, rope: RopeSpec | None) -> LayerSpec:
        attention = AttentionSpec(
            heads=heads,
            kv_heads=kv,
            head_dim=width,
            scale=width**-0.5 if scale is None else scale,
            rope=rope,
            qkv_bias=qkv_bias,
            out_bias=out_bias,
            qk_norm=(norm if qk_norm else None) if isinstance(qk_norm, bool) else qk_norm,
            window=window,
        )
        return LayerSpec(norm=norm, attention=attention, mlp=mlp)

    reach = [context(rope, positions) for rope in ropes if rope is not None]
    return ModelSpec(
        vocab=fields.integer("vocab_size"),
        dim=dim,
        layers=tuple(map(layer, windows, ropes)),
        norm=norm,
        max_positions=max(reach, default=positions),
        tied=fields.flag("tie_word_embeddings", tied),
        init_std=fields.number("initializer_range", 0.02, above=-1.0),
    )


def head_width(fields: Fields, default: int | None = None) -> int:
    """`head_dim`, which is the model's width over its heads where nothing else is said."""
    dim, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    if not fields.has("head_dim") and default is None and dim % heads:
        raise fields.error(f"hidden_size {dim} is no multiple of num_attention_heads {heads}")
    return fields.integer("head_dim", default or dim // heads)


def with_layers(spec: ModelSpec, **changes: Any) -> ModelSpec:
    """The spec with these fields in every layer."""
    return replace(spec, layers=tuple(replace(layer, **changes) for layer in spec.layers))


def with_attention(spec: ModelSpec, **changes: Any) -> ModelSpec:
    """The spec with these fields in every layer's attention."""
    return map_attention(spec, lambda _, attention: replace(attention, **changes))


def map_attention(
    spec: ModelSpec, changed: Callable[[int, AttentionSpec], AttentionSpec]
) -> ModelSpec:
    """The spec with changed(number of the layer, its attention) where a layer has attention."""
    layers = (
        layer if layer.attention is None else replace(layer, attention=changed(i, layer.attention))
        for i, layer in enumerate(spec.layers)
    )
    return replace(spec, layers=tuple(layers))


def without_gate(spec: ModelSpec) -> ModelSpec:
    """The spec with MLPs of one projection in and one out."""

    def changed(layer: LayerSpec) -> LayerSpec:
        assert isinstance(layer.mlp, MLPSpec)
        return replace(layer, mlp=replace(layer.mlp, gated=False))

    return replace(spec, layers=tuple(map(changed, spec.layers)))


def rotated_layers(fields: Fields) -> list[bool]:
    """Which layers have positions: `no_rope_layers` says 1 for those that do (SmolLM3, Llama 4)."""
    depth = fields.integer("num_hidden_layers")
    every = fields.integer("no_rope_layer_interval", 4)
    default = [int((i + 1) % every != 0) for i in range(depth)]
    given = fields.take("no_rope_layers", None) or default
    fits = isinstance(given, list) and len(given) == depth
    if not fits or not all(type(x) in (bool, int) and x in (0, 1) for x in given):
        raise fields.error(f"no_rope_layers is {given!r:.200}, expected a 0 or 1 for each layer")
    return [bool(x) for x in given]


def layer_types(fields: Fields, every: int, last: str | None = None) -> list[str]:
    """`layer_types`; where there are none, each `every`-th layer is full and the others slide.

    last: the type that the last layer has, whatever its number.
    """
    depth = fields.integer("num_hidden_layers")
    types = fields.texts("layer_types", depth, ("full_attention", "sliding_attention"))
    if types is None:
        types = ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(depth)]
        types[-1] = last or types[-1]
    if last is not None and types[-1] != last:
        raise fields.error(f"layer_types ends with {types[-1]}, expected {last}")
    return types


def typed_windows(
    fields: Fields,
    types: list[str],
    default: int,
    *,
    name: str = "sliding_window",
    of: str = "sliding_attention",
) -> tuple[int | None, ...]:
    """Each layer's window: the field `name` where its type is `of`."""
    window = fields.integer_or_null(name, default)
    if window is None and of in types:
        raise fields.error(f"{name} is null, and layer_types has {of}")
    return tuple(window if kind == of else None for kind in types)


def sliding_windows(
    fields: Fields, slides: Callable[[int, int], bool] = lambda i, first: i >= first
) -> tuple[int | None, ...]:
    """Each layer's window by `use_sliding_window`, `max_window_layers` and `layer_types` (Qwen).

    slides: of a layer's number and `max_window_layers`, whether it slides where no types say so.
    """
    depth = fields.integer("num_hidden_layers")
    used = fields.flag("use_sliding_window", False)
    bound = fields.integer("max_window_layers", 28, low=0)
    types = fields.texts("layer_types", depth, ("full_attention", "sliding_attention"))
    if not used:
        if types and "sliding_attention" in types:
            raise fields.error("layer_types asks for windows that use_sliding_window turns off")
        fields.take("sliding_window", None)
        return (None,) * depth
    window = fields.integer_or_null("sliding_window", 4096)
    if types is None:
        here = [window is not None and slides(i, bound) for i in range(depth)]
        types = ["sliding_attention" if one else "full_attention" for one in here]
    return typed_windows(fields, types, 4096)
