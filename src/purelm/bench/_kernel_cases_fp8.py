"""Cases of `purelm bench kernels` in e4m3: what makes it, of weights and activations; a product."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..kernels import fp8, fp8_made
from ..quant import nf4
from ._kernel_case import BLOCK, CHECKED_ROWS, EPS, Case, Shape, forward, normal
from ._kernel_check import close, same


def rounding(shape: Shape, device: torch.device) -> Iterator[Case]:
    """None on a GPU that has no e4m3."""
    if fp8.lacks(device):
        return
    yield from _weights(shape, device)
    yield from _activations(shape, device)
    yield from _product(shape, device)


def _same_rows(got: fp8.Rows, *values: Tensor) -> None:
    """Scales as the CPU divides: a GPU's torch divides by a number through its reciprocal."""
    some = slice(0, CHECKED_ROWS)
    want = fp8.cast_rows_reference([v.reshape(-1, v.shape[-1])[some].cpu() for v in values])
    same("scales", got.scale[some], want.scale)
    same("codes", got.codes[some].view(torch.uint8), want.codes.view(torch.uint8))


def _weights(shape: Shape, device: torch.device) -> Iterator[Case]:
    n, k = shape.mlp, shape.hidden

    def inputs(transposed: bool) -> Any:
        leaf = nf4.quantize(normal(device, n, k, std=0.02), block=BLOCK)
        scale = fp8.scales_of(nf4.dequantize(leaf, torch.float32))[int(transposed)]
        return (*leaf.tensors, scale), ()

    def run(*tensors: Tensor, transposed: bool) -> Tensor:
        *parts, scale = tensors
        packed, absmax, absmax_scale, offset = parts
        given = packed, absmax, absmax_scale, offset, (n, k), BLOCK, scale
        return fp8.nf4_rows(*given, transposed=transposed)

    def check(args: Sequence[Tensor], _: Any, transposed: bool) -> None:
        got = run(*args, transposed=transposed)
        *tensors, scale = args
        packed, absmax, double, offset = (t.cpu() for t in tensors)
        rows = min(n, CHECKED_ROWS)
        pieces = packed[: rows * k // 2], absmax[: rows * k // BLOCK], double, offset
        scale = (scale if transposed else scale[:rows]).cpu()
        want = fp8.nf4_rows(*pieces, (rows, k), BLOCK, scale, transposed=transposed)
        got = got[:, :rows] if transposed else got[:rows]
        same("codes", got.view(torch.uint8), want.view(torch.uint8))

    for transposed in (False, True):
        yield Case(
            "nf4 to e4m3" + " transposed" * transposed,
            f"{n}x{k}",
            n * k * 1.5 + n * k / BLOCK + 4 * (k if transposed else n),
            2.0 * n * k,
            partial(inputs, transposed),
            forward(partial(run, transposed=transposed)),
            partial(check, transposed=transposed),
        )


def _activations(shape: Shape, device: torch.device) -> Iterator[Case]:
    rows, e, f = shape.tokens, shape.hidden, shape.mlp
    style: dict[str, Any] = {"offset": 1.0, "cast_first": False} if shape.gemma else {}

    def norm(x: Tensor, w: Tensor) -> Any:
        value, cast = fp8_made.norm_rows(x, w, EPS, **style)
        return cast, value

    def gate(gate: Tensor, up: Tensor) -> Any:
        value, cast = fp8_made.gated_rows(gate, up, shape.activation)
        return cast, value

    def pull(gate: Tensor, up: Tensor, dh: Tensor) -> Any:
        _, dgate, dup, cast = fp8_made.gated_pull_rows(dh, gate, up, shape.activation)
        return cast, dgate, dup

    def normed() -> Any:
        return (normal(device, rows, e), 1 + normal(device, e, std=0.1) - float(shape.gemma)), ()

    def wide(count: int) -> Any:
        return tuple(normal(device, rows, f) for _ in range(count)), ()

    def check(run: Callable[..., Any], args: Sequence[Tensor], _: Any) -> None:
        cast, *values = run(*(t.clone() for t in args))
        _same_rows(cast, *values)

    for name, width, of, each, inputs, run in (
        ("norm to e4m3 too", e, 5, 6.0, normed, norm),
        (f"{shape.activation} to e4m3 too", f, 7, 7.0, partial(wide, 2), gate),
        (f"{shape.activation} backward to e4m3 too", f, 14, 16.0, partial(wide, 3), pull),
    ):
        yield Case(
            name,
            f"{rows}x{width}",
            float(of * rows * width),
            each * rows * width,
            inputs,
            forward(run),
            partial(check, run),
        )


def _product(shape: Shape, device: torch.device) -> Iterator[Case]:
    """A frozen product, with the cast of its activations."""
    m, k, n = shape.tokens, shape.hidden, shape.mlp

    def inputs() -> Any:
        return (normal(device, m, k), *fp8.cast_rows(normal(device, n, k, std=0.02))), ()

    def run(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
        return fp8.product(fp8.cast_rows(x), fp8.Rows(codes, scale), torch.bfloat16)

    def check(args: Sequence[Tensor], _: Any) -> None:
        x, codes, scale = args
        rows = fp8.cast_rows(x[:CHECKED_ROWS])
        a, b = (r.codes.double() * r.scale[:, None] for r in (rows, fp8.Rows(codes, scale)))
        eager = torch.nn.functional.linear(a.to(torch.bfloat16), b.to(torch.bfloat16))
        close("product", run(x[:CHECKED_ROWS], codes, scale), eager, a @ b.mT)

    yield Case(
        "fp8 product",
        f"{m}x{k}->{n}",
        2.0 * m * (k + n) + n * k,
        2.0 * m * n * k,
        inputs,
        forward(run),
        check,
    )
