"""A config that describes given trees exactly, so that peft makes the same of the files."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from math import isclose
from typing import Any

from ..errors import ArgumentError
from ..nn import stacks, tree
from ..nn.lora import LoRA
from ..nn.spec import ModelSpec
from . import expert_adapters, fused, peft_targets
from .fused_adapters import Stored
from .lora_config import PeftConfig
from .names import Names
from .peft_targets import is_saved, is_target, modules, rank_and_scale, targetable


@dataclass(frozen=True)
class _View:
    """A model's modules as one side names them: a projection's name -> all that mean it, and a
    bias's tensor -> its module.
    """

    targets: Mapping[str, tuple[str, ...]]
    biases: Mapping[str, str]


def fitted(
    config: PeftConfig, adapters: tree.Tree, trained: tree.Tree, spec: ModelSpec, names: Names
) -> PeftConfig:
    """`config` as a finished adapter's, corrected where the trees say otherwise.

    Ranks and scales that differ from the config's go into its patterns, targets and modules that
    differ are listed by their full names. Raises ArgumentError for an empty adapter.
    """
    adapters, whole = expert_adapters.taken_out(adapters, config, spec, names)
    known = peft_targets.parameters(spec, names)
    params = {known[path]: leaf for path, leaf in whole.items()}
    config = _with_parameters(config, set(params), known.values())
    adapters, trained = stacks.one_by_one(adapters), stacks.one_by_one(trained)
    leaves = {names.module_to_hf(path): leaf for path, leaf in tree.items(adapters)}
    copies = [names.to_hf(path) for path, _ in tree.items(trained)]
    biases = {names.to_hf(path): names.module_to_hf(module) for path, module in _biases(spec)}
    every = {known[0]: known for known in targetable(config, spec, names).values()}
    return _fitted(config, leaves, params, copies, _View(every, biases), spec, names)


def fitted_stored(
    config: PeftConfig,
    stored: Stored,
    whole: Mapping[str, LoRA],
    shared: Collection[str],
    spec: ModelSpec,
    names: Names,
) -> PeftConfig:
    """As `fitted`, for what a file holds by the names of Hugging Face's class.

    shared: modules that are named as their parameters, as what peft would take for experts' is.
    """
    leaves = dict(stored.adapters)
    known = peft_targets.parameters(spec, names)
    params = {known[path]: leaf for path, leaf in whole.items()}
    for name in [name for name in leaves if name in shared]:
        params[f"{name}.weight"] = leaves.pop(name)
    every = [*known.values(), *(f"{name}.weight" for name in shared)]
    config = _with_parameters(config, set(params), every)
    biases = {
        fused.to_hf(path, spec, names): fused.module_to_hf(module, spec, names)
        for path, module in _biases(spec)
    }
    targets = {known[-1]: known[-1:] for known in targetable(config, spec, names).values()}
    view = _View({n: as_one for n, as_one in targets.items() if n not in shared}, biases)
    if params:  # of a name that is left out of the parameters peft would make some
        config = name_targets(config, set(leaves), view.targets)
    return _fitted(config, leaves, params, stored.copies, view, spec, names)


def _biases(spec: ModelSpec) -> list[tuple[str, str]]:
    """The paths of all biases and of their modules."""
    paths = [path for path, _ in tree.items(stacks.each_spec(spec)) if path.endswith(".bias")]
    return [(path, path.removesuffix(".bias")) for path in paths]


def _with_parameters(config: PeftConfig, have: set[str], every: Iterable[str]) -> PeftConfig:
    targets = expert_adapters.fitted(config.target_parameters, have, list(every))
    return replace(config, target_parameters=targets)


def _fitted(
    config: PeftConfig,
    leaves: Mapping[str, LoRA],
    params: Mapping[str, LoRA],
    copies: Collection[str],
    view: _View,
    spec: ModelSpec,
    names: Names,
) -> PeftConfig:
    """leaves and copies by their names in `view`, and adapters of parameters by theirs."""
    every = dict(leaves) | dict(params)
    if not every:
        raise ArgumentError("there are no adapters; peft's format needs at least one")
    config = replace(config, inference_mode=True, init_lora_weights=True, use_dora=_dora(every))
    saved = [name.removesuffix(".weight") for name in copies if name.endswith(".weight")]
    head = names.module_to_hf("head")
    if spec.tied and names.module_to_hf("embed") in saved and head not in saved:
        saved.append(head)
    config = _fit_saved(config, saved, spec, names)
    if set(leaves) != {name for name, all_of in view.targets.items() if is_target(config, *all_of)}:
        config = name_targets(config, set(leaves), view.targets)
    config = replace(config, bias=_bias(copies, leaves, view, config))
    # The scale is alpha / rank, or alpha / sqrt(rank).
    power = 0.5 if config.use_rslora else 1.0
    ranks = {name: leaf.rank for name, leaf in every.items()}
    alphas = {name: _tidy(leaf.scale * leaf.rank**power) for name, leaf in every.items()}
    wanted = {name: rank_and_scale(config, *view.targets.get(name, (name,))) for name in every}
    if all(
        ranks[name] == rank and isclose(every[name].scale, scale, rel_tol=1e-12)
        for name, (rank, scale) in wanted.items()
    ):
        return config
    rank, alpha = _commonest(list(ranks.values())), _commonest(list(alphas.values()))
    return replace(
        config,
        r=rank,
        lora_alpha=alpha,
        rank_pattern=_patterns(ranks, rank),
        alpha_pattern=_patterns(alphas, alpha),
    )


def _patterns(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """What differs from the default: by the last part of names that all have it, or by name."""
    by_last: dict[str, set[Any]] = {}
    for name, value in values.items():
        by_last.setdefault(_last(name), set()).add(value)
    return {
        _last(name) if len(by_last[_last(name)]) == 1 else name: value
        for name, value in values.items()
        if value != default
    }


def _last(name: str) -> str:
    """`q_proj` of `...self_attn.q_proj`; `q_proj.weight` of a parameter."""
    parts = name.split(".")
    return ".".join(parts[-2:] if parts[-1] == "weight" else parts[-1:])


def _dora(leaves: Mapping[str, LoRA]) -> bool:
    found = {leaf.magnitude is not None for leaf in leaves.values()}
    if len(found) > 1:
        raise ArgumentError("peft's format has a magnitude for every adapter (DoRA) or for none")
    return found.pop()


def name_targets(config: PeftConfig, have: set[str], every: Collection[str]) -> PeftConfig:
    """`config` with the modules `have` of `every` one as its targets: by their endings if those
    say it all.
    """
    short = {name.rpartition(".")[2] for name in have}
    by_ending = {name for name in every if name.rpartition(".")[2] in short}
    return replace(
        config,
        target_modules=tuple(sorted(short if by_ending == have else have)),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
    )


def _fit_saved(config: PeftConfig, have: list[str], spec: ModelSpec, names: Names) -> PeftConfig:
    every = modules(spec, names).values()
    if set(have) == {name for name in every if is_saved(config.modules_to_save, name)}:
        return config
    ends = {"lm_head", "embed_tokens"}
    listed = [name.rpartition(".")[2] for name in have if name.rpartition(".")[2] in ends]
    listed += [name for name in have if name.rpartition(".")[2] not in ends]
    return replace(config, modules_to_save=tuple(listed) or None)


def _bias(
    copies: Collection[str], adapted: Collection[str], view: _View, config: PeftConfig
) -> str:
    # One of a module that is trained whole goes with that.
    biases = {n: module for n, module in view.biases.items() if f"{module}.weight" not in copies}
    have = {name for name in copies if name in biases}
    only = {name for name, module in biases.items() if module in adapted}
    fits = {"none": set(), "lora_only": only, "all": set(biases)}
    if have == fits[config.bias]:
        return config.bias
    for kind, names in fits.items():
        if have == names:
            return kind
    raise ArgumentError(
        "peft's format knows copies of no bias, of all, or of those beside an adapter; found "
        f"{', '.join(sorted(have)[:6])}"
    )


def _tidy(alpha: float) -> float:
    """A whole number where rounding alone keeps it from being one."""
    return round(alpha) if isclose(alpha, round(alpha), rel_tol=1e-12) else alpha


def _commonest(values: list[Any]) -> Any:
    return max(dict.fromkeys(values), key=values.count)
