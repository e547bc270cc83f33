"""Equal weights of one format as one leaf: what a grouped product reads in one launch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import KernelError


@dataclass(frozen=True, eq=False)
class Stack:
    """`count` weights [out, in] in one quantized format: `inner` is one of them, but for a leading
    axis [count] of every tensor of its. A torch pytree node whose leaves are its tensors.

    Dense weights need none: their stack is a tensor [x, out, in].
    """

    inner: Any
    count: int

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.count, *self.one(0).shape))

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.inner.dtype
        return dtype

    @property
    def device(self) -> torch.device:
        device: torch.device = self.inner.device
        return device

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def numel(self) -> int:
        """The number of weights it stands for."""
        return math.prod(self.shape)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Its tensors, each [count, ...]."""
        return tuple(pytree.tree_leaves(self.inner))

    def one(self, i: int) -> Any:
        """The i-th weight, a view."""
        return pytree.tree_map(lambda t: t[i], self.inner)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Stack:
        """The same weights on another device; no dtype of their parts ever changes."""
        return Stack(self.inner.to(device, non_blocking=non_blocking), self.count)


pytree.register_pytree_node(
    Stack,
    lambda leaf: ([leaf.inner], leaf.count),
    lambda inner, count: Stack(list(inner)[0], count),
    serialized_type_name="purelm.Stack",
)


def stack(leaves: Sequence[Any]) -> Any:
    """The leaves, tensors or quantized weights of one format and shape, as one; a copy.

    Raises KernelError where they differ in format or shape.
    """
    first, *rest = leaves
    if isinstance(first, Tensor):
        if not all(isinstance(leaf, Tensor) and leaf.shape == first.shape for leaf in rest):
            raise KernelError("weights of one stack differ in shape, or some are quantized")
        return torch.stack(list(leaves))
    flat = [pytree.tree_flatten(leaf) for leaf in leaves]
    if any(structure != flat[0][1] for _, structure in flat):
        raise KernelError(
            f"weights of one stack differ in format: {sorted({str(s)[:120] for _, s in flat})}"
        )
    parts = [torch.stack(column) for column in zip(*(parts for parts, _ in flat), strict=True)]
    return Stack(pytree.tree_unflatten(parts, flat[0][1]), len(flat))


def unbind(leaf: Any) -> list[Any]:
    """The leaves that `stack` made one of, as views; differentiable for a tensor."""
    if isinstance(leaf, Tensor):
        return list(leaf.unbind())
    parts, structure = pytree.tree_flatten(leaf.inner if isinstance(leaf, Stack) else leaf)
    columns = [part.unbind() for part in parts]
    return [pytree.tree_unflatten(list(each), structure) for each in zip(*columns, strict=True)]
