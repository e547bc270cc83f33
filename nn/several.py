"""Several adapters of one base: acting at once, or mixed into one.

A tree of adapters is a value, so that any number of them lie beside one base.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import torch

from ..errors import ArgumentError
from . import lora, stacks, tree
from .lora import LoRA

Combination = Literal["linear", "cat", "svd"]


def summed(trees: Sequence[tree.Tree]) -> tree.Tree:
    """Adapters whose changes are the sums of those of `trees`: of summed rank where several meet.

    Differentiable in every tree; one tree alone is returned as it is. Where several meet they are
    dropped alike in training. Raises ArgumentError for DoRA, whose lengths are of one adapter
    only, and for different dropout.
    """
    if len(trees) == 1:
        return trees[0]

    def one(path: str, leaves: Sequence[LoRA]) -> LoRA:
        first = leaves[0]
        if len(leaves) == 1:
            return first
        if len({leaf.dropout for leaf in leaves}) > 1:
            raise ArgumentError(
                f"adapters of {path} have different dropout, "
                f"{', '.join(str(leaf.dropout) for leaf in leaves)}; train them one at a time"
            )
        # One scale for all, the first's.
        bs = [leaf.b * (leaf.scale / first.scale) for leaf in leaves[1:]]
        a = torch.cat([leaf.a for leaf in leaves], dim=-2)
        return replace(first, a=a, b=torch.cat([first.b, *bs], dim=-1))

    return _each(trees, one)


def mixed(
    trees: Sequence[tree.Tree],
    weights: Sequence[float],
    combination: Combination = "svd",
    rank: int | None = None,
) -> tree.Tree:
    """One new tree that stands for the weighted sum of `trees`, as peft's `add_weighted_adapter`.

    cat: exactly sum of weight * change, of summed rank. svd: its best approximation of `rank`
    (default: the largest of theirs). linear: a and b summed apart, each by the root of weight *
    scale, which is no sum of changes; ranks must be equal. The new leaves have scale 1, share no
    memory, and the dropout of the first. Raises ArgumentError for DoRA and what does not fit.
    """
    if not trees or len(trees) != len(weights):
        raise ArgumentError(
            f"found {len(trees)} adapters and {len(weights)} weights, expected one for each"
        )
    for weight in weights:
        if isinstance(weight, bool) or not isinstance(weight, (int, float)):
            raise ArgumentError(f"a weight is {weight!r}, expected a number")
        if not math.isfinite(weight):
            raise ArgumentError(f"a weight is {weight!r}, expected a finite number")
    ranks = [leaf.rank for one in trees for leaf in tree.leaves(one)]
    highest = max(ranks) if rank is None else rank
    if type(highest) is not int or highest < 1:
        raise ArgumentError(f"svd_rank is {rank!r}, expected an integer of at least 1")
    scaled = [lora.rescale(one, float(weight)) for one, weight in zip(trees, weights, strict=True)]
    made: dict[str, Callable[[str, Sequence[LoRA]], tuple[torch.Tensor, torch.Tensor]]] = {
        "linear": _linear,
        "cat": _cat,
        "svd": lambda path, leaves: _svd(leaves, highest),
    }
    if combination not in made:
        raise ArgumentError(
            f"combination_type is {combination!r}, expected one of {', '.join(made)}; merges that "
            "prune or draw (ties, dare, magnitude_prune) are not there"
        )

    def one_new(path: str, leaves: Sequence[LoRA]) -> LoRA:
        a, b = made[combination](path, leaves)
        return LoRA(a.contiguous(), b.contiguous(), 1.0, leaves[0].dropout)

    with torch.no_grad():
        return _each(scaled, one_new, alone=True)


def _each(
    trees: Sequence[tree.Tree],
    one: Callable[[str, Sequence[LoRA]], LoRA],
    alone: bool = False,
) -> tree.Tree:
    """The tree of `one` of the leaves at every path; DoRA is refused where `one` changes it."""
    flat = [dict(tree.items(each)) for each in trees]
    if any(f".{stacks.BOTH}" in path for each in flat for path in each):
        # Experts' gate and up as one adapter meet those of each only apart.
        flat = [dict(tree.items(stacks.separated(each))) for each in trees]
    paths = dict.fromkeys(path for each in flat for path in each)
    made = {}
    for path in paths:
        leaves = [each[path] for each in flat if path in each]
        if (alone or len(leaves) > 1) and any(leaf.magnitude is not None for leaf in leaves):
            raise ArgumentError(
                f"an adapter of {path} is DoRA, whose row lengths are of that adapter alone: it "
                "adds up with no other; use one at a time, or merge it into the base"
            )
        made[path] = one(path, leaves)
    return tree.from_items(made)


def _linear(path: str, leaves: Sequence[LoRA]) -> tuple[torch.Tensor, torch.Tensor]:
    if len({leaf.rank for leaf in leaves}) > 1:
        raise ArgumentError(
            f"adapters of {path} have ranks {', '.join(str(leaf.rank) for leaf in leaves)}; "
            "'linear' needs equal ones, 'cat' and 'svd' take any"
        )
    roots = [math.sqrt(abs(leaf.scale)) for leaf in leaves]
    pairs = list(zip(leaves, roots, strict=True))
    a = sum(leaf.a * math.copysign(root, leaf.scale) for leaf, root in pairs)
    b = sum(leaf.b * root for leaf, root in pairs)
    assert isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
    return a, b


def _cat(path: str, leaves: Sequence[LoRA]) -> tuple[torch.Tensor, torch.Tensor]:
    a = torch.cat([leaf.a * leaf.scale for leaf in leaves], dim=-2)
    return a, torch.cat([leaf.b for leaf in leaves], dim=-1)


def _svd(leaves: Sequence[LoRA], rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    change = torch.stack([lora.delta(leaf) for leaf in leaves]).sum(0)
    u, s, vh = torch.linalg.svd(change, full_matrices=False)
    # A matrix has no more directions than its smaller side.
    return vh[..., :rank, :], u[..., :rank] * s[..., None, :rank]
