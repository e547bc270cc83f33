"""QLoRA training steps: `python -m purelm.bench.train MODEL BATCH SEQ`.

Prints one line, `RESULT {json}`: seconds to import and to load, the median step after warm-up,
tokens per second, peak memory, the first losses, operations a second and what a step's time goes
to. `--beside` measures other libraries too, every one in a process of its own and in turn, on the
same rows; it prints a table and writes train.csv and train.svg.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ..convert import atomic
from . import _peers
from ._bars import stacked
from ._beside import all_of
from ._breakdown import breakdown, operations
from ._table import table, write_csv
from ._wait import finished

GIB = 2**30
OURS = "purelm"
COLUMNS = (
    "peer", "tok_s", "step_ms", "peak_gib", "reserved_gib", "model_tflops", "hardware_tflops",
    "import_s", "load_s", "first_step_s", "losses", "error",
)  # fmt: skip
_CHECKPOINTING: dict[str, bool | str] = {
    "unsloth": "unsloth",
    "on": True,
    "off": False,
    "auto": "auto",
}


def main(argv: list[str] | None = None) -> int:
    """Run one measurement, or one of each library, and print it."""
    parser = argparse.ArgumentParser(
        prog="purelm bench train", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("model")
    parser.add_argument("batch", type=int)
    parser.add_argument("seq", type=int)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--gradient-checkpointing", choices=[*_CHECKPOINTING], default="unsloth")
    parser.add_argument("--budget-gib", type=float, help="memory_budget, for auto")
    parser.add_argument("--graph", action="store_true", help="forward and backward as a CUDA graph")
    parser.add_argument("--compute", choices=["fp8"], help="products of frozen weights in fp8")
    parser.add_argument("--optimizer", choices=["adamw8bit", "adamw"], default="adamw8bit")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--trace", type=Path, help="write a profile of one step here")
    parser.add_argument("--peer", choices=[OURS, *_peers.TRAINED], default=OURS)
    parser.add_argument("--beside", nargs="+", choices=_peers.TRAINED, help="other libraries")
    parser.add_argument("--timeout", type=float, default=900, help="seconds for each library")
    parser.add_argument("--output", type=Path, default=Path(), help="folder of train.csv and .svg")
    args = parser.parse_args(argv)
    if args.beside:
        return _beside(sys.argv[1:] if argv is None else argv, args)
    print("RESULT " + json.dumps(measure(args)), flush=True)
    return 0


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The figures of one run, as a flat dict."""
    start = time.perf_counter()
    import torch

    cuda = torch.cuda.is_available()
    result: dict[str, Any] = {
        "peer": args.peer,
        "model": Path(args.model).name,
        "batch": args.batch,
        "seq": args.seq,
        "rank": args.rank,
        "optimizer": args.optimizer,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "torch": torch.__version__,
        "import_torch_s": round(time.perf_counter() - start, 2),
    }
    model, backward = (_ours if args.peer == OURS else _theirs)(args, result)
    trained = [p for p in model.parameters() if p.requires_grad]
    result["trainable"] = sum(p.numel() for p in trained)
    optimizer = _optimizer(args, model, trained, cuda)
    device = trained[0].device
    generator = torch.Generator(device).manual_seed(1)
    high = min(128000, model.config.vocab_size)
    batches = [
        torch.randint(0, high, (args.batch, args.seq), device=device, generator=generator)
        for _ in range(2)
    ]
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    losses, seconds = [], []

    def step(i: int) -> None:
        loss = backward(batches[i % 2])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        finished(cuda)
        losses.append(round(loss.item(), 4))

    for i in range(args.warmup + args.steps):
        finished(cuda)
        begun = time.perf_counter()
        step(i)
        seconds.append(time.perf_counter() - begun)
    median = statistics.median(seconds[args.warmup :])
    result["first_step_s"] = round(seconds[0], 2)
    result["step_ms"] = round(median * 1e3, 1)
    result["tok_s"] = round(args.batch * args.seq / median)
    if cuda:
        result["peak_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 3)
        result["reserved_gib"] = round(torch.cuda.max_memory_reserved() / GIB, 3)
    result["losses"] = [*losses[:3], *losses[-2:]]
    if not args.graph:  # a replayed graph calls nothing that could be counted
        count = partial(operations, lambda: step(0))
        _note(result, "hardware_tflops", lambda: round(count() / median / 1e12, 1))
    if cuda:
        _note(result, "breakdown_ms", lambda: breakdown(lambda: step(1), median))
    if "model_tflop" in result:
        result["model_tflops"] = round(result["model_tflop"] / median, 1)
    if args.trace:
        _trace(lambda: step(0), args.trace)
    return result


def _note(result: dict[str, Any], name: str, measure: Callable[[], Any]) -> None:
    """A further figure, whose failure costs none of those before it."""
    try:
        result[name] = measure()
    except Exception as problem:
        result[f"{name}_error"] = f"{type(problem).__name__}: {problem}"


Backward = Callable[[Any], Any]  # ids -> loss, the gradients accumulated


def _ours(args: argparse.Namespace, result: dict[str, Any]) -> tuple[Any, Backward]:
    start = time.perf_counter()
    import torch

    from purelm import FastLanguageModel
    from purelm.graphed import GraphedStep

    result |= {
        "gradient_checkpointing": args.gradient_checkpointing,
        "compute": args.compute,
        "graph": args.graph,
        "import_s": round(time.perf_counter() - start, 2),
    }
    checkpointing = _CHECKPOINTING[args.gradient_checkpointing]
    start = time.perf_counter()
    model, _ = FastLanguageModel.from_pretrained(
        args.model,
        max_seq_length=args.seq,
        dtype=torch.bfloat16,
        local_files_only=True,
        use_gradient_checkpointing=checkpointing,
        compute=args.compute,
        memory_budget=None if args.budget_gib is None else int(args.budget_gib * GIB),
    )
    _loaded(result, start)
    model = FastLanguageModel.get_peft_model(
        model, r=args.rank, lora_alpha=args.rank, use_gradient_checkpointing=checkpointing
    ).train()
    result["model_tflop"] = _model_operations(model, args.batch, args.seq) / 1e12
    graphed = GraphedStep(model) if args.graph else None

    def backward(ids: Any) -> Any:
        if graphed is not None:
            return graphed(ids, ids)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        if model.plans and "plan" not in result:
            plan = next(iter(model.plans.values()))
            result["planned_gib"], result["plan"] = round(plan.peak / GIB, 3), str(plan)
        return loss

    return model, backward


def _theirs(args: argparse.Namespace, result: dict[str, Any]) -> tuple[Any, Backward]:
    start = time.perf_counter()
    _peers.bring(args.peer)
    import torch

    result["import_s"] = round(time.perf_counter() - start, 2)
    start = time.perf_counter()
    model = _peers.load(args.peer, args.model, args.seq)
    _loaded(result, start)
    model = _peers.adapted(args.peer, model, args.rank, args.seq)

    def backward(ids: Any) -> Any:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss

    return model, backward


def _loaded(result: dict[str, Any], start: float) -> None:
    import torch

    cuda = torch.cuda.is_available()
    finished(cuda)
    result["load_s"] = round(time.perf_counter() - start, 2)
    if cuda:
        result["load_gib"] = round(torch.cuda.memory_allocated() / GIB, 3)
        result["load_peak_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 3)


def _model_operations(model: Any, batch: int, seq: int) -> float:
    """Of one step over frozen weights with nothing run again: products forward and to their
    inputs, causal attention's two products forward and five backward. Adapters are left out."""
    from purelm.nn import tree

    table = model.params["embed"]["weight"] if "weight" in model.params.get("head", {}) else None
    matrices = (w for w in tree.leaves(model.params) if len(w.shape) == 2 and w is not table)
    weights: int = sum(w.numel() for w in matrices)
    widths: int = sum(a.widths[0] + a.heads * a.value_dim for a in model.spec.attentions())
    return (4.0 * weights + 3.5 * widths * seq) * batch * seq


def _beside(argv: list[str], args: argparse.Namespace) -> int:
    """Ours, then the others; 1 where one failed."""
    rows = all_of("train", argv, OURS, args.beside, args.timeout)
    tflop = rows[0].get("model_tflop")
    for row in rows:
        if tflop and "step_ms" in row:
            row["model_tflops"] = round(tflop / row["step_ms"] * 1e3, 1)
    print(table(rows, COLUMNS))
    write_csv(args.output / "train.csv", rows)
    parts = {
        f"{row['peer']} {row['step_ms']:.0f} ms": row["breakdown_ms"]
        for row in rows
        if "breakdown_ms" in row
    }
    if parts:
        title = f"{rows[0]['model']}, {args.batch} x {args.seq}, {rows[0]['device']}: one step"
        with atomic.file(args.output / "train.svg") as new:
            new.write_text(stacked(parts, title, "ms"))
    return int(any("error" in row for row in rows))


def _optimizer(args: argparse.Namespace, model: Any, trained: list[Any], cuda: bool) -> Any:
    import torch

    if args.peer == OURS:
        from purelm.optimizers import optimizer

        name = {"adamw8bit": "adamw_8bit", "adamw": "adamw_torch_fused"}[args.optimizer]
        return optimizer(model, name, lr=args.learning_rate)
    if args.optimizer == "adamw8bit":
        from bitsandbytes import optim

        return optim.AdamW8bit(trained, lr=args.learning_rate)
    return torch.optim.AdamW(trained, lr=args.learning_rate, fused=cuda)


def _trace(step: Any, path: Path) -> None:
    """Where one step's time goes: kernels by total time, and a Chrome trace."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        step()
    table = found.key_averages().table(sort_by="self_cuda_time_total", row_limit=45)
    path.write_text(table)


if __name__ == "__main__":
    sys.exit(main())
