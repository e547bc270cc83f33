"""Supervised fine-tuning from data to adapter: what `purelm sft` runs, a function of options."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from . import chat, plot, train_state, training
from .convert.memory_plan import advice
from .errors import ArgumentError, SaveError, TrainingError
from .graphed_training import Graphs, graphs_for
from .interrupt import held_back
from .metrics import Metrics, open_metrics, peak_memory
from .sft_job import Job, Say, prepare
from .sft_options import Options, check

OnStep = Callable[[int], None]

# Sampled answers are for a person to look at.
_SAMPLE_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Result:
    """What a run did and where it put things; None for what it was not asked to do."""

    steps: int
    loss_before: float | None
    loss_after: float | None
    sample_before: str | None
    sample_after: str | None
    metrics: Path
    adapter: Path | None
    merged: Path | None
    picture: Path | None


def checkpoint_folder(options: Options) -> Path:
    """Where a run leaves the state from which `resume` goes on."""
    return Path(options.output) / "checkpoint"


def run(options: Options, *, say: Say = print, on_step: OnStep | None = None) -> Result:
    """Fine-tune as `options` say and save the result into their output folder.

    say is given each line of the report; on_step the number of each step that is done, after its
    checkpoint if there is one. Whatever stops a run, its last checkpoint stays whole; Ctrl-C
    first makes one of the step it falls into, unless save_every is 0. Raises ArgumentError,
    DataError, TrainingError, and what loading and saving raise.
    """
    check(options)
    output, state = Path(options.output), checkpoint_folder(options)
    _check_output(options, state)
    job = prepare(options, say)
    before: dict[str, Any] = {}
    start = 0
    if options.resume:
        progress = train_state.restore(state, job.model, job.optimizer, job.identity)
        start, before = progress.step, dict(progress.notes)
        say(f"resumed at step {start} of {job.plan.steps}")
    else:
        train_state.discard(state)
    with open_metrics(output / "metrics.jsonl", keep_steps=start if options.resume else None) as m:
        if not options.resume:
            before = {"loss": _evaluate(job, m, 0), "sample": _sample(job)}
        _report_start(job, before, say)
        _train(job, m, start, before, on_step, say)
        after = _last_loss(m) if _was_evaluated(m, job.plan.steps) else None
        if job.held_out and after is None:
            after = _evaluate(job, m, job.plan.steps)
    sample = _sample(job)
    adapter, merged = _save(job, output)
    picture: Path | None = output / "loss.png"
    if not plot.loss_picture(m.lines, output / "loss.png"):
        say("loss.png was not drawn: matplotlib is not installed (pip install 'purelm[plot]')")
        picture = None
    # The run is whole; its state would only stand in the next one's way.
    train_state.discard(state)
    result = Result(
        steps=job.plan.steps,
        loss_before=before.get("loss"),
        loss_after=after,
        sample_before=before.get("sample"),
        sample_after=sample,
        metrics=output / "metrics.jsonl",
        adapter=adapter,
        merged=merged,
        picture=picture,
    )
    _report_end(result, bool(job.tokenizer.chat_template), say)
    return result


def _check_output(options: Options, state: Path) -> None:
    output = state.parent
    if output.exists() and not output.is_dir():
        raise SaveError(f"{output} is a file; give a folder as the output")
    found = train_state.exists(state)
    if options.resume and not found:
        raise ArgumentError(f"there is nothing to resume: {state} holds no checkpoint")
    if found and not options.resume and not options.overwrite:
        raise ArgumentError(
            f"{state} is the checkpoint of a run that did not finish: go on with it (--resume), "
            "throw it away (--overwrite), or give another --output"
        )


def _train(
    job: Job,
    metrics: Metrics,
    start: int,
    before: dict[str, Any],
    on_step: OnStep | None,
    say: Say,
) -> None:
    options, plan = job.options, job.plan
    job.model.train()
    graphs = graphs_for(
        job.model,
        job.optimizer,
        options.max_grad_norm,
        packing=job.packing,
        asked=options.graph,
        label_smoothing=options.label_smoothing,
        z_loss=options.z_loss,
        say=say,
    )
    with (
        tqdm(total=plan.steps, initial=start, unit="step", disable=None, file=sys.stderr) as bar,
        held_back() if options.save_every else nullcontext(lambda: False) as interrupted,
    ):
        for step in range(start, plan.steps):
            began = time.perf_counter()
            rate = training.learning_rate(job.schedule, step)
            result = _step(job, step, rate, graphs)
            seconds = time.perf_counter() - began
            memory = peak_memory(job.model.device)
            done = step + 1
            metrics.add(
                kind="train",
                step=done,
                epoch=round(plan.epoch(done), 4),
                loss=result.loss,
                learning_rate=rate,
                grad_norm=result.grad_norm,
                tokens=result.tokens,
                tokens_per_second=round(result.tokens / seconds, 1),
                memory_bytes=memory,
            )
            bar.update()
            bar.set_postfix_str(
                f"loss {result.loss:.3f}, {result.tokens / seconds:.0f} tokens/s"
                + (f", {memory / 2**30:.2f} GiB" if memory else "")
            )
            if options.eval_every and done % options.eval_every == 0:
                _evaluate(job, metrics, done)
            stop = interrupted()
            # After the last step too: should saving fail, the training is not lost.
            due = options.save_every and (done % options.save_every == 0 or done == plan.steps)
            if due or stop:
                progress = train_state.Progress(done, before)
                train_state.save(
                    checkpoint_folder(job.options), job.model, job.optimizer, progress, job.identity
                )
            if on_step is not None:
                on_step(done)
            if stop:
                break
        if interrupted():
            raise KeyboardInterrupt


def _step(job: Job, step: int, rate: float, graphs: Graphs | None) -> training.StepResult:
    window = [[job.train[i] for i in some] for some in training.batches(job.plan, step)]
    try:
        return training.train_step(
            job.model,
            job.optimizer,
            window,
            step=step,
            rate=rate,
            max_grad_norm=job.options.max_grad_norm,
            pad_id=job.pad_id,
            packing=job.packing,
            label_smoothing=job.options.label_smoothing,
            z_loss=job.options.z_loss,
            graphs=graphs,
            debug=True,
        )
    except torch.OutOfMemoryError as problem:
        longest = max(len(row.ids) for some in window for row in some)
        raise TrainingError(
            f"step {step + 1}: the GPU's memory ran out at {job.options.batch_size} rows of up to "
            f"{longest} tokens; lower --batch-size (and raise --accumulation) or --max-seq-length; "
            + advice(job.model)
        ) from problem


def _evaluate(job: Job, metrics: Metrics, step: int) -> float | None:
    if not job.held_out:
        return None
    loss = training.evaluate(
        job.model,
        job.held_out,
        batch=max(8, job.options.batch_size),
        pad_id=job.pad_id,
        packing=job.packing,
    )
    metrics.add(kind="eval", step=step, loss=loss)
    return loss


def _was_evaluated(metrics: Metrics, step: int) -> bool:
    return any(line["kind"] == "eval" and line["step"] == step for line in metrics.lines)


def _last_loss(metrics: Metrics) -> float:
    return float([line for line in metrics.lines if line["kind"] == "eval"][-1]["loss"])


def _sample(job: Job) -> str | None:
    prompt = job.prompt
    if prompt is None:
        return None
    if isinstance(prompt, str) and job.options.prompt is not None and job.tokenizer.chat_template:
        prompt = [{"role": "user", "content": prompt}]
    was_training = job.model.training
    answer = chat.answer(job.model, job.tokenizer, prompt, max_new_tokens=_SAMPLE_TOKENS)
    job.model.train(was_training)
    return answer


def _save(job: Job, output: Path) -> tuple[Path | None, Path | None]:
    adapter, merged = output / "adapter", output / "merged"
    job.model.eval()
    if job.options.precision == "full":
        job.model.save_pretrained(merged)
        return None, merged
    job.model.save_pretrained(adapter)
    if not job.options.merge:
        return adapter, None
    job.model.save_pretrained_merged(merged, job.tokenizer, save_method="merged_16bit")
    return adapter, merged


def _report_start(job: Job, before: dict[str, Any], say: Say) -> None:
    count, total = job.model.get_nb_trainable_parameters()
    say(
        f"{len(job.train)} rows, {job.plan.steps} steps of "
        f"{job.options.batch_size * job.options.accumulation} rows, "
        f"{count:,} of {total:,} parameters trained, on {job.model.device}"
    )
    if before.get("sample") is not None:
        shown = job.prompt if isinstance(job.prompt, str) else job.prompt[-1]["content"]  # type: ignore[index]
        say(f"prompt: {shown}")
        say(f"answer before: {before['sample'].strip()}")


def _report_end(result: Result, chats: bool, say: Say) -> None:
    if result.sample_after is not None:
        say(f"answer after:  {result.sample_after.strip()}")
    if result.loss_before is not None and result.loss_after is not None:
        change = 100 * (result.loss_after / result.loss_before - 1)
        say(f"held-out loss: {result.loss_before:.3f} -> {result.loss_after:.3f} ({change:+.0f}%)")
    for name in ("adapter", "merged", "metrics", "picture"):
        place = getattr(result, name)
        if place is not None:
            say(f"{name + ':':<9} {place}")
    if result.merged is not None:
        command = "chat {}" if chats else "generate {} --raw --prompt TEXT"
        say(f"talk to it: purelm {command.format(result.merged)}")
