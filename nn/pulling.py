"""Gradients pulled by hand through projections of one input, with those of their adapters."""

from collections.abc import Sequence

import torch

from ..kernels.fp8 import Rows
from . import dora, tree
from .lora import LoRA
from .products import Projection, Wanted, pull_input, pull_weights

# Of each adapter, by its path, the gradients of its tensors in order; of one that was folded, that
# of the magnitudes as `dora.pull_rows` gives it.
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

    @property
    def folded(self) -> bool:
        """Whether any of the adapters is DoRA's."""
        return any(f is not None and f.magnitude is not None for f in self.adapters)

    def input(
        self, dys: Sequence[torch.Tensor], need_x: bool = True, rows: Rows | None = None
    ) -> torch.Tensor | None:
        """The gradient of the input, None where it is not needed; `rows` as of `pull_input`."""
        self.dys = dys
        given = (self.projections, self.adapters, self.seed, dys)
        dx, self.dlows = pull_input(*given, need_x=need_x, rows=rows)
        return dx

    def weights(
        self, x: torch.Tensor, lows: Lows | None, made: Sequence[torch.Tensor] | None = None
    ) -> None:
        """Note the adapters' gradients, given the input; after `input`. made: the projections'
        outputs where they are at hand, which spares DoRA a product.
        """
        wanted = [Wanted(a=f is not None, b=f is not None) for f in self.adapters]
        given = (self.projections, self.adapters, self.seed, self.dys, self.dlows, wanted)
        for i, grads in enumerate(pull_weights(x, *given, lows=lows)):
            adapter = self.adapters[i]
            if adapter is None:
                continue
            assert grads.a is not None and grads.b is not None
            self.found[self.names[i]] = grads.a, grads.b
            if adapter.magnitude is not None:
                p = self.projections[i]
                y = None if made is None or p.get("bias") is not None else _flat(made[i])
                pair = _flat(self.dys[i]), _flat(x)
                rows = dora.pull_rows(*pair, p["weight"], adapter, grads.b, y)
                self.found[self.names[i]] = grads.a, grads.b, rows


def _flat(t: torch.Tensor) -> torch.Tensor:
    return t.reshape(-1, t.shape[-1])
