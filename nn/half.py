"""Half of a decoder layer, mixer or MLP: a norm and what reads it, with a hand-written backward.

A half makes a branch, which the layer adds up. Behind the norm stands a `Function` (or two, whose
outputs are summed): one written by hand over named residuals, or `again.Again` for any other.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..kernels.fp8 import Rows
from ..quant.linear import rounds
from . import tree
from .linear import seed_after
from .mlp import TILE_SEEDS
from .norm import norm, norm_rows, pull
from .pulling import Found, added
from .spec import NormSpec

# By their names in `residuals.Policy`; "low_..." are the narrow products of adapters.
Residuals = dict[str, Any]


class Function(Protocol):
    """Of normalised inputs [b, s, e] (or [t, e], if it sees each token alone), params, adapters and
    the seed of their dropout. rounded: the inputs in e4m3 too, where all that `reads` names rounds
    them so.
    """

    def reads(self, p: tree.Tree, residuals: Residuals | None = None) -> list[Any]:
        """The weights of which all, and nothing else, multiply the inputs: in forward, or in the
        backward of these residuals; none where there is no such product.
        """

    def forward(
        self,
        inner: torch.Tensor,
        p: tree.Tree,
        adapters: tree.Tree,
        seed: int | None,
        rounded: Rows | None = None,
    ) -> tuple[torch.Tensor, Residuals]:
        """What it makes, shaped as inner, and the residuals that are not sure to be run again."""

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
        """The gradients of inner (None if not needed) and of the adapters. Residuals are taken out
        of the dict, to be freed in time; those that are not there are computed again.
        """


@dataclass(frozen=True, slots=True)
class Half:
    """`functions` by the part of the layer's params and adapters that is theirs. norm: None where
    the input goes in as it is; `weights` names its params. tile: how many tokens to run on at a
    time, forward and backward, for functions that see each token alone.
    """

    functions: Mapping[str, Function]
    norm: NormSpec | None
    weights: str
    seed: int | None
    tile: int | None = None

    def forward(
        self, x: torch.Tensor, p: tree.Tree, adapters: tree.Tree
    ) -> tuple[torch.Tensor, Residuals]:
        """The branch of x [b, s, e], and its residuals: none of tiles."""
        tiles = self._tiles(x)
        if len(tiles) == 1:
            return self._forward(x, p, adapters, self.seed)
        rows = x.reshape(-1, x.shape[-1])
        made = [self._forward(rows[tile], p, adapters, seed)[0] for tile, seed in tiles]
        return torch.cat(made).view(x.shape), {}

    def backward(
        self,
        dout: torch.Tensor,
        x: torch.Tensor,
        residuals: Residuals,
        p: tree.Tree,
        adapters: tree.Tree,
        onto: torch.Tensor,
        need_x: bool = True,
    ) -> tuple[torch.Tensor | None, Found]:
        """dx, if it is needed, and the adapters' gradients by path. onto: the gradient that reaches
        x beside the branch, to which the branch's is added.
        """
        tiles = self._tiles(x)
        if len(tiles) == 1:
            return self._backward(dout, x, residuals, p, adapters, self.seed, onto, need_x)
        douts, rows, ontos = (t.reshape(-1, t.shape[-1]) for t in (dout, x, onto))
        dx, found = torch.empty_like(rows), Found()
        for tile, seed in tiles:
            ends = douts[tile], rows[tile]
            made, more = self._backward(*ends, {}, p, adapters, seed, ontos[tile], True)
            assert made is not None
            dx[tile] = made
            found = added(found, more)
        return dx.view(x.shape), found

    def _tiles(self, x: torch.Tensor) -> list[tuple[slice, int | None]]:
        """Which tokens to run on at a time, and the seed of their dropout."""
        tokens = x.numel() // x.shape[-1]
        if self.tile is None or self.tile >= tokens:
            return [(slice(0, tokens), self.seed)]
        return [
            (slice(at, at + self.tile), seed_after(self.seed, TILE_SEEDS * (at // self.tile)))
            for at in range(0, tokens, self.tile)
        ]

    def _inner(
        self, x: torch.Tensor, p: tree.Tree, residuals: Residuals | None = None
    ) -> tuple[torch.Tensor, dict[str, Rows]]:
        """What the functions read, and its rows in e4m3 for those that take them."""
        if self.norm is None:
            return x, {}
        reads = {part: f.reads(p[part], residuals) for part, f in self.functions.items()}
        takers = {part for part, leaves in reads.items() if leaves}
        if not takers or not all(rounds(x, leaf) for part in takers for leaf in reads[part]):
            return norm(x, p.get(self.weights), self.norm), {}
        inner, rows = norm_rows(x, p.get(self.weights), self.norm)
        return inner, dict.fromkeys(takers, rows)

    def _forward(
        self, x: torch.Tensor, p: tree.Tree, adapters: tree.Tree, seed: int | None
    ) -> tuple[torch.Tensor, Residuals]:
        inner, rounded = self._inner(x, p)
        residuals = Residuals()
        out: torch.Tensor | None = None
        for part, function in self.functions.items():
            given = p[part], tree.get(adapters, part), seed
            made, own = function.forward(inner, *given, rounded.get(part))
            residuals.update(own)
            out = made if out is None else out + made
        assert out is not None
        return out, residuals

    def _backward(
        self,
        dout: torch.Tensor,
        x: torch.Tensor,
        residuals: Residuals,
        p: tree.Tree,
        adapters: tree.Tree,
        seed: int | None,
        onto: torch.Tensor,
        need_x: bool,
    ) -> tuple[torch.Tensor | None, Found]:
        inner, rounded = self._inner(x, p, residuals)
        dinner: torch.Tensor | None = None
        found = Found()
        for part, function in self.functions.items():
            own = p[part], tree.get(adapters, part)
            given = dout, inner, residuals, *own, seed, need_x
            made, grads = function.backward(*given, rounded.get(part))
            found.update({f"{part}.{path}": grad for path, grad in grads.items()})
            if made is not None:
                dinner = made if dinner is None else dinner + made
        if dinner is None:
            return None, found
        if self.norm is None:
            return onto + dinner, found
        return pull(dinner, x, p.get(self.weights), self.norm, onto), found
