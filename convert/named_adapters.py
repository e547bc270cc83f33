"""`Adapter`: one named adapter of a model as a value, and what several of them do together."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import ArgumentError
from ..nn import several, tree
from ..nn.lora import relative
from .lora_config import PeftConfig

DEFAULT = "default"
# A name is part of a folder's and of a parameter's name.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}", re.ASCII)


@dataclass(frozen=True)
class Adapter:
    """Trees of one adapter, as they are trained, and its settings (None: made without any).

    trained: copies of params in place of the base's (`modules_to_save`, biases). start: what
    `adapters` began with, where they act by their change since (`lora.relative`).
    """

    adapters: tree.Tree
    trained: tree.Tree = field(default_factory=dict)
    start: tree.Tree = field(default_factory=dict)
    config: PeftConfig | None = None


def acting(worn: Sequence[Adapter], *, training: bool = False) -> tree.Tree:
    """The one tree of adapters by which all of `worn` act on the base; see `several.summed`.

    Dropout matters only in training, and is left out of sums elsewhere.
    """
    trees = [relative(w.adapters, w.start) if w.start else w.adapters for w in worn]
    if len(trees) > 1 and not training:
        trees = [tree.map(lambda leaf: replace(leaf, dropout=0.0), one) for one in trees]
    return several.summed(trees) if trees else {}


def trained(worn: Sequence[Adapter]) -> tree.Tree:
    """The trained copies of all of `worn`; ArgumentError where two have the same one."""
    found: dict[str, Any] = {}
    for one in worn:
        for path, leaf in tree.items(one.trained):
            if path in found:
                raise ArgumentError(
                    f"two of these adapters replace {path} by a copy of their own "
                    "(modules_to_save or bias), so only one of them can be active"
                )
            found[path] = leaf
    return tree.from_items(found)


def check_name(name: Any, taken: Sequence[str] = ()) -> str:
    """`name`; raises ArgumentError for one that is no adapter's name, or is taken."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ArgumentError(
            f"the adapter's name is {name!r:.200}, expected letters, digits, '_' and '-'"
        )
    if name in taken:
        raise ArgumentError(f"the model wears an adapter {name!r} already; delete it first")
    return name


def chosen(names: str | Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    """The names of adapters that are there; raises ArgumentError for others, or none."""
    found = (names,) if isinstance(names, str) else tuple(names)
    for name in found:
        if name not in known:
            raise ArgumentError(
                f"the model wears no adapter {name!r}; it has {', '.join(known) or 'none'}"
            )
    if not found or len(set(found)) < len(found):
        raise ArgumentError(f"the adapters are {list(found)}, expected one or more, each once")
    return found
