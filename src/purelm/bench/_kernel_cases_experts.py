"""The cases of `purelm bench kernels` for experts: rows times their own expert's matrix."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..kernels import grouped, nf4, weighted_rows
from ._kernel_case import BLOCK, CHECKED_ROWS, Case, Shape, forward, normal, parts
from ._kernel_check import against, close

# Tokens, beside all of a batch.
TOKENS = (1, 32)


def choosing(shape: Shape, device: torch.device) -> Iterator[Case]:
    """The products of 4-bit experts, of as many tokens as a step of decoding or of training has."""
    if shape.experts is None:
        return
    groups, each = shape.experts
    out, k = shape.mlp, shape.hidden

    def inputs(tokens: int) -> Any:
        ids = torch.rand(tokens, groups, device=device).topk(each).indices.flatten()
        offsets = grouped.offsets_of(ids.sort().values, groups)
        made = []
        for _ in range(groups):
            packed, absmax = nf4.quantize(normal(device, out, k, std=0.02), BLOCK)
            made.append((packed, *nf4.quantize_absmax(absmax)))
        stack = [torch.stack(tensors) for tensors in zip(*made, strict=True)]
        return (normal(device, tokens * each, k), offsets, *stack), ()

    def run(x: Tensor, offsets: Tensor, *tensors: Tensor) -> Tensor:
        return grouped.matmul_nf4(x, *parts(tensors), offsets, (out, k), BLOCK)

    def check(args: Sequence[Tensor], _: Any) -> None:
        x, offsets, *tensors = args
        x, offsets = x[:CHECKED_ROWS], offsets.clamp(max=CHECKED_ROWS)
        reference = partial(grouped.matmul_nf4_reference, shape=(out, k), block=BLOCK)
        eager, exact = (reference(t, *parts(tensors), offsets) for t in (x, x.double()))
        close("product", run(x, offsets, *tensors), eager, exact)

    for tokens in sorted({*(t for t in TOKENS if t < shape.tokens), shape.tokens}):
        rows = tokens * each
        touched = min(groups, rows)
        yield Case(
            "experts",
            f"{rows}x{k}->{groups}x{out}",
            touched * out * k * (0.5 + 1 / BLOCK) + 2.0 * rows * (k + out),
            2.0 * rows * out * k,
            partial(inputs, tokens),
            forward(run),
            check,
            {"shape": (groups, out, k)},
        )


def choosing_dense(shape: Shape, device: torch.device) -> Iterator[Case]:
    """A step of training's products of experts in bf16, and their matrices' gradient."""
    if shape.experts is None:
        return
    groups, each = shape.experts
    out, k, rows = shape.mlp, shape.hidden, shape.tokens * shape.experts[1]

    def offsets_of() -> Tensor:
        ids = torch.rand(shape.tokens, groups, device=device).topk(each).indices.flatten()
        return grouped.offsets_of(ids.sort().values, groups)

    def inputs() -> Any:
        w = normal(device, groups, out, k, std=0.02)
        return (normal(device, rows, k), w, offsets_of()), ()

    def outer_inputs() -> Any:
        return (normal(device, rows, out), normal(device, rows, k), offsets_of()), ()

    def check(args: Sequence[Tensor], _: Any) -> None:
        x, w, offsets = args
        x, offsets = x[:CHECKED_ROWS], offsets.clamp(max=CHECKED_ROWS)
        eager, exact = (
            grouped.matmul_reference(a, b, offsets) for a, b in ((x, w), (x.double(), w.double()))
        )
        close("product", grouped.matmul(x, w, offsets), eager, exact)

    def check_outer(args: Sequence[Tensor], _: Any) -> None:
        dy, x, offsets = args
        eager, exact = (
            grouped.outer_reference(a, b, offsets, a.dtype)
            for a, b in ((dy, x), (dy.double(), x.double()))
        )
        close("sum", grouped.outer(dy, x, offsets), eager, exact)

    for name, size, made, run, held in (
        ("experts in bf16", f"{rows}x{k}->{groups}x{out}", inputs, grouped.matmul, check),
        ("experts' gradient", f"{groups}x{out}x{k} of {rows}", outer_inputs, grouped.outer,
         check_outer),
    ):  # fmt: skip
        yield Case(
            name,
            size,
            2.0 * groups * out * k + 2.0 * rows * (k + out),
            2.0 * rows * out * k,
            made,
            forward(run),
            held,
            {"shape": (groups, out, k)},
        )


def combining(shape: Shape, device: torch.device) -> Iterator[Case]:
    """A token's rows back together, and the gradient of their weights."""
    if shape.experts is None:
        return
    each, e, m = shape.experts[1], shape.hidden, shape.tokens * shape.experts[1]

    def inputs() -> Any:
        places = torch.randperm(m, device=device).view(-1, each)
        return (normal(device, m, e), places, torch.rand(places.shape, device=device)), ()

    def dots_reference(a: Tensor, b: Tensor) -> Tensor:
        return weighted_rows.row_dots_reference(a, b)[None]

    def dots(a: Tensor, b: Tensor) -> Tensor:
        return weighted_rows.row_dots(a, b)[None]

    yield Case(
        "weighted sum of rows",
        f"{shape.tokens}x{each}x{e}",
        2.0 * e * (m + shape.tokens) + 12.0 * m,
        2.0 * m * e,
        inputs,
        forward(weighted_rows.weighted_sum),
        against(weighted_rows.weighted_sum, weighted_rows.weighted_sum_reference),
    )
    yield Case(
        "inner products of rows",
        f"{m}x{e}",
        4.0 * m * e + 4.0 * m,
        2.0 * m * e,
        lambda: (tuple(normal(device, m, e) for _ in range(2)), ()),
        forward(dots),
        against(dots, dots_reference),
    )
