"""Rotary embeddings out of HF's config fields, the old ones (`rope_theta`, `rope_scaling`) and the
new one (`rope_parameters`)."""

import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch

from ..nn.rope import attention_factor, inverse_frequencies
from ..nn.spec import RopeKind, RopeSpec
from .config_fields import Fields

_KINDS: dict[str, RopeKind] = {
    "default": "default",
    "linear": "linear",
    "dynamic": "dynamic",
    "llama3": "llama3",
    "yarn": "yarn",
    "longrope": "longrope",
    "proportional": "proportional",
}
# Heads are narrower by far; a width that only a broken config has takes no memory here.
_WIDEST = 1 << 16
_ALLOWED = {
    "default": set[str](),
    "linear": {"factor"},
    "dynamic": {"factor", "original_max_position_embeddings"},
    "llama3": {
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    },
    "yarn": {
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    },
    "longrope": {
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "short_factor",
        "long_factor",
    },
    "proportional": {"factor"},
}


def rope_spec(
    fields: Fields,
    head_dim: int,
    max_positions: int,
    theta: float,
    *,
    aliases: Mapping[str, str] = MappingProxyType({}),
    original: int | None = None,
    partial: float = 1.0,
    interleaved: bool = False,
    magnitudes: bool = False,
) -> RopeSpec:
    """The model's rotary embedding; `theta` is the family's default base.

    aliases: a family's other names of kinds. original: the positions before scaling, where the
    family keeps them apart from the rotary fields. partial: the family's default share of a head
    that is turned. interleaved: see `RopeSpec`. magnitudes: longrope has `short_mscale` and
    `long_mscale` (Phi-3.5-MoE).
    """
    raw = _merged(fields)
    kind_name = raw.pop("rope_type", raw.pop("type", "default"))
    if isinstance(kind_name, str):
        kind_name = aliases.get(kind_name, kind_name)
    raw.pop("type", None)
    if not isinstance(kind_name, str) or kind_name not in _KINDS:
        raise fields.error(f"rope type {kind_name!r} is not known; known are {', '.join(_KINDS)}")
    inner = Fields(raw, fields.file)
    base = inner.number("rope_theta", theta)
    width = head_dim * inner.number("partial_rotary_factor", partial)
    dim = int(min(width, head_dim + 1))  # a longer one may be infinite
    if kind_name == "proportional":
        return _proportional(inner, head_dim, dim, base, interleaved=interleaved)
    if dim % 2 or not 0 < dim <= head_dim:
        raise fields.error(f"rotary width {dim} of head width {head_dim} is not usable")
    if kind_name == "default":
        # Values that scale nothing are found beside the default kind in published configs.
        return RopeSpec(dim=dim, theta=base, interleaved=interleaved)
    allowed = _ALLOWED[kind_name] | ({"short_mscale", "long_mscale"} if magnitudes else set())
    if unknown := sorted(raw.keys() - inner.taken - allowed):
        raise fields.error(f"rope type {kind_name!r} has unknown fields {', '.join(unknown)}")
    # "dynamic" compares with the context length itself, whatever else is written.
    before = max_positions if original is None else original
    if kind_name != "dynamic":
        before = inner.integer("original_max_position_embeddings", before)
    if original is not None and before != original:
        raise fields.error("original_max_position_embeddings stands twice with different values")
    original = before
    if kind_name in ("yarn", "longrope") and not inner.has("factor"):
        factor = max_positions / original
    else:
        factor = inner.number("factor")
    more: dict[str, Any] = {}
    if kind_name == "llama3":
        more["low_freq_factor"] = inner.number("low_freq_factor")
        more["high_freq_factor"] = inner.number("high_freq_factor")
        if more["high_freq_factor"] <= more["low_freq_factor"]:
            raise fields.error("rope high_freq_factor must be above low_freq_factor")
    elif kind_name == "longrope":
        for name in ("short_factor", "long_factor"):
            more[f"{name}s"] = inner.numbers(name, dim // 2)
        if inner.has("attention_factor"):
            more["attention_factor"] = inner.number("attention_factor")
        if magnitudes:
            more["short_magnitude"] = inner.number("short_mscale")
            more["long_magnitude"] = inner.number("long_mscale")
    elif kind_name == "yarn":
        more["beta_fast"] = inner.number("beta_fast", 32.0)
        more["beta_slow"] = inner.number("beta_slow", 1.0)
        more["truncate"] = inner.flag("truncate", True)
        for name in ("attention_factor", "mscale", "mscale_all_dim"):
            if inner.has(name):
                more[name] = inner.number(name)
    return RopeSpec(
        dim=dim,
        theta=base,
        kind=_KINDS[kind_name],
        factor=factor,
        original_positions=original,
        interleaved=interleaved,
        **more,
    )


def _proportional(
    inner: Fields, head_dim: int, dim: int, base: float, *, interleaved: bool
) -> RopeSpec:
    """Of a whole head, in which the pairs of the first `dim` features are turned (Gemma 4)."""
    if unknown := sorted(inner.raw.keys() - inner.taken - _ALLOWED["proportional"]):
        raise inner.error(f"rope type 'proportional' has unknown fields {', '.join(unknown)}")
    if head_dim % 2 or not 1 < dim <= head_dim:
        raise inner.error(
            f"partial_rotary_factor {inner.raw.get('partial_rotary_factor')!r:.40} of head width "
            f"{head_dim} turns {dim} features, expected two or more of an even width"
        )
    factor = inner.number("factor", 1.0)
    kind: RopeKind = "proportional"
    return RopeSpec(head_dim, base, kind, factor, turned=dim // 2, interleaved=interleaved)


def typed_ropes(
    fields: Fields,
    head_dim: int | Mapping[str, int],
    max_positions: int,
    thetas: Mapping[str, float],
) -> dict[str, RopeSpec]:
    """A rotary embedding for each type of layer in `thetas`, its default base; the types' heads may
    differ in width.

    `rope_parameters` has an object for each; the old fields are `rope_theta` and `rope_scaling`
    for full_attention and `rope_local_base_freq` for sliding_attention (Gemma 3).
    """
    given = fields.take("rope_parameters", {})
    if not isinstance(given, dict) or not all(isinstance(v, dict) for v in given.values()):
        raise fields.error(f"rope_parameters is {given!r:.200}, expected an object per layer type")
    if unknown := sorted(given.keys() - thetas):
        raise fields.error(f"rope_parameters has {unknown}, expected {', '.join(thetas)}")
    if not given:
        old = {"rope_scaling": fields.take("rope_scaling", {})}
        bases = {"full_attention": "rope_theta", "sliding_attention": "rope_local_base_freq"}
        found = {kind: fields.take(name, thetas[kind]) for kind, name in bases.items()}
        inner = {
            kind: {"rope_theta": base, **(old if kind == "full_attention" else {})}
            for kind, base in found.items()
        }
    else:
        inner = {kind: {"rope_parameters": given.get(kind, {})} for kind in thetas}
    widths = {kind: head_dim if isinstance(head_dim, int) else head_dim[kind] for kind in thetas}
    return {
        kind: rope_spec(Fields(inner[kind], fields.file), widths[kind], max_positions, theta)
        for kind, theta in thetas.items()
    }


def check_frequencies(fields: Fields, ropes: Iterable[RopeSpec]) -> None:
    """Raise ConfigError for fields that are fine alone and together make no finite frequencies."""
    at = torch.zeros(1, 1, dtype=torch.int64)
    for rope in ropes:
        if not 0 < rope.dim <= _WIDEST:
            continue
        try:
            found = [*inverse_frequencies(rope, at).tolist(), attention_factor(rope)]
        except (ArithmeticError, ValueError):
            found = [math.nan]
        if not all(map(math.isfinite, found)):
            raise fields.error(
                f"rope type {rope.kind!r} with rope_theta {rope.theta:g}, factor {rope.factor:g} "
                f"and {rope.original_positions} original positions has no finite frequencies for "
                f"the {rope.dim} features that are turned"
            )


def temperature(fields: Fields) -> RopeSpec | None:
    """How queries of layers that turn nothing grow with their position, if they do (Llama 4)."""
    scale = fields.integer("floor_scale", 8192)
    beta = fields.number("attn_scale", 0.1, above=-1.0)
    tuned = fields.take("attn_temperature_tuning", True)
    if not isinstance(tuned, bool | int):
        raise fields.error(f"attn_temperature_tuning is {tuned!r:.200}, expected true or false")
    if not tuned:
        return None
    return RopeSpec(0, 1.0, original_positions=scale, query_beta=beta, query_shift=1)


def tempered_scale(rope: RopeSpec, width: int) -> float:
    """width ** -0.5, times YaRN's `mscale_all_dim` twice (DeepSeek): in place of q's and k's."""
    if not rope.mscale_all_dim or rope.factor <= 1:
        return float(width**-0.5)
    return float(width**-0.5 * (0.1 * rope.mscale_all_dim * math.log(rope.factor) + 1.0) ** 2)


def context(rope: RopeSpec, max_positions: int) -> int:
    """The positions a model takes: "dynamic" begins to act where those of its config end."""
    return int(max_positions * rope.factor) if rope.kind == "dynamic" else max_positions


def _merged(fields: Fields) -> dict[str, Any]:
    """One dict out of the old and the new fields; a contradiction between them is an error."""
    new = fields.take("rope_parameters", {})
    old = fields.take("rope_scaling", {})
    for name, value in (("rope_parameters", new), ("rope_scaling", old)):
        if not isinstance(value, dict):
            raise fields.error(f"{name} is {value!r}, expected an object")
    if new and old and {**new, **old} != {**old, **new}:
        raise fields.error("rope_parameters and rope_scaling contradict each other")
    merged = {**old, **new}
    for name in ("rope_theta", "partial_rotary_factor"):
        value = fields.take(name, None)
        if value is not None and merged.setdefault(name, value) != value:
            raise fields.error(f"{name} stands twice with different values")
    return merged
