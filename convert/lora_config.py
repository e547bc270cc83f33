"""`PeftConfig`: the settings of an adapter, under the names of peft's `LoraConfig`."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ..errors import ArgumentError

DEFAULT_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class PeftConfig:
    """The fields of peft's `LoraConfig` that purelm reads and writes, under peft's names.

    Raises ArgumentError for values that no model could use.
    """

    r: int = 8
    lora_alpha: float = 8
    target_modules: tuple[str, ...] | str = DEFAULT_TARGETS
    exclude_modules: tuple[str, ...] | str | None = None
    lora_dropout: float = 0.0
    bias: str = "none"
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | str = True
    modules_to_save: tuple[str, ...] | None = None
    layers_to_transform: tuple[int, ...] | int | None = None
    layers_pattern: tuple[str, ...] | str | None = None
    target_parameters: tuple[str, ...] | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    task_type: str = "CAUSAL_LM"
    peft_type: str = "LORA"

    def __post_init__(self) -> None:
        for name in ("use_rslora", "use_dora", "inference_mode"):
            if not isinstance(getattr(self, name), bool):
                raise wrong(name, getattr(self, name), "True or False")
        _rank("r", self.r)
        _alpha("lora_alpha", self.lora_alpha)
        p = self.lora_dropout
        if not _is_number(p) or not 0.0 <= p < 1.0:
            raise wrong("lora_dropout", p, "a probability of at least 0 and below 1")
        if self.bias not in ("none", "all", "lora_only"):
            raise wrong("bias", self.bias, "'none', 'all' or 'lora_only'")
        check_texts("target_modules", self.target_modules)
        check_texts("exclude_modules", self.exclude_modules, optional=True)
        if isinstance(self.modules_to_save, str):
            raise wrong("modules_to_save", self.modules_to_save, "a list of names")
        check_texts("modules_to_save", self.modules_to_save, optional=True)
        if isinstance(self.target_parameters, str):
            raise wrong("target_parameters", self.target_parameters, "a list of names")
        check_texts("target_parameters", self.target_parameters, optional=True)
        if self.target_parameters and (self.lora_dropout or self.use_dora):
            raise ArgumentError(
                "target_parameters adapts experts' stacked parameters, which peft's format has "
                "neither dropout nor DoRA for; leave lora_dropout and use_dora out"
            )
        check_texts("layers_pattern", self.layers_pattern, optional=True)
        for pattern, rank in checked_mapping("rank_pattern", self.rank_pattern).items():
            _rank(f"rank_pattern[{pattern!r}]", rank)
        for pattern, alpha in checked_mapping("alpha_pattern", self.alpha_pattern).items():
            _alpha(f"alpha_pattern[{pattern!r}]", alpha)
        self._check_layers()

    def _check_layers(self) -> None:
        layers = self.layers_to_transform
        found = () if layers is None else layers if isinstance(layers, tuple) else (layers,)
        if not all(type(layer) is int and layer >= 0 for layer in found):
            raise wrong("layers_to_transform", layers, "layer numbers from 0")
        if isinstance(self.target_modules, str) and layers is not None:
            raise ArgumentError(
                "layers_to_transform needs target_modules as a list; with a regular expression "
                f"({self.target_modules!r}), write the layers into it"
            )
        if self.layers_pattern and layers is None:
            raise ArgumentError("layers_pattern says where layers_to_transform applies; give both")

    def to_dict(self) -> dict[str, Any]:
        """The fields as an adapter_config.json has them."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        return {
            name: list(value) if isinstance(value, tuple) else _plain(value)
            for name, value in values.items()
        }


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value


def check_texts(name: str, value: Any, optional: bool = False) -> None:
    """Raise ArgumentError unless `value` is a text or a tuple of texts, none of them empty."""
    if (optional and value is None) or (isinstance(value, str) and value):
        return
    if not isinstance(value, tuple) or not all(isinstance(one, str) and one for one in value):
        raise wrong(name, value, "names")


def checked_mapping(name: str, value: Any) -> Mapping[str, Any]:
    """`value`; raises ArgumentError unless it is a dict with texts as keys."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise wrong(name, value, "a dict from module names to numbers")
    return value


def _rank(name: str, value: Any) -> None:
    if type(value) is not int or value < 1:
        raise wrong(name, value, "an integer of at least 1")


def _alpha(name: str, value: Any) -> None:
    if not _is_number(value) or value <= 0:
        raise wrong(name, value, "a number above 0")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def wrong(name: str, found: Any, expected: str) -> ArgumentError:
    """The error for an argument with a value that cannot be used."""
    return ArgumentError(f"{name} is {found!r}, expected {expected}")
