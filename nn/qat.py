"""Quantization-aware training: projections that compute as the stored model will.

What is stored in the end is the weight with its adapter merged in, so that sum is what is rounded.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch

from ..errors import ArgumentError
from ..quant import fake
from ..quant.fake import Fake
from . import tree
from .lora import LoRA, delta
from .params import param_specs
from .spec import ModelSpec


def wrap(params: tree.Tree, spec: ModelSpec, scheme: str) -> tree.Tree:
    """`params` with the weight of every projection as `Fake`, sharing memory.

    Raises KernelError for an unknown scheme and for widths it has no groups for, ArgumentError for
    weights that are quantized already.
    """
    chosen = _projections(spec)

    def wrapped(path: str, leaf: Any) -> Any:
        if path not in chosen:
            return leaf
        if not isinstance(leaf, torch.Tensor):
            raise ArgumentError(
                f"{path} is stored as {type(leaf).__name__}: qat_scheme={scheme!r} rounds weights "
                "itself; load the model with load_in_16bit=True"
            )
        fake.check(leaf.shape, scheme, path)
        return Fake(leaf, scheme)

    return tree.map_with_path(wrapped, params)


@functools.lru_cache(maxsize=8)
def _projections(spec: ModelSpec) -> frozenset[str]:
    """The paths of the weights to round; asked for in every pass."""
    return frozenset(path for path, p in tree.items(param_specs(spec)) if p.quantize)


def project(
    x: torch.Tensor,
    projections: Sequence[dict[str, Any]],
    adapters: Sequence[LoRA | None],
    seed: int | None = None,
) -> tuple[torch.Tensor, ...]:
    """`linear.project` where weights are `Fake`: differentiable in x, weights, biases, adapters.

    Raises ArgumentError for dropout: it would act on the adapter alone, which is rounded as one
    with its weight.
    """
    outputs = []
    for p, adapter in zip(projections, adapters, strict=True):
        leaf: Fake = p["weight"]
        if adapter is not None:
            if adapter.magnitude is not None:
                raise ArgumentError("DoRA's adapters are not rounded under a qat_scheme yet")
            if adapter.dropout and seed is not None:
                raise ArgumentError("adapters cannot drop inputs under a qat_scheme")
            weight = leaf.weight
            leaf = Fake((weight.float() + delta(adapter)).to(weight.dtype), leaf.scheme)
        outputs.append(fake.linear(x, leaf, p.get("bias")))
    return tuple(outputs)
