"""Residuals on their way to pinned host memory and back, beside the computation."""

import torch
from torch.utils import _pytree

from . import tree


class Offload:
    """The parked residuals of one forward pass, by layer.

    Copies run on streams of their own. Fetching a layer waits for its copies only, and begins to
    fetch the layer before it, which the backward pass needs next. On the CPU nothing moves.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.device = device
        self._host: dict[int, tree.Tree] = {}
        self._coming: dict[int, tuple[tree.Tree, torch.cuda.Event | None]] = {}
        if self.cuda:
            self._out = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._in = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def park(self, layer: int, residuals: tree.Tree) -> None:
        """Send a tree of tensors away; its device memory is free once the copies are done."""
        if not self.cuda:
            self._host[layer] = residuals
            return
        self._out.wait_stream(torch.cuda.current_stream(self.device))

        def send(t: torch.Tensor) -> torch.Tensor:
            host = torch.empty_like(t, device="cpu", pin_memory=True)
            with torch.cuda.stream(self._out):
                host.copy_(t, non_blocking=True)
            t.record_stream(self._out)
            return host

        self._host[layer] = tree.map_tensors(send, residuals)

    def fetch(self, layer: int) -> tree.Tree:
        """The residuals of `layer`, back on the device, usable on the current stream; None if none
        were parked.
        """
        self._begin(layer)
        residuals, done = self._coming.pop(layer, (None, None))
        if done is not None:
            torch.cuda.current_stream(self.device).wait_event(done)
        self._begin(layer - 1)
        return residuals

    def _begin(self, layer: int) -> None:
        if layer in self._coming or layer not in self._host:
            return
        host = self._host.pop(layer)
        if not self.cuda:
            self._coming[layer] = (host, None)
            return
        # Memory for the copies comes from the computing stream, whose earlier users of it must be
        # done before the copy writes there.
        fresh = tree.map_tensors(lambda t: torch.empty_like(t, device=self.device), host)
        self._in.wait_stream(torch.cuda.current_stream(self.device))
        self._in.wait_stream(self._out)
        with torch.cuda.stream(self._in):
            for to, source in zip(tree.tensors(fresh), tree.tensors(host), strict=True):
                to.copy_(source, non_blocking=True)
            done = self._in.record_event()
        self._coming[layer] = (_pytree.tree_map(lambda x: x, fresh), done)
