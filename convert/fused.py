"""Which rows of a stored matrix are whose, where one holds several of our projections: one above
the other (Phi-3's qkv_proj), their rows for each kv head in turn (GPT-NeoX's query_key_value), or
row by row in turn (gpt-oss's gate_up_proj).

Checkpoints are taken apart and put together by it, and so are adapters' files.
"""

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..nn import stacks, tree
from ..nn.spec import ModelSpec
from .names import Names


@dataclass(frozen=True)
class Fused:
    """A matrix [rows, *row] in Hugging Face's classes and files, or a vector of biases (row ()).

    name: theirs; paths: ours of the parts, in the order of their rows; rows: how many each has. The
    matrix consists of `groups` of equal size, in each of which the parts' shares follow each other,
    those of `turns` parts of equal size row by row. A stack [x, rows / x, *row] of the matrices of
    experts is read as the matrix of all rows, each expert's after the last's.
    """

    name: str
    paths: tuple[str, ...]
    rows: tuple[int, ...]
    row: tuple[int, ...]
    groups: int = 1
    turns: int = 1

    @functools.cached_property
    def _shares(self) -> tuple[slice, ...]:
        """Where in a group the rows of each part lie."""
        made, begin = [], 0
        for i, count in enumerate(self.rows):
            turn, each = i % self.turns, count // self.groups
            first = begin - turn * each
            made.append(slice(first + turn, first + self.turns * each, self.turns))
            begin += each
        return tuple(made)

    def share(self, i: int, each: int | None = None) -> tuple[int, slice]:
        """Which matrix of a stack, with `each` so many rows, has part `i`, and where there."""
        at = self._shares[i]
        number = 0 if each is None else at.start // each
        by = number * (each or 0)
        return number, slice(at.start - by, at.stop - by, at.step)

    def cut(self, matrix: torch.Tensor, at: slice) -> torch.Tensor:
        """The rows `at` of each group of a matrix [rows, ...]: a view [groups, n, ...]."""
        return _grouped(matrix, self.groups)[:, at]

    def view(self, whole: torch.Tensor, i: int) -> torch.Tensor:
        """Part `i` of the whole, or of a stack, or of what goes with its rows: [groups, n, ...]."""
        if whole.ndim > len(self.row) + 1:
            number, at = self.share(i, whole.shape[1])
            return self.cut(whole[number], at)
        return self.cut(whole, self._shares[i])

    def part(self, whole: torch.Tensor, i: int) -> torch.Tensor:
        """Part `i` [rows[i], ...] of the whole, contiguous and in memory of its own."""
        return self.view(whole, i).flatten(0, 1).clone(memory_format=torch.contiguous_format)

    def put(self, whole: torch.Tensor, i: int, part: torch.Tensor) -> None:
        """Write part `i` [rows[i], ...] into the whole."""
        self.view(whole, i).copy_(_grouped(part, self.groups))

    def whole(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """The parts [rows[i], ...] put together, in the dtype and place of the first."""
        made = parts[0].new_empty((sum(self.rows), *parts[0].shape[1:]))
        for i, part in enumerate(parts):
            self.put(made, i, part)
        return made


def stored(name: str, names: Names, spec: ModelSpec, known: Mapping[str, Any]) -> Fused | None:
    """How a checkpoint's tensor `name` consists of our params; None for one that is none or one.

    known: the params by path, or what has their shapes.
    """
    for paths in names.parts(name):
        if any("*" in path for path in paths):
            paths = _of_experts(paths, known)
        if paths and all(path in known for path in paths):
            return _fused(name, paths, names, spec, known)
    return None


@functools.lru_cache(maxsize=8)
def modules(spec: ModelSpec, names: Names) -> Mapping[str, Fused]:
    """The modules of Hugging Face's class that are several of our projections, by their names.

    Experts are none: transformers has no module of one. Paths are of modules too.
    """
    known = dict(tree.items(stacks.each_spec(spec)))
    made: dict[str, Fused] = {}
    taken: set[str] = set()
    for name, paths in _in_layers(names, len(spec.layers)):
        weights = tuple(f"{path}.weight" for path in paths)
        if len(paths) > 1 and taken.isdisjoint(paths) and all(w in known for w in weights):
            one = _fused(name, weights, names, spec, known)
            made[name] = Fused(name, paths, one.rows, one.row, one.groups, one.turns)
            taken.update(paths)
    return made


@functools.lru_cache(maxsize=8)
def owners(spec: ModelSpec, names: Names) -> Mapping[str, Fused]:
    """Path of a module -> the module of Hugging Face's class that it is a part of."""
    return {path: one for one in modules(spec, names).values() for path in one.paths}


def module_to_hf(path: str, spec: ModelSpec, names: Names) -> str:
    """The module of Hugging Face's class that our module at `path` is, or is a part of."""
    one = owners(spec, names).get(path)
    return names.module_to_hf(path) if one is None else one.name


def to_hf(path: str, spec: ModelSpec, names: Names) -> str:
    """The tensor of Hugging Face's class that our param at `path` is, or is a part of."""
    module, _, kind = path.rpartition(".")
    one = owners(spec, names).get(module)
    return names.to_hf(path) if one is None else f"{one.name}.{kind}"


def _in_layers(names: Names, depth: int) -> Iterator[tuple[str, tuple[str, ...]]]:
    for (name, paths), i in itertools.product(names.fused, range(depth)):
        if not any(f".{stacks.KEY}." in path for path in paths):
            yield name.replace("*", str(i)), tuple(path.replace("*", str(i)) for path in paths)


def _fused(
    name: str, paths: tuple[str, ...], names: Names, spec: ModelSpec, known: Mapping[str, Any]
) -> Fused:
    rows = tuple(known[path].shape[0] for path in paths)
    row = tuple(known[paths[0]].shape[1:])
    return Fused(name, paths, rows, row, names.groups(spec), names.turns(name))


def _grouped(rows: torch.Tensor, groups: int) -> torch.Tensor:
    """[rows, ...] -> [groups, rows / groups, ...], also of what is transposed: a view."""
    made: torch.Tensor = torch.unflatten(rows, 0, (groups, -1))
    return made


def _of_experts(paths: tuple[str, ...], known: Mapping[str, Any]) -> tuple[str, ...]:
    """The paths of every expert there is, one expert after the other."""
    every = itertools.takewhile(
        lambda made: made[0] in known,
        ([path.replace("*", str(i)) for path in paths] for i in itertools.count()),
    )
    return tuple(path for expert in every for path in expert)
