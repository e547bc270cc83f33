"""Adapters of several projections as one of the matrix that Hugging Face's class has, and back.

peft adapts the modules of that class, so its files know `qkv_proj` alone where the layers here have
q, k and v. The adapter of such a matrix has each part's ranks one after the other, B with zeros
outside of a part's own rows; parts with the same A share their ranks. Of one that peft trained, all
parts have A, one tensor, and their rows of B: the same function, exactly, and trained so too.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..errors import AdapterError, ArgumentError
from ..nn import tree
from ..nn.lora import LoRA
from ..nn.spec import ModelSpec
from ..quant.linear import weight_of
from . import fused
from .fused import Fused
from .json_file import parse_json
from .names import Names

# [first, last + 1] of an adapter's ranks, of each part that has an adapter.
Ranks = Sequence[tuple[int, int] | None]
_MOST = 1 << 24


@dataclass(frozen=True)
class Stored:
    """What a file holds, by the names of Hugging Face's class: adapters by module, copies by
    tensor. ranks: of each adapter put together, which of its ranks are whose.
    """

    adapters: dict[str, LoRA]
    copies: dict[str, torch.Tensor]
    ranks: dict[str, Ranks]


@torch.no_grad()
def as_stored(
    adapters: Mapping[str, LoRA],
    copies: Mapping[str, torch.Tensor],
    spec: ModelSpec,
    names: Names,
    params: tree.Tree = None,
) -> Stored:
    """Adapters by our modules' paths, and copies by our params', as a file has them.

    params: the base's, needed where only some parts of a matrix have a copy, or DoRA's magnitude.
    Raises ArgumentError where they are needed and not given.
    """
    owners = fused.owners(spec, names)
    made = Stored({}, {}, {})

    def base(path: str, other: str) -> torch.Tensor:
        if params is None:
            raise ArgumentError(
                f"{other} holds several projections, of which {path} is not trained, and has to be "
                "in the file as it is; give the base's params"
            )
        return weight_of(tree.at(params, path), torch.float32).detach().cpu()

    def lengths(path: str, other: str) -> torch.Tensor:
        rows: torch.Tensor = torch.linalg.vector_norm(base(f"{path}.weight", other), dim=-1)
        return rows

    for path, leaf in adapters.items():
        one = owners.get(path)
        if one is None:
            made.adapters[names.module_to_hf(path)] = leaf
        elif one.name not in made.adapters:
            whole, ranks = joined(one, [adapters.get(part) for part in one.paths], lengths)
            made.adapters[one.name], made.ranks[one.name] = whole, ranks
    for path, copy in copies.items():
        module, _, kind = path.rpartition(".")
        one = owners.get(module)
        if one is None:
            made.copies[names.to_hf(path)] = copy
        elif (name := f"{one.name}.{kind}") not in made.copies:
            every = [f"{part}.{kind}" for part in one.paths]
            parts = [copies.get(part) for part in every]
            made.copies[name] = one.whole(
                [base(at, name) if x is None else x for at, x in zip(every, parts, strict=True)]
            )
    for name, copy in made.copies.items():
        made.copies[name] = copy.mT.contiguous() if names.is_transposed(name) else copy
    return made


def joined(
    one: Fused, leaves: Sequence[LoRA | None], lengths: Callable[[str, str], torch.Tensor]
) -> tuple[LoRA, Ranks]:
    """The adapter of the whole, and which of its ranks are whose.

    lengths(path, name): those of the rows of a part without an adapter, for DoRA.
    """
    first = next(leaf for leaf in leaves if leaf is not None)
    blocks: list[torch.Tensor] = []
    ranks: list[tuple[int, int] | None] = []
    for leaf in leaves:
        ranks.append(None if leaf is None else placed(leaf.a, blocks))
    a = torch.cat(blocks)
    b = first.b.new_zeros(sum(one.rows), len(a))
    for i, (leaf, at) in enumerate(zip(leaves, ranks, strict=True)):
        if leaf is not None and at is not None:
            one.put(b[:, slice(*at)], i, b_at(leaf, first.scale))
    magnitude = None
    if any(leaf is not None and leaf.magnitude is not None for leaf in leaves):
        magnitude = one.whole(
            [
                lengths(path, one.name) if leaf is None else _magnitude(leaf, one.name)
                for path, leaf in zip(one.paths, leaves, strict=True)
            ]
        )
    return LoRA(a, b, first.scale, first.dropout, magnitude), ranks


def placed(a: torch.Tensor, blocks: list[torch.Tensor]) -> tuple[int, int]:
    """Where `a` stands among the blocks, behind which it is put if it is none of them."""
    begin = 0
    for block in blocks:
        if block.shape == a.shape and torch.equal(block, a):
            break
        begin += block.shape[-2]
    else:
        blocks.append(a)
    return begin, begin + a.shape[-2]


def b_at(leaf: LoRA, scale: float) -> torch.Tensor:
    """B where the adapter's scale is another; nothing is rounded where it is its own."""
    return leaf.b if leaf.scale == scale else leaf.b * (leaf.scale / scale)


def _magnitude(leaf: LoRA, name: str) -> torch.Tensor:
    if leaf.magnitude is None:
        raise ArgumentError(
            f"{name} holds several projections, of which some are adapted with DoRA and some "
            "without; adapt them alike"
        )
    return leaf.magnitude


def apart(one: Fused, whole: LoRA, ranks: Ranks | None, *, all_of_them: bool) -> dict[str, LoRA]:
    """The adapters of the parts, by their paths: those of `ranks`, if B agrees, or all ranks each.
    Those that have the same ranks have one tensor as their A.

    all_of_them: a part without ranks would lose what is trained of it beside them.
    """
    if ranks is None or not _agree(one, whole, ranks) or (all_of_them and None in ranks):
        ranks = [(0, whole.rank)] * len(one.paths)
    made = {}
    blocks = {at: whole.a[slice(*at)].clone() for at in ranks if at is not None}
    for i, (path, at) in enumerate(zip(one.paths, ranks, strict=True)):
        if at is not None:
            magnitude = None if whole.magnitude is None else one.part(whole.magnitude, i)
            b = one.part(whole.b[:, slice(*at)], i)
            made[path] = replace(whole, a=blocks[at], b=b, magnitude=magnitude)
    return made


def _agree(one: Fused, whole: LoRA, ranks: Ranks) -> bool:
    """Whether B is zero outside of each part's ranks."""
    if len(ranks) != len(one.paths):
        return False
    for i, at in enumerate(ranks):
        first, last = at or (0, 0)
        rows = one.part(whole.b, i)
        if last > whole.rank or bool(rows[:, :first].any()) or bool(rows[:, last:].any()):
            return False
    return True


def to_text(ranks: Mapping[str, Ranks]) -> str:
    """The ranks of a file's adapters for its header."""
    return json.dumps(ranks, sort_keys=True, separators=(",", ":"))


def from_text(text: str, file: Path) -> dict[str, Ranks]:
    """The inverse of `to_text`; raises AdapterError for what is no such text."""
    problem = AdapterError(
        f"the header's purelm.ranks ({text[:80]!r}) does not say which ranks are whose; remove it",
        file=file,
    )
    try:
        found = parse_json(text.encode(), max_depth=4)
    except ValueError:
        raise problem from None

    def is_range(at: Any) -> bool:
        numbers = isinstance(at, list) and len(at) == 2 and all(type(n) is int for n in at)
        return at is None or (numbers and 0 <= at[0] < at[1] < _MOST)

    if not isinstance(found, dict) or not all(
        isinstance(value, list) and all(map(is_range, value)) for value in found.values()
    ):
        raise problem
    return {
        name: [None if at is None else (at[0], at[1]) for at in value]
        for name, value in found.items()
    }
