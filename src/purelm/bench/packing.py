"""Rows of real length, padded and packed: `python -m purelm.bench.packing MODEL LENGTHS`.

Each way (padded, packed, on a GPU packed and replayed from graphs) trains the same batches of the
same rows from the same adapters in this process. Prints one line, `RESULT {json}`: real tokens per
second, step times, peak memory, first losses.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

GIB = 2**30


def main(argv: list[str] | None = None) -> int:
    """Run the measurement and print it."""
    parser = argparse.ArgumentParser(prog="purelm bench packing", description=__doc__)
    parser.add_argument("model")
    parser.add_argument("lengths", type=Path, help="a JSON list: tokens of each row")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument(
        "--gradient-checkpointing", choices=["unsloth", "auto"], default="auto",
        help="unsloth sends residuals to the host, which no graph can",
    )  # fmt: skip
    args = parser.parse_args(argv)
    print("RESULT " + json.dumps(measure(args)), flush=True)
    return 0


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The figures of one run, as a flat dict."""
    import torch

    from purelm import FastLanguageModel, optimizers, training
    from purelm.graphed_training import graphs_for
    from purelm.rows import Row

    model, _ = FastLanguageModel.from_pretrained(
        args.model, dtype=torch.bfloat16, local_files_only=True
    )
    model = FastLanguageModel.get_peft_model(
        model, r=16, use_gradient_checkpointing=args.gradient_checkpointing
    ).train()
    cuda = model.device.type == "cuda"
    generator = torch.Generator().manual_seed(1)
    rows = []
    for length in json.loads(args.lengths.read_text()):
        ids = tuple(torch.randint(0, model.spec.vocab, (length,), generator=generator).tolist())
        rows.append(Row(ids, ids))
    plan = training.plan_steps(len(rows), args.batch, 1, max_steps=None, epochs=1, seed=0)
    count = args.warmup + args.steps
    result: dict[str, Any] = {
        "model": Path(args.model).name,
        "batch": args.batch,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
    }
    begun = {name: p.detach().clone() for name, p in training.trained(model).items()}
    ways = {"padded": (False, False), "packed": (True, False), "graphed": (True, True)}
    if not cuda or args.gradient_checkpointing == "unsloth":
        del ways["graphed"]
    for name, (packing, graph) in ways.items():
        with torch.no_grad():
            for key, p in training.trained(model).items():
                p.copy_(begun[key])
        optimizer = optimizers.optimizer(model, weight_decay=0.0)
        graphs = graphs_for(
            model, optimizer, 1.0, packing=packing, asked=None if graph else False, say=print
        )
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds, tokens, losses = [], [], []
        for step in range(count):
            window = [[rows[i] for i in some] for some in training.batches(plan, step)]
            start = time.perf_counter()
            found = training.train_step(
                model,
                optimizer,
                window,
                step=step,
                rate=2e-4,
                max_grad_norm=1.0,
                pad_id=0,
                packing=packing,
                graphs=graphs,
            )
            seconds.append(time.perf_counter() - start)  # the step reads its loss back
            tokens.append(found.tokens)
            losses.append(round(found.loss, 4))
        rates = [n / s for n, s in zip(tokens, seconds, strict=True)][args.warmup :]
        result[f"{name}_tok_s"] = round(statistics.median(rates))
        result[f"{name}_step_ms"] = round(statistics.median(seconds[args.warmup :]) * 1e3, 1)
        result[f"{name}_all_ms"] = [round(s * 1e3) for s in seconds]
        result[f"{name}_losses"] = losses[:3]
        if cuda:
            result[f"{name}_peak_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 3)
    for name in list(ways)[1:]:
        result[f"{name}_speedup"] = round(result[f"{name}_tok_s"] / result["padded_tok_s"], 2)
    return result


if __name__ == "__main__":
    sys.exit(main())
