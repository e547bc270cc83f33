"""Fields by which layers of a model differ: their heads, whose keys they read, their own inputs."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..nn.spec import AttentionSpec, LayerInputSpec, LayerSpec, MLPSpec, ModelSpec, RopeSpec
from .config_fields import Fields
from .dense import head_width, map_attention, with_layers
from .rope_config import typed_ropes

FULL = "full_attention"


def layer_heads(
    fields: Fields, types: Sequence[str], *, width: int, wide: int, kv_heads: int
) -> list[tuple[int, int]]:
    """Each layer's head width and number of kv heads (Gemma 4).

    `per_layer_config` says by layer what differs from `head_dim` and `num_key_value_heads`; where
    there is none, full layers have `global_head_dim`, and with `attention_k_eq_v`
    `num_global_key_value_heads`. The keywords are the defaults of head_dim, global_head_dim and
    num_key_value_heads.
    """
    base = head_width(fields, width), fields.integer("num_key_value_heads", kv_heads)
    full = fields.integer("global_head_dim", wide), base[1]
    if fields.flag("attention_k_eq_v", False):
        full = full[0], fields.integer("num_global_key_value_heads", base[1])
    fields.take("num_global_key_value_heads", None)
    given = fields.take("per_layer_config", None)
    if given is None:
        return [full if kind == FULL else base for kind in types]
    if not isinstance(given, dict) or not all(
        key.isascii() and key.isdigit() and int(key) < len(types) for key in given
    ):
        raise fields.error(
            f"per_layer_config is {given!r:.200}, expected an object with numbers of layers"
        )
    given = {int(key): own for key, own in given.items()}
    found = []
    for i in range(len(types)):
        own = given.get(i, {})
        if not isinstance(own, dict) or not own.keys() <= {"head_dim", "num_key_value_heads"}:
            raise fields.error(
                f"per_layer_config has {own!r:.200} for layer {i}, expected head_dim and "
                "num_key_value_heads"
            )
        inner = Fields(own, fields.file)
        pair = inner.integer("head_dim", base[0]), inner.integer("num_key_value_heads", base[1])
        found.append(pair)
    if fields.has("global_head_dim") and any(
        pair[0] != full[0] for pair, kind in zip(found, types, strict=True) if kind == FULL
    ):
        raise fields.error("global_head_dim and per_layer_config contradict each other")
    return found


def layer_ropes(
    fields: Fields,
    types: Sequence[str],
    heads: Sequence[tuple[int, int]],
    default: Mapping[str, Mapping[str, Any]],
    max_positions: int,
) -> tuple[RopeSpec, ...]:
    """Each layer's rotary embedding, which those of a type share: `rope_parameters`, which is
    `default` where there is none. Raises ConfigError where a type's heads differ in width.
    """
    if not fields.has("rope_parameters"):
        fields.put("rope_parameters", default)
    widths = {}
    for kind in default:
        own = {pair[0] for pair, other in zip(heads, types, strict=True) if other == kind}
        if len(own) > 1:
            raise fields.error(f"per_layer_config gives layers of {kind} head_dim {sorted(own)}")
        widths[kind] = own.pop() if own else heads[0][0]
    bases = {kind: rotary["rope_theta"] for kind, rotary in default.items()}
    positions = fields.integer("max_position_embeddings", max_positions)
    ropes = typed_ropes(fields, widths, positions, bases)
    return tuple(ropes[kind] for kind in types)


def with_heads(
    fields: Fields, spec: ModelSpec, heads: Sequence[tuple[int, int]], **changes: Any
) -> ModelSpec:
    """The spec with each layer's head width and number of kv heads, and `changes` in all."""

    def changed(i: int, a: AttentionSpec) -> AttentionSpec:
        width, kv = heads[i]
        if a.heads % kv:
            raise fields.error(
                f"num_attention_heads {a.heads} is no multiple of the {kv} kv heads of layer {i}"
            )
        return replace(a, head_dim=width, kv_heads=kv, **changes)

    return map_attention(spec, changed)


def with_inputs(fields: Fields, spec: ModelSpec, *, width: int) -> ModelSpec:
    """The spec with inputs of each layer's own, `width` wide where nothing else is said; 0: none.

    Their activation and norm are the layers'.
    """
    dim = fields.integer_or_null("hidden_size_per_layer_input", width, low=0)
    rows = fields.integer("vocab_size_per_layer_input", 262144)
    if not dim:
        return spec
    if rows < spec.vocab:
        raise fields.error(f"vocab_size_per_layer_input {rows} is below vocab_size {spec.vocab}")
    mlp = spec.layers[0].mlp
    assert isinstance(mlp, MLPSpec)
    return with_layers(spec, inputs=LayerInputSpec(dim, rows, spec.norm, mlp.activation))


def with_lending(fields: Fields, spec: ModelSpec, types: Sequence[str]) -> ModelSpec:
    """The spec in which the last `num_kv_shared_layers` layers read keys and values of others, with
    MLPs twice as wide by `use_double_wide_mlp`, and by `attention_k_eq_v` values are keys in the
    other layers without a window.
    """
    sources = _sources(fields, types)
    same = fields.flag("attention_k_eq_v", False)
    factor = 1 + fields.flag("use_double_wide_mlp", False)

    def changed(i: int, layer: LayerSpec) -> LayerSpec:
        a, mlp, source = layer.attention, layer.mlp, sources[i]
        assert a is not None and isinstance(mlp, MLPSpec)
        if source is not None:
            mlp = replace(mlp, dim=mlp.dim * factor)
        kept = same and a.window is None and source is None
        a = replace(a, keys_as_values=kept, kv_from=source, lends=i in sources)
        return replace(layer, attention=a, mlp=mlp)

    return replace(spec, layers=tuple(changed(i, x) for i, x in enumerate(spec.layers)))


def _sources(fields: Fields, types: Sequence[str]) -> list[int | None]:
    """For each of the last `num_kv_shared_layers` layers the one whose keys and values it reads:
    the last of its type before them. None for all others.
    """
    depth = len(types)
    shared = fields.integer("num_kv_shared_layers", 0, low=0)
    own = list(types[: max(0, depth - shared)])
    if missing := sorted(set(types[len(own) :]) - set(own)):
        raise fields.error(
            f"num_kv_shared_layers is {shared} of {depth} layers: none of the first {len(own)} is "
            f"of {', '.join(missing)} and has keys and values to share"
        )
    last = {kind: i for i, kind in enumerate(own)}
    return [None] * len(own) + [last[kind] for kind in types[len(own) :]]
