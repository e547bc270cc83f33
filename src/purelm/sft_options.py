"""What a fine-tuning run is told: one frozen value, checked before anything is loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from . import embedded, optimizers
from .errors import ArgumentError
from .rows import TooLong
from .training import ScheduleKind

Precision = Literal["4bit", "fp8", "16bit", "full"]


@dataclass(frozen=True, slots=True)
class Options:
    """One run; the command line's options have the same names.

    model: folder or hub id. data, eval_data: see `row_files`; without eval_data, `eval_fraction` of
    the rows is held out. precision: adapters on a base in 4 bits, fp8 or 16 bits, or all weights.
    compute: "fp8" for the products of a 4-bit or fp8 base in fp8. alpha: None is rank. dtype: what
    is computed in; None is float32 on a CPU and for "full", else bfloat16.
    label_smoothing, z_loss: see `nn.loss.next_token`; losses of held-out rows are without them.
    optimizer: see `optimizers.optimizer`. learning_rate: None is 2e-4, for "full" 2e-5. warmup:
    steps if at least 1, else a share of them.
    max_steps: None trains for `epochs`. *_every: in steps, 0 is never; a run evaluates before its
    first step and after its last one anyway. packing: a batch's rows run as one row without
    padding; None does so where that is fastest (`training.packs`). graph: steps are replayed from
    CUDA graphs; None does so where they can be (`graphed.uncapturable`). max_seq_length: None
    is the model's context, at most 2048. prompt: what is answered before and after; None takes the
    first held-out row's.
    """

    model: str
    data: str
    output: str = "purelm-sft"
    eval_data: str | None = None
    eval_fraction: float = 0.0
    precision: Precision = "4bit"
    compute: Literal["fp8"] | None = None
    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    target_modules: str | tuple[str, ...] | None = None
    use_rslora: bool = False
    dtype: str | None = None
    device: str | None = None
    max_seq_length: int | None = None
    too_long: TooLong = "error"
    packing: bool | None = None
    graph: bool | None = None
    batch_size: int = 2
    accumulation: int = 4
    optimizer: str = "adamw_torch_fused"
    learning_rate: float | None = None
    schedule: ScheduleKind = "cosine"
    warmup: float = 0.03
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    max_steps: int | None = None
    epochs: float = 1.0
    eval_every: int = 0
    save_every: int = 200
    recompute: bool | None = None
    resume: bool = False
    overwrite: bool = False
    seed: int = 3407
    prompt: str | None = None
    merge: bool = True

    @property
    def peak_rate(self) -> float:
        """The learning rate at its highest."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 2e-5 if self.precision == "full" else 2e-4

    @property
    def checkpointing(self) -> bool | str:
        """What `from_pretrained` calls use_gradient_checkpointing."""
        return "auto" if self.recompute is None else self.recompute

    def warmup_steps(self, steps: int) -> int:
        """How many of `steps` steps warm up."""
        return math.ceil(self.warmup * steps) if self.warmup < 1 else int(self.warmup)


def embedded_options() -> Options:
    """The run that needs nothing: the embedded model on its own instruction rows, on any CPU."""
    return Options(
        model=embedded.MODEL,
        data=str(embedded.train_rows()),
        eval_data=str(embedded.held_out_rows()),
        batch_size=8,
        accumulation=1,
        learning_rate=3e-3,
        epochs=1.5,
        eval_every=25,
        recompute=False,
    )


def check(options: Options) -> None:
    """Raise ArgumentError for a value that cannot be used, naming the option."""
    more_than_0 = ("rank", "batch_size", "accumulation", "epochs", "max_steps", "max_seq_length")
    for name in (*more_than_0, "learning_rate", "alpha"):
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            raise ArgumentError(f"{name} is {value!r}, expected more than 0")
    for name in (
        "warmup",
        "weight_decay",
        "max_grad_norm",
        "z_loss",
        "eval_every",
        "save_every",
        "seed",
    ):
        value = getattr(options, name)
        if not 0 <= value < math.inf:
            raise ArgumentError(f"{name} is {value!r}, expected 0 or more")
    for name in ("dropout", "eval_fraction", "label_smoothing"):
        value = getattr(options, name)
        if not 0 <= value < 1:
            raise ArgumentError(f"{name} is {value!r}, expected at least 0 and less than 1")
    choices: dict[str, tuple[Any, ...]] = {
        "precision": ("4bit", "fp8", "16bit", "full"),
        "compute": (None, "fp8"),
        "schedule": ("cosine", "linear", "constant"),
        "too_long": ("error", "truncate", "skip"),
        # Without a loss scale, gradients of float16 underflow.
        "dtype": (None, "float32", "bfloat16"),
    }
    for name, allowed in choices.items():
        if getattr(options, name) not in allowed:
            raise ArgumentError(f"{name} is {getattr(options, name)!r}, expected one of {allowed}")
    optimizers.check_name(options.optimizer)
    if options.eval_data is not None and options.eval_fraction:
        raise ArgumentError("eval_data and eval_fraction are both given; give one")
    if options.resume and options.overwrite:
        raise ArgumentError("resume goes on with a run and overwrite starts it anew; give one")
