"""Residuals on their way to pinned host memory and back, beside the computation."""

from collections import deque
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree

from ..errors import ArgumentError
from . import pinned, tree


class _OnHost(NamedTuple):
    """A copy of a device tensor on the host; what else a tree holds stays as it is."""

    copy: torch.Tensor


class _Coming(NamedTuple):
    """A tree on its way back: when its copies are done, and whose memory they write to."""

    residuals: tree.Tree
    done: torch.cuda.Event | None = None
    owner: torch.cuda.Stream | None = None


class _Leaving(NamedTuple):
    """Device tensors on their way out: when their copies are done, and whose memory they are."""

    tensors: list[torch.Tensor]
    done: torch.cuda.Event
    owner: torch.cuda.Stream


# Layers whose copies to the host may be under way while a further one is computed.
_UNDER_WAY = 2


class Offload:
    """The parked residuals of one forward pass, by layer; each can be fetched once.

    Copies run on streams of their own. Fetching a layer waits for its copies only, and begins to
    fetch the layer before it, which the backward pass needs next. What is sent away is held until
    the computing stream has waited for its copies, at most `_UNDER_WAY` layers at a time: its
    memory is free again in that stream's order, so the allocator needs no more than the peak
    however far Python runs ahead of the device. On the CPU nothing moves.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.device = device
        self._host: dict[int, tuple[list[Any], Any]] = {}
        self._coming: dict[int, _Coming] = {}
        self._fetched: set[int] = set()
        self._leaving: deque[_Leaving] = deque()
        if self.cuda:
            self._out = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._in = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __del__(self) -> None:
        # Of a backward that ended early: its memory is free for others once the copies are done.
        self._release(0)
        for coming in self._coming.values():
            if coming.owner is not None and coming.done is not None:
                coming.owner.wait_event(coming.done)

    def park(self, layer: int, residuals: tree.Tree) -> None:
        """Send a tree of tensors away; its device memory is free once the copies are done."""
        leaves, structure = _pytree.tree_flatten(residuals)
        if self.cuda:
            self._release(_UNDER_WAY - 1)
            owner = torch.cuda.current_stream(self.device)
            self._out.wait_stream(owner)
            held = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_cuda]
            leaves = [self._send(leaf) for leaf in leaves]
            self._leaving.append(_Leaving(held, self._out.record_event(), owner))
        self._host[layer] = leaves, structure

    def _release(self, under_way: int) -> None:
        """Let go of the oldest that leave, until so many are left."""
        while len(self._leaving) > under_way:
            leaving = self._leaving.popleft()
            leaving.owner.wait_event(leaving.done)

    def fetch(self, layer: int) -> tree.Tree:
        """The residuals of `layer`, back on the device, usable on the current stream; None if none
        were parked. Raises ArgumentError where they were fetched before.
        """
        if layer in self._fetched:
            raise ArgumentError(
                "a second backward through one forward pass: residuals sent to the host come back "
                "once; run the forward again, or use a policy that keeps or recomputes them"
            )
        self._release(0)
        self._begin(layer)
        if layer not in self._coming:
            self._begin(layer - 1)
            return None
        self._fetched.add(layer)
        coming = self._coming.pop(layer)
        if coming.done is not None:
            torch.cuda.current_stream(self.device).wait_event(coming.done)
        self._begin(layer - 1)
        return coming.residuals

    def _begin(self, layer: int) -> None:
        if layer not in self._host:
            return
        leaves, structure = self._host.pop(layer)
        if not self.cuda:
            self._coming[layer] = _Coming(_pytree.tree_unflatten(leaves, structure))
            return
        # Memory for the copies comes from the computing stream, whose earlier users of it must be
        # done before the copy writes there.
        owner = torch.cuda.current_stream(self.device)
        self._in.wait_stream(owner)
        self._in.wait_stream(self._out)
        back = [self._bring(leaf) for leaf in leaves]
        done = self._in.record_event()
        self._coming[layer] = _Coming(_pytree.tree_unflatten(back, structure), done, owner)

    def _send(self, leaf: Any) -> Any:
        # Some attention backends keep a seed on the CPU.
        if not isinstance(leaf, torch.Tensor) or not leaf.is_cuda:
            return leaf
        host = pinned.like(leaf)
        with torch.cuda.stream(self._out):
            host.copy_(leaf, non_blocking=True)
        return _OnHost(host)

    def _bring(self, leaf: Any) -> Any:
        if not isinstance(leaf, _OnHost):
            return leaf
        fresh = torch.empty_like(leaf.copy, device=self.device)
        with torch.cuda.stream(self._in):
            fresh.copy_(leaf.copy, non_blocking=True)
        return fresh
