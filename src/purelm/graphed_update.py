"""Clipping, AdamW and the zeroing of gradients as one CUDA graph."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from .nn.graph import capture, replayable


class GraphedUpdate:
    """Clips the gradients of what `optimizer` trains, makes its step, and zeroes them.

    The first call runs eagerly, the second captures; `.grad`s must be the same tensors in each. A
    loss or a norm that is not finite leaves the parameters and the optimizer's state as they are.
    optimizer: torch's fused AdamW; its learning rate becomes a tensor on the device.
    """

    def __init__(self, optimizer: torch.optim.AdamW, max_grad_norm: float) -> None:
        self.optimizer, self.limit = optimizer, max_grad_norm or math.inf
        groups = optimizer.param_groups
        self.params: list[torch.Tensor] = [p for group in groups for p in group["params"]]
        device = self.params[0].device
        self._loss, self._rate = (torch.zeros((), device=device) for _ in range(2))
        for group in groups:
            group["lr"], group["capturable"] = self._rate, True
        self._replay: Callable[[], torch.Tensor] | None = None
        self._calls = 0

    def __call__(self, loss: torch.Tensor, rate: float) -> tuple[float, float]:
        """(the loss, the gradient's norm before clipping); the step is made at this `rate`."""
        self._loss.copy_(loss)
        self._rate.fill_(rate)
        self._calls += 1
        device = self._loss.device
        if self._replay is None and self._calls > 1 and replayable(device):
            self._replay = capture(self._run, device) or self._run
        norm = (self._replay or self._run)()
        if self._replay is not None:
            # A replay tells nobody that it writes; whoever keeps what the weights gave must know.
            torch.autograd.graph.increment_version(self.params)
        found: list[float] = torch.stack([self._loss, norm]).tolist()
        return found[0], found[1]

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
