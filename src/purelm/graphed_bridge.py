"""Captured steps behind the bridge: what a trainer or a loop of one's own calls, replayed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .convert.bridge import CausalLM
from .convert.output import CausalLMOutput
from .graphed import GraphedStep, Taken, Uncapturable

_logger = logging.getLogger("purelm.graph")


def replay(model: CausalLM, on: bool = True) -> CausalLM:
    """From now on replay what `model(input_ids, labels=...)` does in training, with its backward,
    from CUDA graphs (`graphed.GraphedStep`), in any loop or trainer; `on=False` ends it.

    A pass that no graph can hold, or with position_ids, runs as ever; the first of them says why in
    the log. A loss must have its backward before the next pass of training. What is read of the
    output beside the loss takes a pass of its own, without dropout. Returns the model; raises
    Uncapturable where no step of it can be captured.
    """
    model.replays = _Replays(model) if on else None
    return model


class _Replays:
    def __init__(self, model: CausalLM) -> None:
        self._model, self._said = model, False
        # By the loss's terms, which are captured with it.
        self._steps: dict[tuple[float, float], GraphedStep] = {}
        self._step(0.0, 0.0)

    def __reduce__(self) -> Any:
        return type(None), ()  # copies and files have none

    def _step(self, smoothing: float, z_loss: float) -> GraphedStep:
        key = smoothing, z_loss
        if key not in self._steps:
            self._steps[key] = GraphedStep(self._model, label_smoothing=smoothing, z_loss=z_loss)
        return self._steps[key]

    def __call__(
        self,
        batch: dict[str, Any],
        count: torch.Tensor | float | None,
        smoothing: float,
        z_loss: float,
    ) -> CausalLMOutput | None:
        """None where the pass is to run as ever."""
        if count is not None and not isinstance(count, torch.Tensor):
            if not count > 0:
                return None  # the pass itself says what is wrong with it
            count = torch.tensor(float(count))
        if batch.pop("position_ids") is not None:
            self._refused("position_ids tell where tokens stand")
            return None
        try:
            step = self._step(smoothing, z_loss)
            value, gradients = step.taken(**batch, num_items_in_batch=count)
        except Uncapturable as problem:
            self._refused(problem)
            return None
        loss: torch.Tensor = _Replayed.apply(value, gradients, *step.trained)  # type: ignore[no-untyped-call]
        return _Output(loss, lambda: self._again(batch))

    def _refused(self, reason: object) -> None:
        if not self._said:
            _logger.warning("a pass of training runs without a CUDA graph: %s", reason)
            self._said = True

    def _again(self, batch: dict[str, Any]) -> CausalLMOutput:
        was_training = self._model.training
        given = {name: value for name, value in batch.items() if name != "labels"}
        try:
            with torch.no_grad():
                made: CausalLMOutput = self._model.eval()(**given)
        finally:
            self._model.train(was_training)
        return made


class _Replayed(torch.autograd.Function):
    """The loss of a step whose gradients are there with it, to be handed out in its backward."""

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor, gradients: Taken, *of: torch.Tensor) -> torch.Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: torch.Tensor) -> Any:
        return None, None, *ctx.gradients(dloss)


class _Output(CausalLMOutput):
    """The loss, and what else is asked for, made when it is."""

    def __init__(self, loss: torch.Tensor, again: Callable[[], CausalLMOutput]) -> None:
        self.loss, self._again = loss, again

    @property
    def logits(self) -> torch.Tensor:
        return self._again().logits

    @property
    def last_hidden_state(self) -> torch.Tensor:  # type: ignore[override]
        return self._again().last_hidden_state
