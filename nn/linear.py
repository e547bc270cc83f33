"""Projections with adapters: y = x W^T + bias + scale (dropped x A^T) B^T.

`project` runs several projections of one input as one differentiable step, made of the functions
in `products`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils import _pytree

from ..kernels.launch import apply
from ..quant.fake import Fake
from ..quant.linear import linear as base_linear
from . import dora, qat
from .lora import LoRA
from .products import Projection, Wanted, drop, products, pull, scaled_b


def linear(
    x: torch.Tensor, p: Projection, adapter: LoRA | None = None, seed: int | None = None
) -> torch.Tensor:
    """x [..., in] -> [..., out] through {"weight", "bias"?} and an adapter; see `project`."""
    return project(x, [p], [adapter], seed)[0]


def project(
    x: torch.Tensor,
    projections: Sequence[Projection],
    adapters: Sequence[LoRA | None],
    seed: int | None = None,
) -> tuple[torch.Tensor, ...]:
    """x [..., in] -> one [..., out_i] per projection.

    `seed` drives the adapters' dropout (None: no dropout): the same seed drops the same features,
    so a recomputed layer repeats itself. Differentiable in x, dense weights, biases and
    adapters; with DoRA among these in plain operations, without this file's fusions.
    """
    if any(isinstance(p["weight"], Fake) for p in projections):
        return qat.project(x, projections, adapters, seed)
    if any(a is not None and a.magnitude is not None for a in adapters):
        return project_reference(x, projections, adapters, seed)
    if not torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active():
        return tuple(products(x, projections, adapters, seed)[0])
    flat, structure = _pytree.tree_flatten((list(projections), list(adapters)))
    outputs = apply(_Project, structure, seed, x, *flat)
    return tuple(outputs[: len(projections)])


def seed_after(seed: int | None, step: int) -> int | None:
    """The dropout seed of the `step`-th projection after the one that `seed` drives."""
    return None if seed is None else seed + step


def scaled(x: torch.Tensor, scale: float) -> torch.Tensor:
    """scale * x, for which 1 takes no pass."""
    return x if scale == 1.0 else x * scale


def project_reference(
    x: torch.Tensor,
    projections: Sequence[Projection],
    adapters: Sequence[LoRA | None],
    seed: int | None = None,
) -> tuple[torch.Tensor, ...]:
    """What `project` computes, in plain differentiable operations."""
    return tuple(_reference(x, projections, adapters, seed)[: len(projections)])


def _reference(
    x: torch.Tensor,
    projections: Sequence[Projection],
    adapters: Sequence[LoRA | None],
    seed: int | None,
) -> list[torch.Tensor]:
    outputs, lows = [], []
    for i, (p, adapter) in enumerate(zip(projections, adapters, strict=True)):
        if adapter is None:
            outputs.append(base_linear(x, p["weight"], p.get("bias")))
            continue
        dropped = drop(x, adapter, seed, i)
        low = dropped @ adapter.a.to(x.dtype).mT
        lows.append(low)
        if adapter.magnitude is not None:
            outputs.append(dora.adapted(x, p["weight"], p.get("bias"), adapter, dropped, low))
            continue
        y = base_linear(x, p["weight"], p.get("bias"))
        outputs.append(y + low @ scaled_b(adapter, x.dtype).mT)
    return outputs + lows


class _Project(torch.autograd.Function):
    """The outputs, then the low-rank activations x A^T of the adapted ones (not differentiable)."""

    @staticmethod
    def forward(structure: Any, seed: int | None, x: torch.Tensor, *flat: Any) -> Any:
        projections, adapters = _pytree.tree_unflatten(list(flat), structure)
        outputs, lows = products(x, projections, adapters, seed)
        return (*outputs, *lows)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        structure, seed, x, *flat = inputs
        _, adapters = _pytree.tree_unflatten(list(flat), structure)
        lows = output[len(adapters) :]
        ctx.structure, ctx.seed = structure, seed
        is_tensor = [isinstance(leaf, torch.Tensor) for leaf in flat]
        ctx.static = [None if t else leaf for t, leaf in zip(is_tensor, flat, strict=True)]
        ctx.is_tensor, ctx.lows = is_tensor, len(lows)
        ctx.mark_non_differentiable(*lows)
        kept = [leaf for t, leaf in zip(is_tensor, flat, strict=True) if t]
        ctx.save_for_backward(x, *lows, *kept)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, *saved = ctx.saved_tensors
        lows, kept = saved[: ctx.lows], iter(saved[ctx.lows :])
        flat = [
            next(kept) if t else leaf for t, leaf in zip(ctx.is_tensor, ctx.static, strict=True)
        ]
        projections, adapters = _pytree.tree_unflatten(flat, ctx.structure)
        # The same tree with each leaf's place among `flat`, to put its gradient there.
        places = _pytree.tree_unflatten(list(range(len(flat))), ctx.structure)
        needed = ctx.needs_input_grad[3:]
        wanted = [
            Wanted(
                weight=isinstance(p["weight"], torch.Tensor) and needed[p_at["weight"]],
                bias=p.get("bias") is not None and needed[p_at["bias"]],
                a=adapter is not None and needed[a_at.a],
                b=adapter is not None and needed[a_at.b],
            )
            for p, adapter, p_at, a_at in zip(projections, adapters, *places, strict=True)
        ]
        dys = grads[: len(projections)]
        dx, found = pull(
            x,
            projections,
            adapters,
            ctx.seed,
            dys,
            wanted,
            need_x=ctx.needs_input_grad[2],
            # What is kept carries no graph: where this backward is differentiated, made again.
            lows=None if torch.is_grad_enabled() else lows,
        )
        out: list[torch.Tensor | None] = [None] * len(flat)
        for p_at, a_at, want, grad in zip(*places, wanted, found, strict=True):
            if want.weight:
                out[p_at["weight"]] = grad.weight
            if want.bias:
                out[p_at["bias"]] = grad.bias
            if want.a:
                out[a_at.a] = grad.a
            if want.b:
                out[a_at.b] = grad.b
        return None, None, dx, *out

    @staticmethod
    def vmap(info: Any, in_dims: Any, structure: Any, seed: int | None, x: Any, *flat: Any) -> Any:
        # In-place sums into unbatched outputs cannot be batched; the plain operations can. Dropout
        # follows from the seed alone, so every member of the batch drops the same features.
        def reference(x: torch.Tensor, *flat: Any) -> tuple[torch.Tensor, ...]:
            projections, adapters = _pytree.tree_unflatten(list(flat), structure)
            outputs = _reference(x, projections, adapters, seed)
            lows = [low.reshape(-1, low.shape[-1]) for low in outputs[len(projections) :]]
            return tuple(outputs[: len(projections)] + lows)

        outputs = torch.vmap(reference, in_dims=in_dims[2:], randomness="same")(x, *flat)
        return outputs, (0,) * len(outputs)
