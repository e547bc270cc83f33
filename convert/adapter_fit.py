"""A config that describes given trees exactly, so that peft makes the same of the files."""

from collections.abc import Mapping
from dataclasses import replace
from math import isclose
from typing import Any

from ..errors import ArgumentError
from ..nn import stacks, tree
from ..nn.lora import LoRA
from ..nn.spec import ModelSpec
from . import expert_adapters, peft_targets
from .lora_config import PeftConfig
from .names import Names
from .peft_targets import is_saved, is_target, modules, rank_and_scale, targetable


def fitted(
    config: PeftConfig, adapters: tree.Tree, trained: tree.Tree, spec: ModelSpec, names: Names
) -> PeftConfig:
    """`config` as a finished adapter's, corrected where the trees say otherwise.

    Ranks and scales that differ from the config's go into its patterns, targets and modules that
    differ are listed by their full names. Raises ArgumentError for an empty adapter.
    """
    adapters, whole = expert_adapters.taken_out(adapters, config, spec, names)
    adapters, trained = stacks.one_by_one(adapters), stacks.one_by_one(trained)
    leaves = {names.module_to_hf(path): leaf for path, leaf in tree.items(adapters)}
    known = peft_targets.parameters(spec, names)
    have = {known[path]: leaf for path, leaf in whole.items()}
    targets = expert_adapters.fitted(config.target_parameters, set(have), spec, names)
    config = replace(config, target_parameters=targets)
    copies = [path for path, _ in tree.items(trained)]
    if not leaves and not have:
        raise ArgumentError("there are no adapters; peft's format needs at least one")
    config = replace(
        config, inference_mode=True, init_lora_weights=True, use_dora=_dora(leaves | have)
    )
    saved = [path.removesuffix(".weight") for path in copies if path.endswith(".weight")]
    if spec.tied and "embed" in saved and "head" not in saved:
        saved.append("head")
    config = _fit_saved(config, [names.module_to_hf(path) for path in saved], spec, names)
    config = _fit_targets(config, set(leaves), spec, names)
    leaves |= have
    config = replace(config, bias=_bias(copies, adapters, spec, config))
    # The scale is alpha / rank, or alpha / sqrt(rank).
    power = 0.5 if config.use_rslora else 1.0
    ranks = {name: leaf.rank for name, leaf in leaves.items()}
    alphas = {name: leaf.scale * leaf.rank**power for name, leaf in leaves.items()}
    wanted = {name: rank_and_scale(config, name) for name in leaves}
    if all(
        ranks[name] == rank and isclose(leaves[name].scale, scale, rel_tol=1e-12)
        for name, (rank, scale) in wanted.items()
    ):
        return config
    rank = _commonest(list(ranks.values()))
    alpha = _commonest([_tidy(a) for a in alphas.values()])
    return replace(
        config,
        r=rank,
        lora_alpha=alpha,
        rank_pattern={n: r for n, r in ranks.items() if r != rank},
        alpha_pattern={n: _tidy(a) for n, a in alphas.items() if _tidy(a) != alpha},
    )


def _dora(leaves: Mapping[str, LoRA]) -> bool:
    found = {leaf.magnitude is not None for leaf in leaves.values()}
    if len(found) > 1:
        raise ArgumentError("peft's format has a magnitude for every adapter (DoRA) or for none")
    return found.pop()


def _fit_targets(config: PeftConfig, have: set[str], spec: ModelSpec, names: Names) -> PeftConfig:
    every = targetable(config, spec, names).values()
    if have == {name for name in every if is_target(config, name)}:
        return config
    return name_targets(config, have, spec, names)


def name_targets(config: PeftConfig, have: set[str], spec: ModelSpec, names: Names) -> PeftConfig:
    """`config` with the modules `have` as its targets: by their endings if those say it all."""
    every = targetable(config, spec, names).values()
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


def _bias(copies: list[str], adapters: tree.Tree, spec: ModelSpec, config: PeftConfig) -> str:
    have = {path for path in copies if path.endswith(".bias")}
    adapted = {path for path, _ in tree.items(adapters)}
    every = {path for path, _ in tree.items(stacks.each_spec(spec)) if path.endswith(".bias")}
    only = {path for path in every if path.removesuffix(".bias") in adapted}
    fits = {"none": set(), "lora_only": only, "all": every}
    if have == fits[config.bias]:
        return config.bias
    for kind, paths in fits.items():
        if have == paths:
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
