"""One QLoRA training measurement in this process: `python -m purelm.bench.train MODEL BATCH SEQ`.

Prints one line, `RESULT {json}`: seconds to import and to load, the median step after warm-up,
tokens per second, peak memory and the first losses.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from ._wait import finished

GIB = 2**30
_CHECKPOINTING: dict[str, bool | str] = {
    "unsloth": "unsloth",
    "on": True,
    "off": False,
    "auto": "auto",
}


def main(argv: list[str] | None = None) -> int:
    """Run one measurement and print it."""
    parser = argparse.ArgumentParser(prog="purelm bench train", description=__doc__)
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
    args = parser.parse_args(argv)
    print("RESULT " + json.dumps(measure(args)), flush=True)
    return 0


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The figures of one run, as a flat dict."""
    start = time.perf_counter()
    import torch

    torch_s = time.perf_counter() - start
    from purelm import FastLanguageModel
    from purelm.graphed import GraphedStep

    result: dict[str, Any] = {
        "peer": "purelm",
        "model": Path(args.model).name,
        "batch": args.batch,
        "seq": args.seq,
        "rank": args.rank,
        "gradient_checkpointing": args.gradient_checkpointing,
        "optimizer": args.optimizer,
        "compute": args.compute,
        "graph": args.graph,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "import_torch_s": round(torch_s, 2),
        "import_s": round(time.perf_counter() - start - torch_s, 2),
    }
    cuda = torch.cuda.is_available()
    start = time.perf_counter()
    model, _ = FastLanguageModel.from_pretrained(
        args.model,
        max_seq_length=args.seq,
        dtype=torch.bfloat16,
        local_files_only=True,
        use_gradient_checkpointing=_CHECKPOINTING[args.gradient_checkpointing],
        compute=args.compute,
        memory_budget=None if args.budget_gib is None else int(args.budget_gib * GIB),
    )
    finished(cuda)
    result["load_s"] = round(time.perf_counter() - start, 2)
    if cuda:
        result["load_gib"] = round(torch.cuda.memory_allocated() / GIB, 3)
        result["load_peak_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 3)
    model = FastLanguageModel.get_peft_model(
        model,
        r=args.rank,
        lora_alpha=args.rank,
        use_gradient_checkpointing=_CHECKPOINTING[args.gradient_checkpointing],
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    result["trainable"] = sum(p.numel() for p in trained)
    optimizer = _optimizer(args.optimizer, trained, args.learning_rate, cuda)
    generator = torch.Generator(model.device).manual_seed(1)
    high = min(128000, model.spec.vocab)
    batches = [
        torch.randint(0, high, (args.batch, args.seq), device=model.device, generator=generator)
        for _ in range(2)
    ]
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    losses, seconds = [], []
    graphed = GraphedStep(model) if args.graph else None

    def step(i: int) -> None:
        finished(cuda)
        begun = time.perf_counter()
        ids = batches[i % 2]
        if graphed is not None:
            loss = graphed(ids, ids)
        else:
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        finished(cuda)
        seconds.append(time.perf_counter() - begun)
        losses.append(round(loss.item(), 4))

    for i in range(args.warmup + args.steps):
        step(i)
    median = statistics.median(seconds[args.warmup :])
    result["first_step_s"] = round(seconds[0], 2)
    result["step_ms"] = round(median * 1e3, 1)
    result["tok_s"] = round(args.batch * args.seq / median)
    if cuda:
        result["peak_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 3)
        result["reserved_gib"] = round(torch.cuda.max_memory_reserved() / GIB, 3)
    if model.plans:
        plan = next(iter(model.plans.values()))
        result["planned_gib"], result["plan"] = round(plan.peak / GIB, 3), str(plan)
    result["losses"] = [*losses[:3], *losses[-2:]]
    if args.trace:
        _trace(lambda: step(0), args.trace)
    return result


def _optimizer(name: str, trained: list[Any], learning_rate: float, cuda: bool) -> Any:
    import torch

    if name == "adamw8bit":
        from bitsandbytes import optim

        return optim.AdamW8bit(trained, lr=learning_rate)
    return torch.optim.AdamW(trained, lr=learning_rate, fused=cuda)


def _trace(step: Any, path: Path) -> None:
    """Where one step's time goes: kernels by total time, and a Chrome trace."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        step()
    table = found.key_averages().table(sort_by="self_cuda_time_total", row_limit=45)
    path.write_text(table)


if __name__ == "__main__":
    sys.exit(main())
