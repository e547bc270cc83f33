"""The quick interpreter against Triton's own: the same values, types and errors of everything that
it replaces. A process has one of them, so each runs this file as a program.
"""

# Kernels are written in Triton's language: they have no Python types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from purelm.kernels.launch import jit
from purelm.kernels.launch import language as tl

HERE = Path(__file__)


def test_it_is_tritons_own() -> None:
    pytest.importorskip("triton")
    paths = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    runs = [
        subprocess.Popen(
            [sys.executable, str(HERE), which],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for which in ("quick", "plain")
    ]
    quick, plain = (json.loads(run.communicate()[0]) for run in runs)
    assert [run.returncode for run in runs] == [0, 0]
    # Of every kind both occur, so that neither is missed in silence.
    outcomes = {(name.split()[0], "raised" in str(made)) for name, made in plain.items()}
    kinds = ("dtype", "type", "tensor", "sum", "reduce", "in")
    assert outcomes == set(itertools.product(kinds, (False, True)))
    assert quick.keys() == plain.keys()
    assert not {name: (quick[name], made) for name, made in plain.items() if quick[name] != made}


@jit
def _arithmetic_kernel(p_x, p_y, p_out, n, OP: tl.constexpr, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    b_x, b_y = tl.load(p_x + o, mask=o < n, other=0), tl.load(p_y + o, mask=o < n, other=0)
    if OP == "add":
        b_out = b_x + b_y
    elif OP == "sub":
        b_out = b_x - b_y
    elif OP == "mul":
        b_out = b_x * b_y
    else:
        b_out = (b_x > 0) + (b_y > 0)
    tl.store(p_out + o, b_out.to(p_out.dtype.element_ty), mask=o < n)


@jit
def _product(a, b):
    return a * b


@jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@jit
def _last(a, b):
    return b + a * 0


@jit
def _wider(a, b):
    return a.to(tl.float32) + b.to(tl.float32)


@jit
def _best(a, i, b, j):
    wins = (b > a) | ((b == a) & (j < i))
    return tl.where(wins, b, a), tl.where(wins, j, i)


@jit
def _reduce_kernel(
    p_x, p_out, p_at, COMBINE: tl.constexpr, AXIS: tl.constexpr, KEEP: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    o = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    b_x = tl.load(p_x + o)
    if COMBINE == "product":
        b_out = tl.reduce(b_x, AXIS, _product, keep_dims=KEEP)
    elif COMBINE == "larger":
        b_out = tl.reduce(b_x, AXIS, _larger, keep_dims=KEEP)
    elif COMBINE == "last":
        b_out = tl.reduce(b_x, AXIS, _last, keep_dims=KEEP)
    elif COMBINE == "wider":
        b_out = tl.reduce(b_x, AXIS, _wider, keep_dims=KEEP)
    else:
        b_out, b_at = tl.reduce((b_x, o), AXIS, _best, keep_dims=KEEP)
        tl.store(p_at + b_at * 0 + b_at % (ROWS * COLUMNS), b_at)
    if AXIS is None:
        tl.store(p_out + tl.arange(0, 1), b_out)
    elif KEEP:
        tl.store(p_out + (tl.arange(0, b_out.numel)[:, None] if AXIS == 1 else
                          tl.arange(0, b_out.numel)[None, :]), b_out)  # fmt: skip
    else:
        tl.store(p_out + tl.arange(0, b_out.numel), b_out)


@jit
def _helped(b_x, WRONG: tl.constexpr):
    if WRONG:
        b_x = b_x + tl.zeros([3], tl.float32)
    return tl.exp(b_x) + tl.math.sqrt(tl.abs(b_x))


@jit
def _helping_kernel(p_x, WRONG: tl.constexpr, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    for i in range(0, tl.num_programs(0)):
        tl.store(p_x + o, _helped(tl.load(p_x + o), WRONG) + i)


def types(language: Any, interpreter: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    kinds = "void int1 int8 uint8 int16 uint16 int32 uint32 int64 uint64 float16 bfloat16 float32"
    for name in (kinds + " float64 float8e5 float8e4nv float8e4b15 float8e5b16").split():
        kind = getattr(language, name)
        for form, made in (
            ("alone", kind),
            ("block", language.block_type(kind, [4])),
            ("pointer", language.pointer_type(kind)),
            ("pointers", language.block_type(language.pointer_type(kind), [4])),
        ):
            yield f"dtype {name} {form}", lambda kind=made: str(interpreter._get_np_dtype(kind))
    shapes: list[Any] = [[4], [2, 8], (1,), [], [3], [0], [-4], [4.0], [2, 8.0], [True], [2**20]]
    shapes += [[2**21], [1024, 2048], ["4"], 4, [language.constexpr(4)], [language.constexpr(4.0)]]
    shapes += [language.tuple([language.constexpr(2), language.constexpr(8)]), [4], [1]]
    for i, shape in enumerate(shapes):

        def block(shape: Any = shape) -> Any:
            made = language.block_type(language.float32, shape)
            other = language.block_type(language.int32, [4])
            sizes = [type(size).__name__ for size in made.shape]
            said = [str(made), repr(made), made.name, made.mangle(), str(made.scalar), made.nbytes]
            return [repr(made.shape), sizes, made.numel, *said, made == other, made != other]

        def tensor(shape: Any = shape) -> Any:
            handle = interpreter.TensorHandle(torch.zeros(1).numpy(), language.float32)
            made = language.core.tensor(handle, language.block_type(language.float32, shape))
            sizes = [(type(size).__name__, size.value) for size in made.shape]
            rest = type(made.numel).__name__, made.numel.value, str(made.type), str(made.dtype)
            return [type(made.shape).__name__, sizes, *rest, made.handle is handle]

        yield f"type {i} {shape}", block
        yield f"tensor {i} {shape}", tensor

    def scalar() -> Any:
        made = language.core.tensor(None, language.float32)
        shape = type(made.shape).__name__, len(made.shape), made.numel.value
        return [*shape, str(made.type), str(made.dtype)]

    yield "tensor scalar", scalar


def sums() -> Iterator[tuple[str, Callable[[], Any]]]:
    dtypes = [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.uint32]
    pairs = [(kind, kind) for kind in dtypes] + [(torch.int32, torch.int64)]
    pairs += [(torch.uint8, torch.int32), (torch.int8, torch.uint8), (torch.float32, torch.int32)]
    for (x, y), op, size in itertools.product(
        pairs, ("add", "sub", "mul", "bits"), ("small", "high", "low", "one")
    ):

        def run(x: Any = x, y: Any = y, op: str = op, size: str = size) -> Any:
            def drawn(kind: torch.dtype) -> torch.Tensor:
                if kind == torch.float32:
                    return torch.tensor([1.5, 2.0, -3.0, 0.0])
                ends = torch.iinfo(kind)
                edge = ends.min if size == "low" else ends.max
                number = {"small": 5, "one": edge}.get(size, edge)
                numbers = [number] * 4 if size != "one" else [0, 0, edge, 1]
                return torch.tensor(numbers, dtype=kind)

            out = torch.zeros(4, dtype=torch.int64)
            _arithmetic_kernel((1,), drawn(x), drawn(y), out, 3, OP=op, BLOCK=4)
            return out.tolist()

        yield f"sum {x} {y} {op} {size}", run


def reduces() -> Iterator[tuple[str, Callable[[], Any]]]:
    combines = ("product", "larger", "last", "wider", "best")
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int8)
    for combine, dtype, axis, keep, shape in itertools.product(
        combines, dtypes, (0, 1, None), (False, True), ((4, 8), (1, 4), (2, 1))
    ):
        yield (
            f"reduce {combine} {dtype} {axis} {keep} {shape}",
            lambda c=combine, d=dtype, a=axis, k=keep, s=shape: reduced(c, d, a, k, s),
        )
    big = torch.full((4, 8), 40000, dtype=torch.int32)
    yield "reduce overflow", lambda: reduced("product", big.dtype, 1, False, (4, 8), big)
    nan = torch.ones(4, 8).index_fill_(1, torch.tensor([3]), float("nan"))
    yield "reduce nan", lambda: reduced("larger", nan.dtype, 1, False, (4, 8), nan)


def reduced(
    combine: str, dtype: torch.dtype, axis: int | None, keep: bool, shape: Any, x: Any = None
) -> Any:
    if x is None:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        x = (x * (1 if dtype.is_floating_point else 2)).to(dtype)
    out, at = torch.zeros(32, dtype=dtype), torch.zeros(32, dtype=torch.int32)
    options = {"COMBINE": combine, "AXIS": axis, "KEEP": keep}
    _reduce_kernel((1,), x, out, at, ROWS=shape[0], COLUMNS=shape[1], **options)
    return [str(out.tolist()), at.tolist()]


def helped(wrong: bool) -> list[float]:
    x = torch.linspace(-1, 1, 12)
    _helping_kernel((3,), x, WRONG=wrong, BLOCK=4)
    return x.tolist()


def main(which: str) -> None:
    """Print what each case made, or what it raised."""
    import quick_interpreter
    import shim

    if which == "plain":
        quick_interpreter.install = lambda *_: None
    shim.install()
    import triton.language as language
    import triton.runtime.interpreter as interpreter

    made = {}
    # One wrong between two that are right: what is patched outlives an error.
    order = [(f"in order {i}", lambda w=w: helped(w)) for i, w in enumerate((False, True, False))]
    for name, run in (*order, *types(language, interpreter), *sums(), *reduces()):
        try:
            made[name] = run()
        except Exception as error:
            made[name] = f"raised {type(error).__name__}: {error}; {error.__cause__!r}"
    print(json.dumps(made))


if __name__ == "__main__":
    main(sys.argv[1])
