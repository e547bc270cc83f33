"""Projections of a step of decoding from packed weights, several in one launch.

What `linear.project` gives, with what follows it in a layer taken along: the activation that joins
gate and up, or the sum with the residual stream. No gradients.
"""

from collections.abc import Sequence

import torch

from ..kernels.launch import on_gpu
from ..kernels.nf4_matvec_launch import takes
from ..kernels.nf4_products import Weight, products
from ..quant.nf4 import NF4
from .lora import LoRA
from .products import Projection, scaled_b, stacked_a


def takes_all(
    x: torch.Tensor, projections: Sequence[Projection], adapters: Sequence[LoRA | None]
) -> bool:
    """Whether `project` can run projections of inputs like x [m, ...] together."""
    first = projections[0]["weight"]
    if not isinstance(first, NF4) or x.dtype not in (torch.bfloat16, torch.float16):
        return False
    if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        return False
    for p in projections:
        w = p["weight"]
        if not isinstance(w, NF4) or (w.block, w.kind) != (first.block, first.kind):
            return False
        if (w.absmax_scale is None) != (first.absmax_scale is None):
            return False
        if ("bias" in p) != ("bias" in projections[0]) or not takes(x.shape[0], w.shape, w.block):
            return False
    ranks = {None if a is None or a.magnitude is not None else a.rank for a in adapters}
    plain = all(a is None for a in adapters)
    return (plain or (len(ranks) == 1 and None not in ranks)) and on_gpu(x, first.packed)


def project(
    x: torch.Tensor,
    projections: Sequence[Projection],
    adapters: Sequence[LoRA | None],
    *,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
    residual_scale: float = 1.0,
) -> torch.Tensor:
    """x [m, in] -> the projections' outputs side by side [m, sum of out], or with an activation
    act(first) * second [m, out]; added to `residual` times residual_scale where that is given.
    """
    first = projections[0]["weight"]
    weights = [
        Weight(
            p["weight"].packed,
            p["weight"].absmax,
            p["weight"].absmax_scale,
            p["weight"].absmax_offset,
            p["weight"].shape[0],
            p.get("bias"),
            None if a is None else scaled_b(a, x.dtype),
        )
        for p, a in zip(projections, adapters, strict=True)
    ]
    adapted = any(a is not None for a in adapters)
    return products(
        x,
        weights,
        first.block,
        first.kind,
        low=x @ stacked_a(adapters, x.dtype).mT if adapted else None,
        activation=activation,
        residual=residual,
        residual_scale=residual_scale,
    )
