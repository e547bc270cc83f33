"""Adapters of experts' single projections as of the parameters that hold all experts, and back.

transformers 5 has no module of one expert: peft adapts the parameters of all, or, for some
families, turns adapters of single experts into such while it loads them.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..nn import stacks, tree
from ..nn.lora import LoRA
from ..nn.spec import ModelSpec
from .expert_adapters import fitted
from .fused_adapters import Ranks, b_at, placed
from .lora_config import PeftConfig
from .names import Names
from .peft_targets import matches, parameters, projections


def has_place(config: PeftConfig, leaves: Iterable[LoRA]) -> bool:
    """Whether adapters of parameters can say what these do: without dropout, DoRA and biases."""
    plain = config.bias == "none" and not config.lora_dropout
    return plain and not any(leaf.magnitude is not None or leaf.dropout for leaf in leaves)


def without_dropout(
    adapters: tree.Tree, config: PeftConfig, spec: ModelSpec, names: Names
) -> tuple[tree.Tree, PeftConfig, float]:
    """Both without the dropout that peft refuses beside adapters of experts, and which that was.

    It acts in training alone: what is made of the file elsewhere stays the same.
    """
    parents = {path.rpartition(".")[0] for path in parameters(spec, names)}
    dropped = {leaf.dropout for _, leaf in tree.items(adapters)} | {config.lora_dropout}
    beside = any(path.rpartition(".")[0] in parents for path, _ in tree.items(adapters))
    if not beside or dropped == {0.0}:
        return adapters, config, 0.0
    adapters = tree.map(lambda leaf: replace(leaf, dropout=0.0), adapters)
    return adapters, replace(config, lora_dropout=0.0), max(dropped)


def is_joined_by_peft(adapters: tree.Tree, spec: ModelSpec, names: Names) -> bool:
    """Whether peft makes adapters of parameters of these itself, and the right ones: of gate and up
    alike, with down, in every layer, and of no other module that is called like theirs.
    """
    if not names.peft_joins:
        return False
    flat, shared = dict(tree.items(adapters)), namesakes(spec, names)
    every = projections(spec, names)
    if any(path in every and every[path][-1] in shared for path in flat):
        return False
    shown = set()
    for path in filter(_is_both, parameters(spec, names)):
        gate, up = (flat.get(part) for part in _parts(path))
        if _kind(gate) != _kind(up):
            return False
        shown.add((gate is None, flat.get(f"{path.rpartition('.')[0]}.down") is None))
    return len(shown) == 1 and (False, True) not in shown


def _kind(leaf: LoRA | None) -> tuple[int, float] | None:
    return None if leaf is None else (leaf.rank, leaf.scale)


def as_modules(config: PeftConfig) -> PeftConfig:
    """A file's config, modules that are named as their parameters among its target_modules."""
    named = [name for name in config.target_parameters or () if name.endswith(".weight")]
    if not named:
        return config
    rest = tuple(name for name in config.target_parameters or () if name not in named)
    targets = config.target_modules
    if not isinstance(targets, str):
        targets = (*targets, *(name.removesuffix(".weight") for name in named))

    def without(patterns: Mapping[str, Any]) -> dict[str, Any]:
        return {re.sub(r"\\?\.weight$", "", key): value for key, value in patterns.items()}

    return replace(
        config,
        target_modules=targets,
        target_parameters=rest or None,
        rank_pattern=without(config.rank_pattern),
        alpha_pattern=without(config.alpha_pattern),
    )


def namesakes(spec: ModelSpec, names: Names) -> set[str]:
    """Projections outside of experts, by Hugging Face's names, that have the last part of an
    expert's (a shared expert's gate_proj): peft takes a target of that name for the experts'.
    """
    every = projections(spec, names)
    experts = {p for p in every if stacks.place(f"{p}.") is not None}
    last = {every[path][0].rpartition(".")[2] for path in experts}
    outside = (known[-1] for path, known in every.items() if path not in experts)
    return {name for name in outside if name.rpartition(".")[2] in last}


@torch.no_grad()
def put_together(
    adapters: tree.Tree, config: PeftConfig, spec: ModelSpec, names: Names
) -> tuple[tree.Tree, PeftConfig, dict[str, Ranks]]:
    """`adapters` with those of experts' gate and up as one of both, the config that has them, and
    of every parameter that it did not have, which ranks of its adapter are whose.
    """
    flat = dict(tree.items(adapters))
    known = parameters(spec, names)
    had = {name for name in known.values() if matches(config.target_parameters or (), name)}
    ranks: dict[str, Ranks] = {}
    for path, name in known.items():
        if name in had:
            continue
        if _is_both(path) and path not in flat:
            leaves = [flat.pop(part, None) for part in _parts(path)]
            if any(leaves):
                flat[path], ranks[name] = _both(leaves)
        elif path in flat and not _is_both(path):
            ranks[name] = [(0, flat[path].rank)]
    if ranks:
        every = list(known.values())
        config = replace(config, target_parameters=fitted(None, had | set(ranks), every))
    return tree.from_items(flat), config, ranks


def taken_apart(
    whole: Mapping[str, LoRA], ranks: Mapping[str, Ranks], spec: ModelSpec, names: Names
) -> dict[str, LoRA] | None:
    """The inverse for the adapters of parameters, by path; None where `ranks` does not say of all
    of them which ranks are whose, or B does not agree.
    """
    known = parameters(spec, names)
    made: dict[str, LoRA] = {}
    for path, leaf in whole.items():
        of_parts = ranks.get(known[path], ())
        parts = _parts(path) if _is_both(path) else (path,)
        if len(of_parts) != len(parts):
            return None
        for part, at, b in zip(parts, of_parts, leaf.b.chunk(len(parts), 1), strict=True):
            first, last = at or (0, 0)
            if last > leaf.rank or bool(b[..., :first].any()) or bool(b[..., last:].any()):
                return None
            if at is not None:
                b = b[..., first:last].contiguous()
                made[part] = replace(leaf, a=leaf.a[:, first:last].contiguous(), b=b)
    return made


def _both(leaves: Sequence[LoRA | None]) -> tuple[LoRA, Ranks]:
    """One adapter [x, 2f, e] of gate and up, either of which may be without."""
    first = next(leaf for leaf in leaves if leaf is not None)
    blocks: list[torch.Tensor] = []
    ranks = [None if leaf is None else placed(leaf.a, blocks) for leaf in leaves]
    a, (x, rows, _) = torch.cat(blocks, 1), first.b.shape
    b = first.b.new_zeros(x, 2 * rows, a.shape[1])
    for i, (leaf, at) in enumerate(zip(leaves, ranks, strict=True)):
        if leaf is not None and at is not None:
            b[:, i * rows : (i + 1) * rows, slice(*at)] = b_at(leaf, first.scale)
    return LoRA(a, b, first.scale), ranks


def _is_both(path: str) -> bool:
    return path.endswith(f".{stacks.BOTH}")


def _parts(path: str) -> tuple[str, str]:
    layer = path.rpartition(".")[0]
    return f"{layer}.gate", f"{layer}.up"
