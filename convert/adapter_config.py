"""adapter_config.json, as somebody else may have written it, into a `PeftConfig`."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import AdapterError, ArgumentError
from .json_file import read_json
from .lora_config import PeftConfig

CONFIG = "adapter_config.json"
_MAX_PATTERNS = 4000

# Settings of peft's LoraConfig that change what is computed, and are not read.
_OTHER_KINDS = (
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "alora_invocation_tokens",
    "trainable_token_indices",
    "layer_replication",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "megatron_config",
)
# Settings that only say how an adapter came to be.
_HISTORY = (
    "auto_mapping",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "fan_in_fan_out",
    "loftq_config",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "runtime_config",
    "velora_config",
)
# Starts that take a part out of the base weight, which then belongs to the adapter.
_CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")
_TUPLES = (
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "layers_to_transform",
    "layers_pattern",
    "target_parameters",
)


def read_config(folder: str | Path) -> dict[str, Any] | None:
    """The fields of the folder's adapter_config.json, or None where there is none."""
    path = Path(folder) / CONFIG
    return read_json(path, error=AdapterError) if path.exists() else None


def parse(raw: Mapping[str, Any], file: Path) -> PeftConfig:
    """The settings in an adapter_config.json; what purelm cannot follow raises AdapterError."""
    if raw.get("peft_type") != "LORA":
        raise AdapterError(f"peft_type is {raw.get('peft_type')!r}, expected 'LORA'", file=file)
    known = PeftConfig.__dataclass_fields__
    for name, value in raw.items():
        if value and name in _OTHER_KINDS:
            raise AdapterError(f"{name}={value!r} is not supported", file=file)
        if value and name not in known and name not in _HISTORY:
            raise AdapterError(
                f"the setting {name!r} ({str(value)[:80]}) is not known, and what it changes "
                "neither; convert the adapter to plain LoRA, or update purelm",
                file=file,
            )
    start = raw.get("init_lora_weights", True)
    if isinstance(start, str) and start.startswith(_CHANGES_BASE):
        raise AdapterError(
            f"init_lora_weights={start!r} belongs to a changed base; save it with peft's "
            "path_initial_model_for_weight_conversion, which makes it plain LoRA",
            file=file,
        )
    given: dict[str, Any] = {
        name: tuple(raw[name]) if name in _TUPLES and isinstance(raw[name], list) else raw[name]
        for name in known
        if raw.get(name) is not None
    }
    if given.get("layers_to_transform") == ():
        del given["layers_to_transform"]
    for name in ("base_model_name_or_path", "revision"):
        if not isinstance(given.get(name, ""), str):
            raise AdapterError(f"{name} is {given[name]!r}, expected a text", file=file)
    patterns = [*_keys(raw, "rank_pattern"), *_keys(raw, "alpha_pattern")]
    if len(patterns) > _MAX_PATTERNS:
        raise AdapterError(f"{len(patterns)} patterns are more than {_MAX_PATTERNS}", file=file)
    layers = given.get("layers_pattern") or ()
    if not isinstance(layers, str | tuple):
        raise AdapterError(f"layers_pattern is {layers!r:.60}, expected a text or texts", file=file)
    for pattern in [*patterns, *((layers,) if isinstance(layers, str) else layers)]:
        _check_pattern(str(pattern), file)
    try:
        return PeftConfig(**given)
    except ArgumentError as problem:
        raise AdapterError(str(problem), file=file) from None


def _keys(raw: Mapping[str, Any], name: str) -> list[str]:
    value = raw.get(name)
    return list(value) if isinstance(value, dict) else []


def _check_pattern(pattern: str, file: Path) -> None:
    """Refuse a regular expression from a file that could run for ages on a module's name."""
    repeats = len(re.findall(r"(?<!\()[*+?{]", pattern))
    if (
        len(pattern) > 400
        or repeats > 2
        or pattern.count("(") > 2
        or re.search(r"\)[*+{]", pattern)
    ):
        raise AdapterError(f"the pattern {pattern[:80]!r} is too intricate to run", file=file)
    try:
        re.compile(pattern)
    except re.error as problem:
        raise AdapterError(
            f"{pattern[:80]!r} is no regular expression: {problem}", file=file
        ) from None
