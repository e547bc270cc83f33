"""The parts of a training loop: which rows a step takes, its learning rate, the step, evaluation.

Everything about step n follows from n, the seed and the options, so a run can be continued at any
step, and from nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from .convert.bridge import CausalLM
from .errors import ArgumentError, TrainingError
from .rows import Row, collate, pack

if TYPE_CHECKING:
    from .graphed_training import Graphs

ScheduleKind = Literal["cosine", "linear", "constant"]


@dataclass(frozen=True, slots=True)
class Plan:
    """How many steps over which rows: `batch` rows at a time, `accumulation` times per step."""

    num_rows: int
    batch: int
    accumulation: int
    steps: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Steps that visit every row once; the last one of an epoch may be smaller."""
        return math.ceil(self.num_rows / (self.batch * self.accumulation))

    def epoch(self, step: int) -> float:
        """How many times the rows have been seen after `step` steps."""
        whole, rest = divmod(step, self.steps_per_epoch)
        return whole + min(1.0, rest * self.batch * self.accumulation / self.num_rows)


@dataclass(frozen=True, slots=True)
class Schedule:
    """A learning rate that rises over `warmup` of `steps` steps and then stays or falls to 0."""

    kind: ScheduleKind
    peak: float
    warmup: int
    steps: int


@dataclass(frozen=True, slots=True)
class StepResult:
    """The loss per learned token, the norm of the gradient before clipping, tokens run."""

    loss: float
    grad_norm: float
    tokens: int


def plan_steps(
    num_rows: int, batch: int, accumulation: int, *, max_steps: int | None, epochs: float, seed: int
) -> Plan:
    """The plan of `max_steps` steps or else of `epochs` passes over the rows, at least one step."""
    one = Plan(num_rows, batch, accumulation, 0, seed)
    steps = max(1, round(epochs * one.steps_per_epoch)) if max_steps is None else max_steps
    return Plan(num_rows, batch, accumulation, steps, seed)


def batches(plan: Plan, step: int) -> list[list[int]]:
    """The rows of step `step` (from 0): one list of indices per batch, shuffled anew each epoch."""
    epoch, place = divmod(step, plan.steps_per_epoch)
    generator = torch.Generator().manual_seed(plan.seed * 1_000_003 + epoch)
    order = torch.randperm(plan.num_rows, generator=generator).tolist()
    size = plan.batch * plan.accumulation
    window = order[place * size : (place + 1) * size]
    return [window[i : i + plan.batch] for i in range(0, len(window), plan.batch)]


def learning_rate(schedule: Schedule, step: int) -> float:
    """The rate of step `step`, counted from 0; past the last step what it ends with."""
    if step < schedule.warmup:
        return schedule.peak * (step + 1) / schedule.warmup
    if schedule.kind == "constant":
        return schedule.peak
    done = min(1.0, (step - schedule.warmup) / max(1, schedule.steps - schedule.warmup))
    if schedule.kind == "linear":
        return schedule.peak * (1 - done)
    return schedule.peak * 0.5 * (1 + math.cos(math.pi * done))


def trained(model: CausalLM) -> dict[str, torch.nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def packs(model: CausalLM) -> bool:
    """Whether packed rows cost this model no more than their tokens.

    So it is where fused attention takes documents: on a GPU in 16 bits.
    Elsewhere a mask over the whole packed row, quadratic in its length, keeps documents apart.
    """
    return model.device.type == "cuda" and model.dtype in (torch.bfloat16, torch.float16)


def train_step(
    model: CausalLM,
    optimizer: torch.optim.Optimizer,
    window: Sequence[Sequence[Row]],
    *,
    step: int,
    rate: float,
    max_grad_norm: float,
    pad_id: int,
    packing: bool = False,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    graphs: Graphs | None = None,
    debug: bool = False,
) -> StepResult:
    """One update from all batches of `window`, each learned token weighing the same.

    window: what one step learns from, in batches of rows that run together; their gradients are
    added up. step: its number from 0, which errors name; nothing else follows from it. rate: of
    this step, in place of the optimizer's own. max_grad_norm: the norm that the gradient is clipped
    to; 0 does not clip. pad_id: any token, put behind the shorter rows of a batch, where nothing
    reads it.
    packing: the rows of a batch run as one packed row instead of a padded batch; see `packs`.
    label_smoothing, z_loss: as in `nn.loss.next_token`.
    graphs: replay the step from these, of this model and optimizer, made with the same packing,
    terms and clipping; raises ArgumentError where any of it differs.
    debug: a step that is not finite is run once more, for the error to name the first layer and
    tensor that are not (`nn.watch`); others cost nothing.
    Raises ArgumentError for a window, rate or max_grad_norm that cannot be used and a model in
    evaluation mode, InputError for a batch that cannot be run or teaches nothing, and TrainingError
    for a loss or gradient that is not finite. After any of these, and where memory runs out in a
    batch, the parameters and the dropout are as they were, without gradients.
    """
    for name, value in (("rate", rate), ("max_grad_norm", max_grad_norm)):
        if not 0 <= value < math.inf:
            raise ArgumentError(f"{name} is {value}, expected 0 or more")
    if not window or not all(window):
        raise ArgumentError(
            f"window has batches of {[len(rows) for rows in window]} rows, expected one or more "
            "batches, each with rows"
        )
    if not model.training:
        raise ArgumentError("the model is in evaluation mode: call model.train() before steps")
    terms = {"label_smoothing": label_smoothing, "z_loss": z_loss}
    if graphs is not None:
        graphs.check(model, optimizer, max_grad_norm, packing=packing, **terms)
    count = sum(row.learned for rows in window for row in rows)
    tokens = sum(len(row.ids) for rows in window for row in rows)
    given = {"num_items_in_batch": count, "smoothing": label_smoothing, "z_loss": z_loss}

    def batch(rows: Sequence[Row]) -> dict[str, Any]:
        return {**(pack(rows) if packing else collate(rows, pad_id)), **given}

    began = model.dropout_step
    try:
        if graphs is not None:
            losses = [graphs.loss(rows, count) for rows in window]
            if graphs.update is not None:
                total = torch.stack(losses).sum()
                return _checked(StepResult(*graphs.update(total, rate), tokens), step, rate)
        else:
            losses = [_backward(model, batch(rows)) for rows in window]
        params = [p for group in optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(params, max_grad_norm if max_grad_norm else math.inf)
        result = StepResult(float(torch.stack(losses).sum()), float(norm), tokens)
        result = _checked(result, step, rate)
    except BaseException as problem:  # what some batches gave is not for the next step
        optimizer.zero_grad()
        model.dropout_step = began
        if isinstance(problem, torch.OutOfMemoryError):
            model.dense.give_up()  # for the next try
        if not debug or not isinstance(problem, TrainingError):
            raise
        try:
            place = _first_bad(model, (batch(rows) for rows in window))
        finally:
            optimizer.zero_grad()
        raise TrainingError(f"{problem}; {place}") from None
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()
    return result


def _backward(model: CausalLM, batch: dict[str, Any]) -> torch.Tensor:
    """The loss of a batch, whose gradients are added to the parameters'."""
    loss: torch.Tensor | None = model(**batch).loss
    assert loss is not None
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()


def _first_bad(model: CausalLM, batches: Iterable[dict[str, Any]]) -> str:
    """What is not finite first when these are run again; the model is left as it was."""
    before = model.debug, model.dropout_step
    model.debug = True
    try:
        for batch in batches:
            _backward(model, batch)
    except TrainingError as found:
        return f"run again, {found}"
    except torch.OutOfMemoryError:
        return "run again, memory ran out"
    finally:
        model.debug, model.dropout_step = before
    return "run again, each batch alone is finite"


def _checked(result: StepResult, step: int, rate: float) -> StepResult:
    if math.isfinite(result.loss) and math.isfinite(result.grad_norm):
        return result
    raise TrainingError(
        f"step {step + 1}: the loss is {result.loss} and the gradient's norm "
        f"{result.grad_norm}; lower the learning rate ({rate:.3g}), or compute in bfloat16 or "
        "float32"
    )


@torch.no_grad()
def evaluate(
    model: CausalLM, rows: Sequence[Row], *, batch: int, pad_id: int, packing: bool = False
) -> float:
    """The loss per learned token over all rows, however they are batched.

    Raises ArgumentError where there are none; the model's mode is as it was, whatever is raised.
    """
    if not rows:
        raise ArgumentError("there are no rows to evaluate on")
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    # Rows of like length together: less padding, the same sum.
    ordered = sorted(rows, key=lambda row: len(row.ids))
    try:
        for i in range(0, len(ordered), batch):
            some = ordered[i : i + batch]
            given = pack(some) if packing else collate(some, pad_id)
            loss = model(**given, num_items_in_batch=1).loss
            assert loss is not None
            total += float(loss)
            count += sum(row.learned for row in some)
    finally:
        model.train(was_training)
    return total / count
