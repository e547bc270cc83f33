"""Rematerialisation: run a function without keeping its intermediates, and again for its backward.

What `jax.checkpoint` is to JAX. Unlike `torch.utils.checkpoint` it composes with `torch.func`.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.utils import _pytree

T = TypeVar("T")


def remat(f: Callable[..., T]) -> Callable[..., T]:
    """`f` with its intermediates recomputed in backward.

    `f` maps trees of tensors to one tensor or a tuple of them, is pure (random numbers from seeds
    only), and must be given every tensor that needs a gradient as an argument.
    """

    def run(*args: Any) -> T:
        flat, structure = _pytree.tree_flatten(args)
        out: T = _Remat.apply(f, structure, *flat)  # type: ignore[no-untyped-call]
        return out

    return run


class _Remat(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(f: Callable[..., Any], structure: Any, *flat: Any) -> Any:
        return f(*_pytree.tree_unflatten(list(flat), structure))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.f, ctx.structure, *flat = inputs
        ctx.is_tensor = [isinstance(leaf, torch.Tensor) for leaf in flat]
        ctx.static = [None if isinstance(leaf, torch.Tensor) else leaf for leaf in flat]
        ctx.save_for_backward(*(leaf for leaf in flat if isinstance(leaf, torch.Tensor)))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        kept = iter(ctx.saved_tensors)
        flat = [
            next(kept) if t else leaf for t, leaf in zip(ctx.is_tensor, ctx.static, strict=True)
        ]
        wanted = [i for i, need in enumerate(ctx.needs_input_grad[2:]) if need]

        def chosen(*xs: torch.Tensor) -> Any:
            full = list(flat)
            for i, x in zip(wanted, xs, strict=True):
                full[i] = x
            return ctx.f(*_pytree.tree_unflatten(full, ctx.structure))

        out: list[torch.Tensor | None] = [None] * len(flat)
        found = _vjp(chosen, tuple(flat[i] for i in wanted), grads)
        for i, g in zip(wanted, found, strict=True):
            out[i] = g
        return None, None, *out


def _vjp(
    f: Callable[..., Any], xs: tuple[torch.Tensor, ...], grads: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, ...]:
    # torch.func.vjp is right everywhere; where nothing differentiates this backward in turn,
    # autograd does the same for less.
    if torch._C._are_functorch_transforms_active() or torch.is_grad_enabled():
        out, pull, *_ = torch.func.vjp(f, *xs)
        pulled: tuple[torch.Tensor, ...] = pull(grads if isinstance(out, tuple) else grads[0])
        return pulled
    with torch.enable_grad():
        fresh = tuple(x.detach().requires_grad_() for x in xs)
        # What is not used, for one the bias by which a router only chooses, has gradients of zero.
        return torch.autograd.grad(f(*fresh), fresh, grads, materialize_grads=True)
