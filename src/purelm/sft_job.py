"""A fine-tuning run made ready: rows read and encoded, model loaded and adapted, steps planned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from tqdm import tqdm

from . import rows, train_state, training
from .convert.arguments import choose_device
from .convert.bridge import CausalLM
from .convert.lora_config import DEFAULT_TARGETS
from .convert.pretrained import FastLanguageModel
from .convert.tokenizer import Tokenizer
from .errors import ArgumentError
from .optimizers import optimizer
from .row_files import RawRow, read_rows
from .rows import Row
from .sft_options import Options

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Job:
    """A run that is ready to train."""

    options: Options
    model: CausalLM
    tokenizer: Tokenizer
    train: tuple[Row, ...]
    held_out: tuple[Row, ...]
    prompt: str | list[dict[str, Any]] | None
    plan: training.Plan
    schedule: training.Schedule
    optimizer: torch.optim.Optimizer
    identity: dict[str, Any]

    @property
    def packing(self) -> bool:
        """Whether rows run packed."""
        asked = self.options.packing
        return training.packs(self.model) if asked is None else asked

    @property
    def pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return 0 if pad is None else int(pad)


def prepare(options: Options, say: Say) -> Job:
    """Everything up to the first step; raises what reading, loading and adapting raise."""
    raw = read_rows(options.data)
    held_out_raw: Sequence[RawRow] = []
    if options.eval_data is not None:
        held_out_raw = read_rows(options.eval_data)
    elif options.eval_fraction:
        raw, held_out_raw = rows.split(raw, options.eval_fraction, options.seed)
    model, tokenizer = _load(options)
    limit = _limit(options, model)
    train, held_out = (
        rows.encode(
            tqdm(some, desc="encoding", unit="row", disable=None, leave=False),
            tokenizer,
            max_length=limit,
            too_long=options.too_long,
        )
        if some
        else rows.Rows(())
        for some in (raw, held_out_raw)
    )
    for name, some in (("training", train), ("held-out", held_out)):
        if some.skipped or some.truncated:
            say(
                f"{name} rows longer than {limit} tokens: {some.skipped} left out, "
                f"{some.truncated} cut"
            )
    base = train_state.fingerprint(model)
    model = _adapted(options, model)
    plan = training.plan_steps(
        len(train.rows),
        options.batch_size,
        options.accumulation,
        max_steps=options.max_steps,
        epochs=options.epochs,
        seed=options.seed,
    )
    schedule = training.Schedule(
        options.schedule, options.peak_rate, options.warmup_steps(plan.steps), plan.steps
    )
    return Job(
        options,
        model,
        tokenizer,
        train.rows,
        held_out.rows,
        options.prompt if options.prompt is not None else _first_prompt(held_out_raw),
        plan,
        schedule,
        optimizer(model, options.optimizer, weight_decay=options.weight_decay),
        _identity(options, model, base, train.rows, plan),
    )


def _load(options: Options) -> tuple[CausalLM, Tokenizer]:
    device = choose_device(options.device or "sequential")
    dtype = options.dtype
    if dtype is None and (device.type == "cpu" or options.precision == "full"):
        dtype = "float32"
    precision: dict[str, Any] = {
        "4bit": {"load_in_4bit": True},
        "fp8": {"load_in_fp8": True},
        "16bit": {"load_in_16bit": True},
        "full": {"full_finetuning": True},
    }[options.precision]
    return FastLanguageModel.from_pretrained(
        options.model,
        max_seq_length=options.max_seq_length,
        dtype=dtype,
        device_map=str(device),
        random_state=options.seed,
        use_gradient_checkpointing=options.checkpointing,
        compute=options.compute,
        **precision,
    )


def _adapted(options: Options, model: CausalLM) -> CausalLM:
    if options.precision == "full":
        return model.for_training(options.checkpointing)
    targets = DEFAULT_TARGETS if options.target_modules is None else options.target_modules
    return FastLanguageModel.get_peft_model(
        model,
        r=options.rank,
        lora_alpha=options.rank if options.alpha is None else options.alpha,
        lora_dropout=options.dropout,
        target_modules=targets,
        use_rslora=options.use_rslora,
        use_gradient_checkpointing=options.checkpointing,
        random_state=options.seed,
    )


def _limit(options: Options, model: CausalLM) -> int:
    context = model.spec.max_positions
    if options.max_seq_length is None:
        return min(2048, context)
    if options.max_seq_length > context:
        raise ArgumentError(
            f"max_seq_length is {options.max_seq_length}, the model's context is {context} tokens"
        )
    return options.max_seq_length


def _identity(
    options: Options, model: CausalLM, base: str, train: Sequence[Row], plan: training.Plan
) -> dict[str, Any]:
    """Everything that a resumed run must have in common with the run that it continues."""
    free = (
        *("model", "data", "output", "eval_data", "eval_fraction", "eval_every", "save_every"),
        *("device", "dtype", "max_seq_length", "too_long", "packing", "graph"),
        *("recompute", "learning_rate"),
        *("resume", "overwrite", "prompt", "merge", "max_steps", "epochs"),
    )
    kept = {f.name: getattr(options, f.name) for f in fields(options) if f.name not in free}
    # Under a constant rate nothing depends on where the run ends, so it may be made longer.
    open_end = options.schedule == "constant" and (options.warmup == 0 or options.warmup >= 1)
    end = {} if open_end else {"steps": plan.steps}
    return {
        "model": base,
        "data": rows.digest(train),
        "dtype": str(model.dtype),
        "learning_rate": options.peak_rate,
        **kept,
        **end,
    }


def _first_prompt(held_out: Sequence[RawRow]) -> str | list[dict[str, Any]] | None:
    """What comes before the first held-out row's first answer; None if it is plain text."""
    if not held_out:
        return None
    value = held_out[0].value
    if "messages" in value:
        messages: list[dict[str, Any]] = value["messages"]
        first = next((i for i, m in enumerate(messages) if m["role"] == "assistant"), 0)
        return messages[:first] or None
    prompt = value.get("prompt")
    return prompt if isinstance(prompt, str) else None
