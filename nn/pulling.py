"""Gradients pulled by hand through projections of one input, with those of their adapters."""

from collections.abc import Sequence

import torch

from ..kernels.fp8 import Rows
from . import tree
from .linear import Projection, Wanted, pull_input, pull_weights
from .lora import LoRA

# Of each adapter, by its path, the gradients of its tensors in order.
Found = dict[str, tuple[torch.Tensor, ...]]
Lows = list[torch.Tensor]


def picked(
    p: tree.Tree, adapters: tree.Tree, names: Sequence[str]
) -> tuple[list[Projection], list[LoRA | None]]:
    """The projections of these names, and their adapters."""
    return [p[name] for name in names], [tree.get(adapters, name) for name in names]


def added(total: Found, more: Found) -> Found:
    """Gradients of tiles, summed in fp32 or wider."""

    def plus(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a.to(torch.promote_types(a.dtype, torch.float32)) + b

    if not total:
        return more
    return {
        path: tuple(plus(a, b) for a, b in zip(grads, more[path], strict=True))
        for path, grads in total.items()
    }


class Puller:
    """Pulls a gradient through projections of one input: first to the input, then to the adapters,
    so that what only the first needs is free by then. What an adapter gets is put into `found`.
    """

    def __init__(
        self,
        p: tree.Tree,
        adapters: tree.Tree,
        names: Sequence[str],
        seed: int | None,
        found: Found,
    ) -> None:
        self.projections, self.adapters = picked(p, adapters, names)
        self.names, self.seed, self.found = names, seed, found

    def input(
        self, dys: Sequence[torch.Tensor], need_x: bool = True, rows: Rows | None = None
    ) -> torch.Tensor | None:
        """The gradient of the input, None where it is not needed; `rows` as of `pull_input`."""
        self.dys = dys
        given = (self.projections, self.adapters, self.seed, dys)
        dx, self.dlows = pull_input(*given, need_x=need_x, rows=rows)
        return dx

    def weights(self, x: torch.Tensor, lows: Lows | None) -> None:
        """Note the adapters' gradients, given the input; after `input`."""
        wanted = [Wanted(a=f is not None, b=f is not None) for f in self.adapters]
        given = (self.projections, self.adapters, self.seed, self.dys, self.dlows, wanted)
        for name, grads in zip(self.names, pull_weights(x, *given, lows=lows), strict=True):
            if grads.a is not None and grads.b is not None:
                self.found[name] = (grads.a, grads.b)
