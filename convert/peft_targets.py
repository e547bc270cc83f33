"""Which weights a `PeftConfig` means: peft's matching rules over a model's module names."""

import functools
import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import ArgumentError
from ..nn import stacks, tree
from ..nn.spec import ModelSpec, MoESpec
from . import fused
from .lora_config import PeftConfig
from .names import Names


@dataclass(frozen=True)
class Plan:
    """What is adapted and what is trained whole.

    `adapted`: module path (`layers.0.attn.q`) -> (rank, scale). `trained`: paths of params that get
    a trained copy (`embed.weight`, `layers.0.attn.q.bias`). `whole`: as `adapted`, of the experts'
    stacks (`layers.0.mlp.experts.gate_up`).
    """

    adapted: Mapping[str, tuple[int, float]]
    trained: tuple[str, ...]
    whole: Mapping[str, tuple[int, float]] = field(default_factory=dict)


def plan(config: PeftConfig, spec: ModelSpec, names: Names) -> Plan:
    """What `config` adapts and trains in a model.

    Raises ArgumentError when no projection matches, naming those that exist.
    """
    adapted = {
        path: rank_and_scale(config, *known)
        for path, known in targetable(config, spec, names).items()
        if is_target(config, *known)
    }
    whole = {
        path: rank_and_scale(config, name)
        for path, name in parameters(spec, names).items()
        if matches(config.target_parameters or (), name)
    }
    if config.target_parameters and not whole:
        known = {re.sub(r".*\.\d+\.", "", name) for name in parameters(spec, names).values()}
        raise ArgumentError(
            f"target_parameters {_shown(config.target_parameters)} matches nothing; this model has "
            f"{', '.join(sorted(known)) or 'no parameters that hold all experts of a layer'}"
        )
    if not adapted and not whole:
        raise ArgumentError(
            f"target_modules {_shown(config.target_modules)} (with layers_to_transform "
            f"{config.layers_to_transform}, exclude_modules {_shown(config.exclude_modules)}) "
            f"matches no projection; this model has {shown_names(spec, names)} in "
            f"{len(spec.layers)} layers"
        )
    saved = [
        path
        for path, name in modules(spec, names).items()
        if is_saved(config.modules_to_save, name)
    ]
    if spec.tied and "embed" in saved and "head" in saved:
        saved.remove("head")  # one matrix is both
    trained = [f"{path}.weight" for path in saved] + _biases(config, spec, adapted, saved)
    return Plan(adapted, tuple(trained), whole)


def _biases(
    config: PeftConfig, spec: ModelSpec, adapted: Iterable[str], saved: Iterable[str]
) -> list[str]:
    """Of modules trained whole the biases are trained in any case."""
    found = [path for path, _ in tree.items(stacks.each_spec(spec)) if path.endswith(".bias")]
    if config.bias == "all":
        return found
    meant = {*saved, *(adapted if config.bias == "lora_only" else ())}
    return [path for path in found if path.removesuffix(".bias") in meant]


def projections(spec: ModelSpec, names: Names) -> dict[str, tuple[str, ...]]:
    """Every module that can be adapted: path -> the names that mean it.

    The first is its own; one that is stored as a part of another has that one's too (Phi-3's q:
    `...q_proj` and `...qkv_proj`).
    """
    owners = fused.owners(spec, names)
    found: dict[str, tuple[str, ...]] = {}
    for path, p in tree.items(stacks.each_spec(spec)):
        if p.quantize:
            module = path.removesuffix(".weight")
            own = names.to_hf(path).removesuffix(".weight")
            found[module] = (own, owners[module].name) if module in owners else (own,)
    return found


def targetable(config: PeftConfig, spec: ModelSpec, names: Names) -> dict[str, tuple[str, ...]]:
    """The modules that target_modules may mean, the head last: no expert where parameters of all
    experts are adapted.
    """
    every = {**projections(spec, names), "head": (names.module_to_hf("head"),)}
    if not config.target_parameters:
        return every
    return {path: known for path, known in every.items() if stacks.place(f"{path}.") is None}


def adaptable(config: PeftConfig, spec: ModelSpec, names: Names) -> dict[str, tuple[str, ...]]:
    """The modules that a file may have adapters of, those of Hugging Face's class first: name ->
    our paths, several of one that is fused, and of each of its parts the part's own.
    """
    every = targetable(config, spec, names)
    found: dict[str, tuple[str, ...]] = {}
    for path, known in every.items():
        found[known[-1]] = (*found.get(known[-1], ()), path)
    return found | {known[0]: (path,) for path, known in every.items() if len(known) > 1}


def parameters(spec: ModelSpec, names: Names) -> dict[str, str]:
    """Every parameter that holds all experts of a layer, in transformers' order: the path of its
    adapter -> Hugging Face's name.
    """
    found: dict[str, str] = {}
    for i, layer in enumerate(spec.layers):
        for name, path in names.stacked.items() if isinstance(layer.mlp, MoESpec) else ():
            found.setdefault(path.replace("*", str(i), 1), name.replace("*", str(i), 1))
    return found


def modules(spec: ModelSpec, names: Names) -> dict[str, str]:
    """Every module with a weight, a tied head included: path -> Hugging Face's name."""
    paths = [path for path, _ in tree.items(stacks.each_spec(spec)) if path.endswith(".weight")]
    if spec.tied:
        paths.append("head.weight")
    return {p.removesuffix(".weight"): names.to_hf(p).removesuffix(".weight") for p in paths}


def short_names(spec: ModelSpec, names: Names) -> tuple[str, ...]:
    """The last parts of the projections' own names: q_proj, k_proj..."""
    return tuple(dict.fromkeys(n[0].rpartition(".")[2] for n in projections(spec, names).values()))


def shown_names(spec: ModelSpec, names: Names) -> str:
    """All last parts that target_modules may have, for people."""
    every = [name for known in projections(spec, names).values() for name in known]
    return ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in every))


def is_target(config: PeftConfig, *known: str) -> bool:
    """Whether peft would adapt the module of these names (its `check_target_module_exists`)."""
    excluded = config.exclude_modules
    if excluded is not None and any(matches(excluded, name) for name in known):
        return False
    for saved, name in itertools.product(config.modules_to_save or (), known):
        if f".{saved}." in f".{name}.":
            return False
    if not any(matches(config.target_modules, name) for name in known):
        return False
    if isinstance(config.target_modules, str) or config.layers_to_transform is None:
        return True
    layers = config.layers_to_transform
    layer = _layer(known[-1], config.layers_pattern)
    return layer is not None and layer in ((layers,) if isinstance(layers, int) else layers)


def matches(wanted: str | Iterable[str], name: str) -> bool:
    """A text is a regular expression for the whole name; a list has names or their last parts."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == one or name.endswith(f".{one}") for one in wanted)


def is_saved(modules_to_save: Iterable[str] | None, name: str) -> bool:
    """Whether peft would train the module whole: any ending of the name counts, as there."""
    return any(name.endswith(ending) for ending in modules_to_save or ())


def _layer(name: str, patterns: str | tuple[str, ...] | None) -> int | None:
    """The layer's number in a module's name: the first number, or that behind a pattern."""
    if not patterns:
        found = re.match(r".*?\.[^.]*\.(\d+)\.", name)
        return int(found.group(1)) if found else None
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        found = re.match(rf"(?:^|.*?\.)(?:{pattern})\.(\d+)\.", name)
        if found:
            return int(found.group(1))
    return None


def rank_and_scale(config: PeftConfig, *known: str) -> tuple[int, float]:
    """The rank and the scale of the module of these names, patterns applied."""
    rank: int = by_pattern(config.rank_pattern, known, config.r)
    alpha = by_pattern(config.alpha_pattern, known, config.lora_alpha)
    return rank, float(alpha / (rank**0.5 if config.use_rslora else rank))


def by_pattern(patterns: Mapping[str, Any], known: Iterable[str], default: Any) -> Any:
    """The value of the first pattern that matches an ending of one of the names, as in peft."""
    for pattern, value in patterns.items():
        if any(_ending(pattern).match(name) for name in known):
            return value
    return default


# A file may have thousands, and every module meets them all: `re` itself keeps 512.
@functools.lru_cache(maxsize=1 << 13)
def _ending(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern})$")


def _shown(wanted: str | Iterable[str] | None) -> str:
    return repr(wanted if wanted is None or isinstance(wanted, str) else sorted(wanted))
