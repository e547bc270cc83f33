"""The cases of `purelm bench kernels` for experts: rows times their own expert's matrix."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..kernels import grouped, nf4
from ._kernel_case import BLOCK, CHECKED_ROWS, Case, Shape, forward, normal, parts
from ._kernel_check import close

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

    for tokens in sorted({*TOKENS, shape.tokens}):
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
