"""Functions over trees: nested dicts, lists and tuples whose other values are leaves.

A leaf is a tensor or a value that holds tensors and knows its own format (`NF4`, `LoRA`); those are
registered with torch's pytree, so `torch.func` sees their tensors, while here they stay whole.
Paths are dotted, `layers.0.attn.q.weight`. `None` marks a hole and is no leaf.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils import _pytree  # torch has no public module for this yet

Tree = Any


def items(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every (path, leaf) in order."""
    if tree is None:
        return
    if not isinstance(tree, dict | list | tuple):
        yield prefix, tree
        return
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, child in pairs:
        yield from items(child, f"{prefix}.{key}" if prefix else str(key))


def leaves(tree: Tree) -> list[Any]:
    """Every leaf in order."""
    return [leaf for _, leaf in items(tree)]


def map(f: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """A tree of f(leaf, *leaves at the same path of the rest)."""
    if tree is None:
        return None
    if isinstance(tree, dict):
        return {key: map(f, child, *(r[key] for r in rest)) for key, child in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(map(f, child, *(r[i] for r in rest)) for i, child in enumerate(tree))
    return f(tree, *rest)


def map_with_path(f: Callable[[str, Any], Any], tree: Tree, prefix: str = "") -> Tree:
    """A tree of f(path, leaf)."""
    if tree is None:
        return None
    join = f"{prefix}." if prefix else ""
    if isinstance(tree, dict):
        return {key: map_with_path(f, child, f"{join}{key}") for key, child in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(map_with_path(f, child, f"{join}{i}") for i, child in enumerate(tree))
    return f(prefix, tree)


def at(tree: Tree, path: str) -> Any:
    """The subtree at `path`; raises KeyError if there is none."""
    for key in path.split(".") if path else ():
        if isinstance(tree, dict) and key in tree:
            tree = tree[key]
        elif isinstance(tree, list | tuple) and key.isdigit() and int(key) < len(tree):
            tree = tree[int(key)]
        else:
            raise KeyError(path)
    return tree


def get(tree: Tree, *keys: str | int) -> Any:
    """The subtree behind `keys`, or None where a key is absent."""
    for key in keys:
        if isinstance(tree, dict):
            tree = tree.get(key)
        elif isinstance(tree, list | tuple) and isinstance(key, int) and key < len(tree):
            tree = tree[key]
        else:
            return None
    return tree


def partition(tree: Tree, chosen: Callable[[str, Any], bool]) -> tuple[Tree, Tree]:
    """Split into (leaves for which `chosen(path, leaf)`, the others), with holes in both.

    `combine` is the exact inverse.
    """
    picked = map_with_path(lambda path, leaf: leaf if chosen(path, leaf) else None, tree)
    rest = map_with_path(lambda path, leaf: None if chosen(path, leaf) else leaf, tree)
    return picked, rest


def combine(first: Tree, second: Tree) -> Tree:
    """The tree in which holes (and absent keys) of `first` are filled from `second`."""
    if first is None:
        return second
    if isinstance(first, dict) and isinstance(second, dict):
        keys = [*second, *(key for key in first if key not in second)]
        return {key: combine(first.get(key), second.get(key)) for key in keys}
    if isinstance(first, list) and isinstance(second, list):
        # `from_items` leaves out the holes at a list's end.
        return [combine(a, b) for a, b in itertools.zip_longest(first, second)]
    return first


def from_items(pairs: dict[str, Any]) -> Tree:
    """The tree of dicts (and lists, where all keys are numbers from 0) with these paths."""
    root: dict[str, Any] = {}
    for path, leaf in pairs.items():
        *parents, last = path.split(".")
        node = root
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return _listed(root)


def _listed(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    done = {key: _listed(child) for key, child in node.items()}
    if done and all(key.isdigit() for key in done):
        # Layers without an entry become holes, so that indices keep their meaning.
        return [done.get(str(i)) for i in range(max(int(key) for key in done) + 1)]
    return done


def placed(tree: Tree, device: torch.device) -> Tree:
    """The tree with its tensors on `device`; what is one tensor in several leaves stays one."""
    made: dict[int, torch.Tensor] = {}

    def there(t: torch.Tensor) -> torch.Tensor:
        if id(t) not in made:
            made[id(t)] = t.to(device)
        return made[id(t)]

    return map_tensors(there, tree)


def tensors(tree: Tree) -> list[torch.Tensor]:
    """Every tensor, those inside structured leaves included, in order."""
    return [leaf for leaf in _pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def map_tensors(f: Callable[[torch.Tensor], torch.Tensor], tree: Tree) -> Tree:
    """A tree with `f` applied to every tensor, those inside structured leaves included."""
    return _pytree.tree_map_only(torch.Tensor, f, tree)


def nbytes(tree: Tree) -> int:
    """Bytes of all tensors."""
    return sum(t.numel() * t.element_size() for t in tensors(tree))
