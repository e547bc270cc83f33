"""Frozen weights kept dequantized beside the packed ones, where memory is free: a step of training
then dequantizes nothing of their layers, and computes the same to the bit.
"""

import logging
from typing import Any, NamedTuple

import torch

from ..quant.fp8 import Fp8
from ..quant.fp8_product import computes
from ..quant.linear import weight_of
from ..quant.nf4 import NF4
from . import tree

_logger = logging.getLogger("purelm.training")


class _Layer(NamedTuple):
    """A layer's dense params, of which packed leaves at which versions they were made."""

    leaves: list[Any]
    versions: list[int]
    dense: tree.Tree


class DenseWeights:
    """Those of the last layers of one model, made when they are first asked for.

    Only training sees them: what is saved, merged and generated from are the packed ones. Copies
    and files have none.
    """

    def __init__(self) -> None:
        self.layers = 0
        self._held: dict[int, _Layer] = {}
        self._allowed = True

    def __reduce__(self) -> Any:
        return DenseWeights, ()

    @property
    def nbytes(self) -> int:
        """Bytes beside the model's own."""
        return sum(
            tree.nbytes(made)
            for layer in self._held.values()
            for packed, made in zip(layer.leaves, tree.leaves(layer.dense), strict=True)
            if made is not packed
        )

    @property
    def trees(self) -> list[tree.Tree]:
        """The dense params of each layer that has some."""
        return [layer.dense for layer in self._held.values()]

    @property
    def stale(self) -> bool:
        """Whether packed weights were written to since their dense ones were made."""
        return any(_versions(layer.leaves) != layer.versions for layer in self._held.values())

    def keep(self, layers: int) -> None:
        """From now on those of so many layers, the last ones."""
        layers = layers if self._allowed else 0
        if layers != self.layers:
            self.layers = layers
            self._held.clear()

    def give_up(self) -> None:
        """None from now on: memory ran out."""
        self._allowed = False
        self.keep(0)

    def put(self, params: tree.Tree, dtype: torch.dtype) -> tree.Tree:
        """`params` with the dense weights in `dtype`; none where memory runs out over them."""
        if not self.layers:
            return params
        own = list(params["layers"])
        first = max(0, len(own) - self.layers)
        try:
            own[first:] = [self._dense(i, own[i], dtype) for i in range(first, len(own))]
        except torch.OutOfMemoryError:
            self.give_up()
            _logger.warning(
                "memory ran out over dequantized weights: each step dequantizes its own"
            )
            return params
        return {**params, "layers": own}

    def _dense(self, i: int, p: tree.Tree, dtype: torch.dtype) -> tree.Tree:
        leaves = tree.leaves(p)
        versions = _versions(leaves)
        found = self._held.get(i)
        if found is None or versions != found.versions or not _same(leaves, found.leaves):
            self._held.pop(i, None)
            with torch.no_grad():
                made = tree.map(lambda x: weight_of(x, dtype) if packed(x) else x, p)
            found = self._held[i] = _Layer(leaves, versions, made)
        return found.dense


def _versions(leaves: list[Any]) -> list[int]:
    return [t._version for t in tree.tensors([leaf for leaf in leaves if packed(leaf)])]


def _same(some: list[Any], others: list[Any]) -> bool:
    return len(some) == len(others) and all(a is b for a, b in zip(some, others, strict=True))


def packed(leaf: Any) -> bool:
    """Whether products dequantize it each time: 4 bits or fp8, where these compute in 16 bits."""
    return isinstance(leaf, NF4 | Fp8) and len(leaf.shape) == 2 and not computes(leaf)


def bytes_of(params: tree.Tree, itemsize: int) -> tuple[int, ...]:
    """Bytes that each layer's dense weights would take."""
    return tuple(
        sum(leaf.numel() for leaf in tree.leaves(p) if packed(leaf)) * itemsize
        for p in params["layers"]
    )
