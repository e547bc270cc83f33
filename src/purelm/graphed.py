"""A training step's forward and backward as one CUDA graph: for small batches, whose many short
kernels leave the GPU waiting for Python.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .convert import batch, memory_plan
from .convert.bridge import CausalLM
from .errors import ArgumentError
from .nn import decoder, layout, loss, tree
from .nn.residuals import per_layer


@dataclass(frozen=True, slots=True)
class _Captured:
    """A graph with the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    ids: torch.Tensor
    labels: torch.Tensor
    count: torch.Tensor | None
    loss: torch.Tensor


class GraphedStep:
    """What `model(ids, labels=labels).loss.backward()` does, replayed from a graph.

    The first call with a shape runs eagerly, captures and replays; later calls with that shape
    replay. Losses and gradients are those of the eager step to the bit, as far as that repeats
    itself (cuDNN's attention backward does not always). Gradients are added to the
    parameters' `.grad`, so an optimizer, clipping and `zero_grad` work as ever. Each shape keeps
    the memory of its step for as long as this object lives; all shapes share one pool.

    Raises ArgumentError for a model that is not on a GPU, has dropout or trains whole weights, or
    sends residuals to the host: none of these can be replayed.
    """

    def __init__(self, model: CausalLM) -> None:
        self.model = model
        reason = None
        if model.device.type != "cuda":
            reason = f"the model is on {model.device}"
        elif any(leaf.dropout for leaf in tree.leaves(model.adapters)):
            reason = "the adapters have dropout, drawn anew in each step"
        elif model.trained or model.train_all or not model.adapters:
            reason = "only adapters can be trained by it"
        if reason is not None:
            raise ArgumentError(f"a step of this model cannot be captured: {reason}")
        self._pool = torch.cuda.graph_pool_handle()
        self._shapes: dict[tuple[int, int, bool], _Captured] = {}
        self._trained = self._live()
        self._grads = [torch.zeros_like(p) for p in self._trained]

    def __call__(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """ids and labels [b, s] -> the loss, fp32 []; full rows, or padded on the right with labels
        of -100. num_items_in_batch: a tensor [] to divide the summed loss by.

        Raises InputError as the model does, and ArgumentError where the step cannot be captured.
        """
        batch.check_ids(input_ids, self.model.spec)
        rows = batch.layout_of(input_ids, self.model.spec, input_ids.device)
        batch.check_labels(labels, rows, self.model.spec, num_items_in_batch)
        if any(a is not b for a, b in zip(self._trained, self._live(), strict=True)):
            raise ArgumentError(
                "the model wears other adapters than were captured; make a new step"
            )
        self._attach()
        key = (*input_ids.shape, num_items_in_batch is not None)
        found = self._shapes.get(key)
        if found is None:
            found = self._shapes[key] = self._capture(input_ids, labels, num_items_in_batch)
        found.ids.copy_(input_ids)
        found.labels.copy_(labels)
        if found.count is not None and num_items_in_batch is not None:
            found.count.copy_(num_items_in_batch)
        with torch.cuda.device(self.model.device):  # a graph runs on the current device's stream
            found.graph.replay()
        return found.loss.clone()

    def _live(self) -> list[torch.Tensor]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def _attach(self) -> None:
        """Make the buffers that the graph adds to every parameter's `.grad`, of zeros at first."""
        fresh = []
        for p, grad in zip(self._trained, self._grads, strict=True):
            if p.grad is None:
                fresh.append(grad)
            elif p.grad is not grad:
                grad.copy_(p.grad)
            p.grad = grad
        if fresh:
            torch._foreach_zero_(fresh)

    def _capture(
        self, input_ids: torch.Tensor, labels: torch.Tensor, count: torch.Tensor | None
    ) -> _Captured:
        device = self.model.device
        policies = memory_plan.residuals_for(self.model, *input_ids.shape)
        if any(p.offloads for p in per_layer(policies, len(self.model.spec.layers))):
            raise ArgumentError(
                "residuals that are sent to the host cannot be captured: use "
                "use_gradient_checkpointing=False, True, or 'auto' with room for the batch"
            )
        ids, targets = input_ids.to(device, copy=True), labels.to(device, copy=True)
        held = None if count is None else count.to(device, copy=True)

        def run() -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
            params, spec = self.model.computed_params(), self.model.spec
            rows = layout.dense(*ids.shape, device=device)
            x = decoder.hidden(
                params, spec, ids, layout=rows, adapters=self.model.adapters, residuals=policies
            )
            total = loss.next_token(params, spec, x, targets, layout=rows, count=held)
            return total.detach(), torch.autograd.grad(total, self._trained)

        # Kernels are compiled and libraries set up before, on a stream of its own as captures need.
        with memory_plan.told(self.model, policies), torch.cuda.device(device):
            side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):
                for _ in range(2):
                    run()
            torch.cuda.current_stream(device).wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=side):
                value, grads = run()
                torch._foreach_add_(self._grads, list(grads))
        return _Captured(graph, ids, targets, held, value)
