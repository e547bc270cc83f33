"""A training step's forward and backward as one CUDA graph: for small batches, whose many short
kernels leave the GPU waiting for Python.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from .buckets import bucket_for, filled
from .convert import batch, memory_plan, named_adapters
from .convert.bridge import CausalLM
from .errors import ArgumentError
from .nn import decoder, layout, loss, tree
from .nn.decode import waits_for
from .nn.graph import Pool, capture
from .nn.layout import Layout
from .nn.residuals import Residuals, per_layer

# Shapes whose graphs are held at a time; the one that was not used for longest goes.
_MOST_SHAPES = 32

# Rows, tokens in a row, whether a count is given; of a packed row its documents and their longest.
_Key = tuple[int, int, bool, int, int]


@dataclass(frozen=True, slots=True)
class _Captured:
    """A step, replayed from a graph where it could be captured, and the tensors that it reads."""

    step: Callable[[], torch.Tensor]
    ids: torch.Tensor
    labels: torch.Tensor
    cu_seqlens: torch.Tensor | None
    count: torch.Tensor | None


def uncapturable(model: CausalLM) -> str | None:
    """Why no step of `model` can be captured; None where one can."""
    if model.device.type != "cuda":
        return f"the model is on {model.device}"
    if any(leaf.dropout for leaf in tree.leaves(model.adapters)):
        return "the adapters have dropout, drawn anew in each step"
    if model.trained or model.train_all or not model.adapters:
        return "only adapters can be trained by it"
    found = waits_for(model.computed_params(), model.spec, model.adapters)
    return None if found is None else f"it asks the device in between: {found}"


def unplayable(model: CausalLM, tokens: tuple[int, int]) -> str | None:
    """Why a step of a batch of so many rows and tokens in each cannot be replayed; None if not."""
    policies = memory_plan.residuals_for(model, *tokens)
    if any(p.offloads for p in per_layer(policies, len(model.spec.layers))):
        return (
            "residuals that are sent to the host cannot be captured: use "
            "use_gradient_checkpointing=False, True, or 'auto' with room for the batch"
        )
    return None


class GraphedStep:
    """What `model(ids, labels=labels).loss.backward()` does, replayed from a graph.

    The first call with a shape runs eagerly, captures and replays; later calls with that shape
    replay. Losses and gradients are those of the eager step to the bit, as far as that repeats
    itself (cuDNN's attention backward does not always). Packed rows are filled up to one of a few
    shapes (`buckets`). Gradients are added to the parameters' `.grad`, so an optimizer, clipping
    and `zero_grad` work as ever. The latest shapes keep their graphs; all share one pool of memory,
    as large as the largest step, for as long as this object lives. A step that fails to be captured
    runs eagerly, with a warning in the log.

    Raises ArgumentError for a model that is not on a GPU, has dropout or trains whole weights, or
    sends residuals to the host: none of these can be replayed.
    """

    def __init__(
        self, model: CausalLM, *, label_smoothing: float = 0.0, z_loss: float = 0.0
    ) -> None:
        self.model = model
        # Of the loss, captured with it: as keywords of the model's own.
        self.terms = {"smoothing": label_smoothing, "z_loss": z_loss}
        reason = uncapturable(model)
        if reason is not None:
            raise ArgumentError(f"a step of this model cannot be captured: {reason}")
        self._pool = Pool()
        self._shapes: dict[_Key, _Captured] = {}
        self._trained = self._live()
        self._grads = [torch.zeros_like(p) for p in self._trained]

    def __call__(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        num_items_in_batch: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """ids and labels [b, s] -> the loss, fp32 []; full rows, or padded on the right with labels
        of -100, or with cu_seqlens [documents + 1] one packed row. num_items_in_batch: a tensor []
        to divide the summed loss by. Packed rows are read on the CPU: best given there.

        Raises InputError as the model does, and ArgumentError where the step cannot be captured.
        """
        spec, longest = self.model.spec, 0
        batch.check_ids(input_ids, spec)
        rows = batch.layout_of(input_ids, spec, input_ids.device, cu_seqlens=cu_seqlens)
        batch.check_labels(labels, rows, spec, num_items_in_batch)
        if cu_seqlens is not None:
            input_ids, labels, cu_seqlens = (t.cpu() for t in (input_ids, labels, cu_seqlens))
            bucket = bucket_for(cu_seqlens)
            longest = bucket.longest
            made = filled(input_ids, labels, cu_seqlens, bucket)
            input_ids, labels, cu_seqlens = made["input_ids"], made["labels"], made["cu_seqlens"]
        live = self._live()
        if [id(p) for p in self._trained] != [id(p) for p in live]:
            raise ArgumentError(
                "the model wears other adapters than were captured; make a new step"
            )
        self._attach()
        documents = 0 if cu_seqlens is None else cu_seqlens.numel() - 1
        b, s = input_ids.shape
        key = (b, s, num_items_in_batch is not None, documents, longest)
        found = self._shapes.pop(key, None)
        if found is None:
            found = self._capture(input_ids, labels, num_items_in_batch, cu_seqlens, longest)
        self._shapes[key] = found
        if len(self._shapes) > _MOST_SHAPES:
            torch.cuda.synchronize(self.model.device)
            del self._shapes[next(iter(self._shapes))]
        found.ids.copy_(input_ids)
        found.labels.copy_(labels)
        if found.cu_seqlens is not None and cu_seqlens is not None:
            found.cu_seqlens.copy_(cu_seqlens)
        if found.count is not None and num_items_in_batch is not None:
            found.count.copy_(num_items_in_batch)
        return found.step().clone()

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
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        count: torch.Tensor | None,
        cu_seqlens: torch.Tensor | None,
        longest: int,
    ) -> _Captured:
        device, b, s = self.model.device, *input_ids.shape
        reason = unplayable(self.model, (b, s))
        if reason is not None:
            raise ArgumentError(reason)
        policies = memory_plan.residuals_for(self.model, b, s)
        ids, targets = input_ids.to(device, copy=True), labels.to(device, copy=True)
        held = None if count is None else count.to(device, copy=True)
        ends = None if cu_seqlens is None else cu_seqlens.to(device, copy=True)

        def run() -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
            if ends is None:
                rows = layout.dense(b, s, device=device)
            else:
                rows = layout.from_cu_seqlens(ends, s, longest)
            # Leaves of its own, over the same memory: what elsewhere still holds on to a graph of
            # the parameters' would tie this one to another stream.
            fresh = {id(p): p.detach().requires_grad_() for p in self._trained}
            worn = [
                replace(one, adapters=tree.map_tensors(lambda t: fresh.get(id(t), t), one.adapters))
                for one in self.model.acting
            ]
            adapters = named_adapters.acting(worn, training=True)
            value = value_of(
                self.model,
                ids,
                targets,
                rows,
                adapters=adapters,
                count=held,
                residuals=policies,
                **self.terms,
            )
            return value.detach(), torch.autograd.grad(value, list(fresh.values()))

        def step() -> torch.Tensor:
            value, grads = run()
            torch._foreach_add_(self._grads, list(grads))
            return value

        with memory_plan.told(self.model, policies):
            run()  # compiles kernels; no gradient counts yet
            graph = capture(step, device, pool=self._pool)
        return _Captured(graph or step, ids, targets, ends, held)


def value_of(
    model: CausalLM,
    ids: torch.Tensor,
    labels: torch.Tensor,
    rows: Layout,
    *,
    adapters: tree.Tree,
    count: torch.Tensor | None,
    residuals: Residuals,
    smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> torch.Tensor:
    """The loss that is captured: `model(ids, labels=labels).loss`, of what is on the device."""
    params, spec = model.computed_params(), model.spec
    x = decoder.hidden(params, spec, ids, layout=rows, adapters=adapters, residuals=residuals)
    return loss.next_token(
        params,
        spec,
        x,
        labels,
        layout=rows,
        count=count,
        label_smoothing=smoothing,
        z_loss=z_loss,
    )
