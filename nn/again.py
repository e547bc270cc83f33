"""Any function of a half that is not written by hand: run again in its backward, by autograd."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree

from ..kernels.fp8 import Rows
from . import tree
from .half import Residuals
from .pulling import Found


@dataclass(frozen=True, slots=True)
class Again:
    """A `half.Function`; `run(inner, p, adapters, seed=seed)` is differentiable in inner and the
    adapters, and pure.
    """

    run: Callable[..., torch.Tensor]

    def reads(self, p: tree.Tree, residuals: Residuals | None = None) -> list[Any]:
        return []

    def forward(
        self,
        inner: torch.Tensor,
        p: tree.Tree,
        adapters: tree.Tree,
        seed: int | None,
        rounded: Rows | None = None,
    ) -> tuple[torch.Tensor, Residuals]:
        with torch.no_grad():
            return self.run(inner, p, adapters, seed=seed), {}

    def backward(
        self,
        dout: torch.Tensor,
        inner: torch.Tensor,
        residuals: Residuals,
        p: tree.Tree,
        adapters: tree.Tree,
        seed: int | None,
        need_inner: bool,
        rounded: Rows | None = None,
    ) -> tuple[torch.Tensor | None, Found]:
        inner = inner.detach().requires_grad_(need_inner)
        fresh = tree.map_tensors(lambda t: t.detach().requires_grad_(), adapters)
        leaves = {path: _pytree.tree_leaves(leaf) for path, leaf in tree.items(fresh)}
        wanted = [*([inner] if need_inner else []), *(t for own in leaves.values() for t in own)]
        if not wanted:
            return None, {}
        with torch.enable_grad():
            out = self.run(inner, p, fresh, seed=seed)
        # An expert without tokens has gradients of zero.
        grads = iter(torch.autograd.grad(out, wanted, dout, materialize_grads=True))
        dinner = next(grads) if need_inner else None
        return dinner, {path: tuple(next(grads) for _ in own) for path, own in leaves.items()}
