"""A training step's forward and backward as one CUDA graph: for small batches, whose many short
kernels leave the GPU waiting for Python.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from operator import is_
from typing import Any

import torch

from .buckets import bucket_for, filled, widened
from .convert import batch, memory_plan, named_adapters
from .convert.bridge import CausalLM
from .errors import ArgumentError
from .kernels.dropout import Ahead
from .nn import decoder, layout, loss, tree
from .nn.decode import waits_for
from .nn.graph import Pool, capture
from .nn.layout import Layout
from .nn.loss import IGNORE
from .nn.residuals import Residuals, per_layer

# Shapes whose graphs are held at a time; the one that was not used for longest goes.
_MOST_SHAPES = 32

# Rows, tokens in a row, whether a count is given; of a packed row its documents and their longest.
_Key = tuple[int, int, bool, int, int]


Taken = Callable[[torch.Tensor], list[torch.Tensor]]


class Uncapturable(ArgumentError):
    """A step that no graph can hold; the message says why, and the model runs it as ever."""


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
    if not any(p.requires_grad for p in model.parameters()):
        return "nothing of it is trained"
    drops = 0 if _drops(model) else None
    found = waits_for(model.computed_params(), model.spec, model.adapters, drops)
    return None if found is None else f"it asks the device in between: {found}"


def _drops(model: CausalLM) -> bool:
    return any(leaf.dropout for one in model.acting for leaf in tree.leaves(one.adapters))


class GraphedStep:
    """What `model(ids, labels=labels).loss.backward()` does, replayed from a graph.

    The first call with a shape runs eagerly, captures and replays; later calls with that shape
    replay. Losses and gradients are those of the eager step to the bit, as far as that repeats
    itself (cuDNN's attention backward does not always). Packed and padded rows are filled up to one
    of a few shapes (`buckets`). Gradients are added to the parameters' `.grad`, so an optimizer,
    clipping and `zero_grad` work as ever. Dropout is drawn anew in each replay, as the model's next
    pass would draw it. The latest shapes keep their graphs; all share one pool of memory, as large
    as the largest step, for as long as this object lives. A step that fails to be captured runs
    eagerly, with a warning in the log.

    Where other tensors have come in the place of the model's, graphs are captured anew. Raises
    ArgumentError where what is trained has changed, and Uncapturable for a model that is not on a
    GPU, whose experts wait (`nn.experts.waits_for`: with DoRA, dropout or int8), whose embedding is
    on the host, or whose plan sends residuals to the host, and for a batch whose padding has labels
    that count: none of these can be replayed.
    """

    def __init__(
        self, model: CausalLM, *, label_smoothing: float = 0.0, z_loss: float = 0.0
    ) -> None:
        self.model = model
        # Of the loss, captured with it: as keywords of the model's own.
        self.terms = {"smoothing": label_smoothing, "z_loss": z_loss}
        reason = uncapturable(model)
        if reason is not None:
            raise Uncapturable(f"a step of this model cannot be captured: {reason}")
        self._pool = Pool()
        self._shapes: dict[_Key, _Captured] = {}
        self.trained = self._live()
        self._grads = [torch.zeros_like(p) for p in self.trained]
        # What the model's own seed of dropout is before each replay.
        self._seed = torch.zeros((), dtype=torch.int64, device=model.device)
        self._read = _Read(model)
        self._taken = 0

    def __call__(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        num_items_in_batch: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """ids and labels [b, s] -> the loss, fp32 []; full rows, padded rows with their mask (or,
        padded on the right, with labels of -100 alone, as they are), or with cu_seqlens
        [documents + 1] one packed row. num_items_in_batch: a tensor [] to divide the summed loss
        by. Packed and padded rows are read on the CPU: best given there.

        Raises InputError as the model does, and what the class says.
        """
        given = input_ids, labels, num_items_in_batch, cu_seqlens, attention_mask
        return self._replayed(*given, before=self.attach)

    def taken(self, *given: Any, **more: Any) -> tuple[torch.Tensor, Taken]:
        """The loss of the same arguments, and a function from the gradient that reaches it to those
        of `trained`, which no `.grad` has then; ArgumentError after another step.
        """
        self._taken += 1
        before, call = lambda: torch._foreach_zero_(self._grads), self._taken
        loss = self._replayed(*given, **more, before=before)

        def gradients(dloss: torch.Tensor) -> list[torch.Tensor]:
            if call != self._taken:
                raise ArgumentError(
                    "another step was taken before the backward of this one's loss: gradients of a "
                    "replayed step are there until the next one"
                )
            return list(torch._foreach_mul(self._grads, dloss))

        return loss, gradients

    def _replayed(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        num_items_in_batch: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        *,
        before: Callable[[], None],
    ) -> torch.Tensor:
        spec, longest = self.model.spec, 0
        batch.check_ids(input_ids, spec)
        given = {"cu_seqlens": cu_seqlens, "attention_mask": attention_mask}
        rows = batch.layout_of(input_ids, spec, input_ids.device, **given)
        batch.check_labels(labels, rows, spec, num_items_in_batch)
        if cu_seqlens is not None:
            input_ids, labels, cu_seqlens = (t.cpu() for t in (input_ids, labels, cu_seqlens))
            bucket = bucket_for(cu_seqlens)
            longest = bucket.longest
            made = filled(input_ids, labels, cu_seqlens, bucket)
            input_ids, labels, cu_seqlens = made["input_ids"], made["labels"], made["cu_seqlens"]
        elif attention_mask is not None:
            most = spec.max_positions
            if bool((labels[~attention_mask.bool().to(labels.device)] != IGNORE).any()):
                raise Uncapturable("labels of padding count: make them -100")
            input_ids, labels = widened(input_ids, labels, attention_mask, most)
        live = self._live()
        if [id(p) for p in self.trained] != [id(p) for p in live]:
            raise ArgumentError(
                "the model trains other parameters than were captured: make a new GraphedStep or "
                "Graphs, or call graphed_bridge.replay again"
            )
        if self._read.moved():
            torch.cuda.synchronize(self.model.device)
            self._shapes.clear()
            self._pool = Pool()  # the other's memory goes with its graphs
        documents = 0 if cu_seqlens is None else cu_seqlens.numel() - 1
        b, s = input_ids.shape
        key = (b, s, num_items_in_batch is not None, documents, longest)
        found = self._shapes.pop(key, None)
        if found is None:
            found = self._capture(input_ids, labels, num_items_in_batch, cu_seqlens, longest)
            if self._read.moved():  # its plan has other weights dequantized than the others' had
                torch.cuda.synchronize(self.model.device)
                self._shapes.clear()
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
        before()
        seed = self.model.next_seed()
        if seed is not None:
            self._seed.fill_(seed)
        return found.step().clone()

    def _live(self) -> list[torch.Tensor]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def attach(self) -> None:
        """Make the buffers that the graph adds to every parameter's `.grad`, of zeros at first."""
        fresh = []
        for p, grad in zip(self.trained, self._grads, strict=True):
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
        model, device, (b, s) = self.model, self.model.device, input_ids.shape
        ends = None if cu_seqlens is None else cu_seqlens.to(device, copy=True)

        def places() -> Layout:
            if ends is None:
                return layout.dense(b, s, device=device)
            return layout.from_cu_seqlens(ends, s, longest)

        masked = memory_plan.is_masked(model, places())
        policies = memory_plan.residuals_for(model, b, s, masked=masked)
        if any(p.offloads for p in per_layer(policies, len(model.spec.layers))):
            raise Uncapturable(
                "residuals that are sent to the host cannot be captured: use "
                "use_gradient_checkpointing=False, True, or 'auto' with room for the batch"
            )
        ids, targets = input_ids.to(device, copy=True), labels.to(device, copy=True)
        held = None if count is None else count.to(device, copy=True)
        seed = Ahead(0, self._seed) if _drops(model) else None

        def value() -> tuple[torch.Tensor, list[torch.Tensor]]:
            # Leaves of its own, over the same memory: what elsewhere still holds on to a graph of
            # the parameters' would tie this one to another stream.
            fresh = {id(p): p.detach().requires_grad_() for p in self.trained}
            how: Any = {"count": held, "residuals": policies, "seed": seed, **self.terms}
            how["own"] = lambda t: fresh.get(id(t), t)
            return value_of(model, ids, targets, places(), **how), list(fresh.values())

        def step() -> torch.Tensor:
            made, leaves = value()
            if model.train_all:
                # Each gradient is added as it comes: twice all of them would not fit.
                for leaf, grad in zip(leaves, self._grads, strict=True):
                    leaf.grad = grad
                made.backward()  # type: ignore[no-untyped-call]
            else:
                torch._foreach_add_(self._grads, torch.autograd.grad(made, leaves))
            return made.detach()

        with memory_plan.told(model, policies):
            torch.autograd.grad(*value())  # compiles kernels; no gradient counts yet
            graph = capture(step, device, pool=self._pool)
        return _Captured(graph or step, ids, targets, ends, held)


class _Read:
    """Where the tensors lie that a model's passes read, as graphs have it."""

    def __init__(self, model: CausalLM) -> None:
        self._model = model
        self._leaves: list[Any] = []
        self._tensors: list[torch.Tensor] = []
        self._where: tuple[str | None, list[int]] = None, []
        self.moved()

    def moved(self) -> bool:
        """Whether others have come in their place since this was last asked, or dense weights are
        no longer what the packed ones say."""
        leaves = tree.leaves([*self._model.own_trees(), *self._model.dense.trees])
        same = len(leaves) == len(self._leaves) and all(map(is_, leaves, self._leaves))
        if not same:
            self._leaves, self._tensors = leaves, tree.tensors(leaves)
        where = self._model.qat_scheme, [t.data_ptr() for t in self._tensors]
        moved = not same or where != self._where or self._model.dense.stale
        self._where = where
        return moved


def value_of(
    model: CausalLM,
    ids: torch.Tensor,
    labels: torch.Tensor,
    rows: Layout,
    *,
    count: torch.Tensor | None,
    residuals: Residuals,
    seed: int | None = None,
    own: Callable[[torch.Tensor], torch.Tensor] = lambda t: t,
    smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> torch.Tensor:
    """The loss that is captured: `model(ids, labels=labels).loss`, of what is on the device.

    own: what to compute with in place of each of the model's tensors.
    """
    worn = [
        replace(
            one,
            adapters=tree.map_tensors(own, one.adapters),
            trained=tree.map_tensors(own, one.trained),
        )
        for one in model.acting
    ]
    # Of adapters alone the base's leaves stay what they are, by which dense ones are found again.
    params = model.computed_params(worn, own if model.train_all else None)
    params, spec = model.dense.put(params, model.dtype), model.spec
    adapters = named_adapters.acting(worn, training=True)
    how: Any = {"adapters": adapters, "residuals": residuals, "seed": seed}
    x = decoder.hidden(params, spec, ids, layout=rows, **how)
    return loss.next_token(
        params,
        spec,
        x,
        labels,
        layout=rows,
        adapters=adapters,
        seed=seed,
        count=count,
        label_smoothing=smoothing,
        z_loss=z_loss,
    )
