"""Clipping, AdamW and the zeroing of gradients as one CUDA graph."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from .nn.graph import capture, replayable


class GraphedUpdate:
    """Clips the gradients of what `optimizer` trains, makes its step, and zeroes them.

    The first call runs eagerly, the second captures. Where parameters, gradients or the optimizer's
    state have come to lie elsewhere, the same anew. A loss or a norm that is not finite leaves the
    parameters and the optimizer's state as they are.
    optimizer: torch's fused AdamW; its learning rate becomes a tensor on the device.
    """

    def __init__(self, optimizer: torch.optim.AdamW, max_grad_norm: float) -> None:
        self.optimizer, self.limit = optimizer, max_grad_norm or math.inf
        groups = optimizer.param_groups
        self.params: list[torch.Tensor] = [p for group in groups for p in group["params"]]
        device = self.params[0].device
        self._loss, self._rate = (torch.zeros((), device=device) for _ in range(2))
        self._replay: Callable[[], torch.Tensor] | None = None
        self._where: list[int] = []

    def __call__(self, loss: torch.Tensor, rate: float) -> tuple[float, float]:
        """(the loss, the gradient's norm before clipping); the step is made at this `rate`."""
        self._loss.copy_(loss)
        self._rate.fill_(rate)
        device, where = self._loss.device, self._lies()
        if self._replay is not None and where != self._where:
            torch.cuda.synchronize(device)
            self._replay = None
        for group in self.optimizer.param_groups:  # whatever it was set to in between
            group["lr"], group["capturable"] = self._rate, True
        if self._replay is None and where == self._where and replayable(device):
            self._replay = capture(self._run, device) or self._run
        norm = (self._replay or self._run)()
        if self._replay is None:
            self._where = self._lies()
        else:
            # A replay tells nobody that it writes; whoever keeps what the weights gave must know.
            torch.autograd.graph.increment_version(self.params)
        found: list[float] = torch.stack([self._loss, norm]).tolist()
        return found[0], found[1]

    def _lies(self) -> list[int]:
        """Where what a graph of `_run` reads and writes is in memory."""
        states = (t for p in self.params for t in self.optimizer.state.get(p, {}).values())
        grads = (p.grad for p in self.params)
        return [0 if t is None else t.data_ptr() for t in (*self.params, *grads, *states)]

    @torch.no_grad()
    def _run(self) -> torch.Tensor:
        grads = [p.grad for p in self.params if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        torch.nn.utils.clip_grads_with_norm_(self.params, self.limit, norm)
        finite = torch.isfinite(norm) & torch.isfinite(self._loss)
        # What a gradient scaler tells the fused step: 1 leaves everything as it is.
        self.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
        self.optimizer.step()
        torch._foreach_zero_(grads)
        return norm
