"""An explicit `rope_scaling`: the config fields that put it in place of a checkpoint's own."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import AdapterError, ArgumentError, ConfigError
from .config import Config
from .json_file import parse_json
from .registry import Family

# The kind of layers that is scaled where each has its own rotation (Gemma 3).
_LONG = "full_attention"


def overrides(
    config: Config, file: Path, family: Family, rope_scaling: dict[str, Any] | None
) -> dict[str, Any]:
    """Fields for the `config` of `file`, from which purelm and transformers compute alike.

    They name what the scaling would otherwise take from the config's context, and then the context
    that it gives: `max_position_embeddings` itself, but for "dynamic", which begins to act there.
    Fields stay in the style, old or new, that the file has. Raises ArgumentError or ConfigError.
    """
    if rope_scaling is None:
        return {}
    if not isinstance(rope_scaling, dict):
        raise ArgumentError(f"rope_scaling is {rope_scaling!r}, expected a dict")
    stored = config.get("rope_parameters") or {}
    if not isinstance(stored, dict):
        raise ConfigError(f"rope_parameters is {stored!r:.60}, expected an object", file=file)
    scaling = dict(rope_scaling)
    if isinstance(stored.get(_LONG), dict):
        before = stored[_LONG]
    elif any(isinstance(value, dict) for value in stored.values()):
        raise ConfigError(
            f"rope_parameters are of kinds of layers, {', '.join(map(str, stored))!s:.200}, among "
            f"which {_LONG} has none that rope_scaling could replace",
            file=file,
        )
    else:
        before = stored
    for name in ("rope_theta", "partial_rotary_factor"):
        kept = before.get(name, config.get(name))
        if kept is not None:
            scaling.setdefault(name, kept)
    spec = family.spec({**config.fields, **_fields(stored, scaling)}, file)
    ropes = [attention.rope for attention in spec.attentions() if attention.rope is not None]
    if not ropes:
        raise ArgumentError(f"rope_scaling is {rope_scaling!r}, but the model has no rope to scale")
    if before is not stored and all(a.window is not None for a in spec.attentions()):
        raise ArgumentError(f"rope_scaling is {rope_scaling!r}, but every layer has a window")
    # Where layers differ (Gemma 3), the long-range ones alone are scaled.
    rope = next((rope for rope in ropes if rope.kind != "default"), ropes[0])
    if rope.kind in ("default", "dynamic"):
        return _fields(stored, scaling)
    if rope.kind != "linear":
        scaling.update(original_max_position_embeddings=rope.original_positions)
    if rope.kind == "yarn":
        scaling.update(factor=rope.factor)
    context = max(spec.max_positions, int(rope.original_positions * rope.factor))
    return {**_fields(stored, scaling), "max_position_embeddings": context}


def _fields(stored: Mapping[str, Any], scaling: Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(stored.get(_LONG), dict):
        return {"rope_parameters": {**stored, _LONG: dict(scaling)}}
    if stored:
        return {"rope_parameters": dict(scaling), "rope_scaling": None, "rope_theta": None}
    inner = {name: value for name, value in scaling.items() if name != "rope_theta"}
    base = {"rope_theta": scaling["rope_theta"]} if "rope_theta" in scaling else {}
    return {"rope_scaling": inner, **base}


def to_text(rope_scaling: dict[str, Any]) -> str:
    """As the header of an adapter's weights keeps it, which peft has no setting for."""
    return json.dumps(rope_scaling, sort_keys=True)


def from_text(text: str, file: Path) -> dict[str, Any]:
    """The inverse of `to_text`; raises AdapterError for another text."""
    try:
        found = parse_json(text.encode())
    except ValueError as problem:
        raise AdapterError(f"its rope_scaling is no JSON: {problem}", file=file) from None
    if not isinstance(found, dict):
        raise AdapterError(f"its rope_scaling is {found!r:.60}, expected an object", file=file)
    return found
