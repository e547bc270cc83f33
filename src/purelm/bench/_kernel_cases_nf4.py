"""The cases of `purelm bench kernels` on 4-bit weights: to codes, back, and times a few rows."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..kernels import gated, nf4, nf4_matvec, nf4_products
from ..kernels.launch import on_gpu
from ._kernel_case import BLOCK, CHECKED_WEIGHTS, Case, Shape, forward, normal, parts, weights
from ._kernel_check import close, same

# Rows of x in the products with packed weights.
FEW = (1, 2, 8, 16, 64)


def quantizing(shape: Shape, device: torch.device) -> Iterator[Case]:
    n = shape.mlp * shape.hidden

    def made(w: Tensor, double: bool) -> tuple[Tensor, ...]:
        # Without the look at one number by which quant.nf4 refuses weights that are not finite.
        packed, absmax = nf4.quantize(w, BLOCK)
        return (packed, *nf4.quantize_absmax(absmax)) if double else (packed, absmax)

    def check(args: Sequence[Tensor], _: Any, double: bool) -> None:
        w = args[0].view(-1)
        some = min(len(w), CHECKED_WEIGHTS)
        packed, absmax = nf4.quantize(w, BLOCK)
        want = nf4.quantize_reference(w[:some].cpu(), BLOCK)
        same("codes", packed[: some // 2], want[0])
        same("absmax", absmax[: some // BLOCK], want[1])
        if double:
            codes, scale, offset = nf4.quantize_absmax(absmax)
            # A GPU's torch divides by a number as it multiplies by its reciprocal.
            want = nf4.quantize_absmax_reference(absmax.cpu(), offset.cpu())
            same("codes of absmax", codes, want[0])
            same("scales of absmax", scale, want[1])

    for double in (False, True):
        yield Case(
            "nf4 quantize" + " double" * double,
            f"{shape.mlp}x{shape.hidden}",
            n * 2.5 + n / BLOCK * (1 if double else 4),
            8.0 * n,
            lambda: ((normal(device, shape.mlp, shape.hidden, std=0.02),), ()),
            forward(partial(made, double=double)),
            partial(check, double=double),
            {"double": double},
        )


def dequantizing(shape: Shape, device: torch.device) -> Iterator[Case]:
    n = shape.mlp * shape.hidden

    def run(*tensors: Tensor) -> Tensor:
        return nf4.dequantize(*parts(tensors), n, BLOCK, torch.bfloat16)

    def check(args: Sequence[Tensor], _: Any) -> None:
        want = nf4.dequantize_reference(*parts(args), n, BLOCK, torch.bfloat16)
        same("weights", run(*args), want)

    for double in (False, True):
        yield Case(
            "nf4 dequantize" + " double" * double,
            f"{shape.mlp}x{shape.hidden}",
            n * 2.5 + n / BLOCK * (1 if double else 4),
            float(n),
            partial(lambda double: (weights(shape, device, double), ()), double),
            forward(run),
            check,
            {"double": double, "shape": (shape.mlp, shape.hidden)},
        )


def multiplying(shape: Shape, device: torch.device) -> Iterator[Case]:
    n = shape.mlp * shape.hidden

    def run(x: Tensor, *tensors: Tensor) -> Tensor:
        return nf4_matvec.matvec(x, *parts(tensors), shape.mlp, BLOCK)

    def check(args: Sequence[Tensor], _: Any) -> None:
        x, *tensors = args
        dense = nf4.dequantize(*parts(tensors), n, BLOCK, torch.bfloat16).view(shape.mlp, -1)
        exact = nf4_matvec.matvec_reference(x.double(), *parts(tensors), shape.mlp, BLOCK)
        close("product", run(*args), torch.nn.functional.linear(x, dense), exact)

    for rows in (rows for rows in FEW if rows <= shape.tokens):
        yield Case(
            "nf4 product",
            f"{rows}x{shape.hidden}->{shape.mlp}",
            n / 2 + n / BLOCK + rows * (shape.hidden + shape.mlp) * 2,
            2.0 * rows * n,
            partial(
                lambda rows: (
                    (normal(device, rows, shape.hidden), *weights(shape, device, True)),
                    (),
                ),
                rows,
            ),
            forward(run),
            check,
            {"rows": rows, "shape": (shape.mlp, shape.hidden)},
        )


def pairing(shape: Shape, device: torch.device) -> Iterator[Case]:
    """One row: gate and up of a step of decoding in one launch, their activation on top."""
    n = shape.mlp * shape.hidden

    def inputs() -> Any:
        both = (weights(shape, device, True) for _ in range(2))
        return (normal(device, 1, shape.hidden), *(t for w in both for t in w)), ()

    def apart(x: Tensor, *tensors: Tensor) -> Tensor:
        gate, up = (
            torch.nn.functional.linear(
                x,
                nf4.dequantize(*parts(some), n, BLOCK, torch.float32)
                .view(shape.mlp, -1)
                .to(x.dtype),
            )
            for some in (tensors[:4], tensors[4:])
        )
        return gated.gated_reference(gate, up, shape.activation)

    def run(x: Tensor, *tensors: Tensor) -> Tensor:
        if not on_gpu(x):
            return apart(x, *tensors)
        pair = [nf4_products.Weight(*parts(t), shape.mlp) for t in (tensors[:4], tensors[4:])]
        return nf4_products.products(x, pair, BLOCK, activation=shape.activation)

    def check(args: Sequence[Tensor], _: Any) -> None:
        x, *tensors = args
        close("product", run(*args), apart(*args), apart(x.double(), *tensors))

    yield Case(
        "nf4 gate and up",
        f"1x{shape.hidden}->2x{shape.mlp}",
        2 * (n / 2 + n / BLOCK) + (shape.hidden + shape.mlp) * 2,
        4.0 * n,
        inputs,
        forward(run),
        check,
    )
