"""Trees of experts, as one stack of weights for each projection, or expert by expert.

A layer computes with stacks, `mlp.experts.up.weight` [x, out, in]; files name each expert's
tensors, `mlp.experts.3.up.weight`. Both trees hold the same.
"""

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from ..errors import ArgumentError, KernelError
from ..quant import stack as leaves
from . import tree
from .lora import LoRA
from .params import ParamSpec, param_specs
from .spec import ModelSpec

# The key of a layer's experts in every tree.
KEY = "experts"
# An adapter of gate and up as one matrix [x, 2f, e], as checkpoints that stack experts have them.
BOTH = "gate_up"
_EXPERT = re.compile(rf"\.{KEY}\.(\d+)\.")


def one_by_one(nodes: tree.Tree) -> tree.Tree:
    """The tree with each layer's stacks as a list of trees, one an expert; its tensors are views.

    Leaves may be weights, adapters and `ParamSpec`s.
    """
    return _changed(nodes, lambda node: node if isinstance(node, list) else apart(node))


def together(nodes: tree.Tree) -> tree.Tree:
    """The inverse of `one_by_one`; copies, except for specs.

    Raises ArgumentError where a layer's experts differ in what they have, or in shape or format.
    """
    return _changed(nodes, lambda node: node if isinstance(node, dict) else joined(node))


@functools.lru_cache(maxsize=8)
def each_spec(spec: ModelSpec) -> tree.Tree:
    """`param_specs` expert by expert: what the tensors of files are."""
    return one_by_one(param_specs(spec))


def place(path: str) -> tuple[str, int] | None:
    """The path of the stack that one expert's leaf belongs to, and the expert; None for others."""
    found = _EXPERT.search(path)
    return None if found is None else (_EXPERT.sub(f".{KEY}.", path), int(found[1]))


def apart(node: tree.Tree) -> list[Any]:
    """The experts' trees of one layer."""
    columns = {path: _unbound(leaf) for path, leaf in tree.items(node)}
    count = len(next(iter(columns.values()), []))
    return [
        tree.from_items({path: column[i] for path, column in columns.items()}) for i in range(count)
    ]


def joined(nodes: Sequence[tree.Tree]) -> tree.Tree:
    """One layer's experts' trees as one tree of stacks; see `together`."""
    flat = [dict(tree.items(node)) for node in nodes]
    if any(each.keys() != flat[0].keys() for each in flat):
        raise ArgumentError(
            "the experts of a layer differ in what they have: "
            f"{sorted({', '.join(each) or 'nothing' for each in flat})}; experts are adapted and "
            "trained all alike, as one stack"
        )
    return tree.from_items(
        {path: joined_leaf([each[path] for each in flat], path) for path in flat[0]}
    )


def joined_leaf(column: Sequence[Any], path: str) -> Any:
    """The leaves of all experts at `path` as one stack; ArgumentError where they differ."""
    first = column[0]
    if isinstance(first, ParamSpec):
        return replace(first, shape=(len(column), *first.shape), axes=f"x{first.axes}")
    try:
        made = leaves.stack(column)
    except (KernelError, RuntimeError) as problem:
        raise ArgumentError(f"experts' {path} do not make one stack: {problem}") from None
    return made.inner if isinstance(first, LoRA) else made


def separated(adapters: tree.Tree) -> tree.Tree:
    """The tree with an adapter of gate and up together as one of each, which share `a`."""

    def split(node: Any) -> Any:
        both = node.get(BOTH) if isinstance(node, dict) else None
        if both is None:
            return node
        gate, up = both.b.chunk(2, dim=-2)
        rest = {key: child for key, child in node.items() if key != BOTH}
        return {"gate": replace(both, b=gate), "up": replace(both, b=up), **rest}

    return _changed(adapters, split)


def _unbound(leaf: Any) -> list[Any]:
    if isinstance(leaf, ParamSpec):
        return [replace(leaf, shape=leaf.shape[1:], axes=leaf.axes[1:])] * leaf.shape[0]
    return leaves.unbind(leaf)


def _changed(nodes: tree.Tree, change: Callable[[Any], Any]) -> tree.Tree:
    if isinstance(nodes, dict):
        return {
            key: change(child) if key == KEY and child is not None else _changed(child, change)
            for key, child in nodes.items()
        }
    if isinstance(nodes, list | tuple):
        return type(nodes)(_changed(child, change) for child in nodes)
    return nodes
