"""Kernels with one thing wrong: what a kernel's tests must notice.

A mutant is one change to the syntax tree of a Triton kernel: an operator, a comparison, a number,
the branches of a `where`, a maximum, a mask that is left out. Drawn by seed from all that a file's
kernels offer.
"""

from __future__ import annotations
import __future__

import ast
import copy
import inspect
import random
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from purelm.kernels.launch import Kernel

OPERATORS: dict[type, type] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.RShift: ast.LShift,
    ast.LShift: ast.RShift,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
}
CALLS = {"maximum": "minimum", "minimum": "maximum", "sum": "max", "max": "sum", "exp": "exp2"}


class Mutant(NamedTuple):
    """A kernel of a module, the tree it gets, and what was changed."""

    module: ModuleType
    name: str
    tree: ast.FunctionDef
    what: str

    def __str__(self) -> str:
        return f"{self.name}: {self.what}"


def every(module: ModuleType) -> list[Mutant]:
    """All mutants of the kernels that a module defines."""
    found = []
    for name, kernel in vars(module).items():
        if isinstance(kernel, Kernel) and kernel.function.__module__ == module.__name__:
            source = textwrap.dedent(inspect.getsource(kernel.function))
            tree = ast.parse(source).body[0]
            assert isinstance(tree, ast.FunctionDef)
            tree.decorator_list = []
            # What lanes get that a mask leaves out is spared: mostly no result can show it.
            spared = {
                id(part)
                for node in ast.walk(tree)
                if isinstance(node, ast.keyword) and node.arg == "other"
                for part in ast.walk(node)
            }
            for i, node in enumerate(ast.walk(tree)):
                if id(node) not in spared:
                    found += [
                        Mutant(module, name, *made) for made in _changes(tree, i, node) if made
                    ]
    return found


def _changes(tree: ast.FunctionDef, i: int, node: ast.AST) -> Iterator[Any]:
    """(tree, what) for each change of node i of a walk through the tree."""

    def changed(change: Any) -> tuple[ast.FunctionDef, str]:
        new = copy.deepcopy(tree)
        target = list(ast.walk(new))[i]
        before = ast.unparse(target)
        change(target)
        return new, f"{before} -> {ast.unparse(target)}"

    def operator(target: Any) -> None:
        target.op = OPERATORS[type(target.op)]()

    def comparison(target: Any) -> None:
        target.ops = [OPERATORS[type(target.ops[0])]()]

    def number(target: Any) -> None:
        old = target.value
        target.value = old + 1 if isinstance(old, int) else old * 1.5 or 1.0

    def call(target: Any) -> None:
        target.func.attr = CALLS[target.func.attr]

    def swap(target: Any) -> None:
        target.args[1:] = target.args[:0:-1]

    def unmask(target: Any) -> None:
        target.keywords = [k for k in target.keywords if k.arg != "mask"]

    if isinstance(node, ast.BinOp | ast.AugAssign) and type(node.op) in OPERATORS:
        yield changed(operator)
    if isinstance(node, ast.Compare) and type(node.ops[0]) in OPERATORS:
        yield changed(comparison)
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        yield changed(number)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        if node.func.attr in CALLS:
            yield changed(call)
        if node.func.attr == "where":
            yield changed(swap)
        if any(k.arg == "mask" for k in node.keywords):
            yield changed(unmask)


def drawn(module: ModuleType, count: int, seed: int = 0) -> list[Mutant]:
    """`count` of a module's mutants, or all where there are no more."""
    found = every(module)
    return random.Random(seed).sample(found, min(count, len(found)))


@contextmanager
def installed(mutant: Mutant, folder: Path) -> Iterator[None]:
    """The module's kernel is the mutant inside. The interpreter reads sources, so it has a file."""
    kernels = [k for k in vars(mutant.module).values() if isinstance(k, Kernel)]
    kernel = vars(mutant.module)[mutant.name]
    before = kernel.function
    file = folder / f"mutant{len(list(folder.iterdir()))}.py"
    file.write_text(ast.unparse(ast.fix_missing_locations(mutant.tree)) + "\n")
    names = dict(vars(mutant.module))
    flags = __future__.annotations.compiler_flag
    exec(compile(file.read_text(), str(file), "exec", flags=flags), names)
    names[mutant.name].__module__ = mutant.module.__name__
    kernel.function = names[mutant.name]
    names[mutant.name] = kernel

    def forget() -> None:
        for k in kernels:
            vars(k).pop("jitted", None)

    forget()
    try:
        yield
    finally:
        kernel.function = before
        forget()
