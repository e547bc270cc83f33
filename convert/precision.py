"""What weights are stored as and multiplied in, and which choices of both go together."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch

from ..errors import ArgumentError
from ..kernels.fp8 import check_device
from ..nn.spec import MLPSpec, ModelSpec
from ..quant import fp8, int8, nf4

Quantize = Literal["nf4", "int8", "fp8", "fp8_block"] | None
Compute = Literal["fp8"] | None

QUANTIZERS: dict[str, Callable[..., Any]] = {
    "nf4": nf4.quantize,
    "int8": int8.quantize,
    "fp8": fp8.quantize,
    "fp8_block": partial(fp8.quantize, blocks=True),
}
FP8 = ("fp8", "fp8_block")


def check_compute(compute: Compute, quantize: Quantize, device: torch.device) -> None:
    """Raise ArgumentError for products that these weights are not for, KernelError for a device
    that has none such.
    """
    if compute is None:
        return
    if compute != "fp8":
        raise ArgumentError(f"compute is {compute!r}, expected 'fp8' or None")
    if quantize in (None, "int8"):
        raise ArgumentError(
            "compute='fp8' is for frozen weights in 4 bits or in fp8 (load_in_4bit, load_in_fp8); "
            f"these are kept in {'16 bits' if quantize is None else 'int8'}"
        )
    check_device(device)


def in_products(path: str, spec: ModelSpec) -> bool:
    """Whether this weight is used by a layer's own products; mixtures of experts have others."""
    parts = path.split(".")
    if parts[0] != "layers":
        return False
    return parts[2] == "attn" or isinstance(spec.layers[int(parts[1])].mlp, MLPSpec)
