"""One generation measurement in this process: `python -m purelm.bench.decode MODEL BATCH`.

Prints one line, `RESULT {json}`: tokens per second over a whole answer, milliseconds of a further
token, time to the first, peak memory, and the share that reading every weight once a token and the
keys and values of the middle token at 3 TB/s would take.
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
BYTES_PER_SECOND = 3e12


def main(argv: list[str] | None = None) -> int:
    """Run one measurement and print it."""
    parser = argparse.ArgumentParser(prog="purelm bench decode", description=__doc__)
    parser.add_argument("model")
    parser.add_argument("batch", type=int, nargs="+", help="one measurement for each")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rank", type=int, default=0, help="wear adapters of this rank")
    parser.add_argument("--bits", choices=["4", "16"], default="4")
    args = parser.parse_args(argv)
    if args.new < 2:
        parser.error("--new: at least 2")
    for result in measure(args):
        print("RESULT " + json.dumps(result), flush=True)
    return 0


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The figures of every batch, as flat dicts."""
    import torch

    from purelm import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(
        args.model,
        max_seq_length=args.prompt + args.new,
        dtype=torch.bfloat16,
        load_in_4bit=args.bits == "4",
        local_files_only=True,
    )
    if args.rank:
        model = FastLanguageModel.get_peft_model(model, r=args.rank, lora_alpha=args.rank)
    return [_measured(model, batch, args) for batch in args.batch]


def _measured(model: Any, batch: int, args: argparse.Namespace) -> dict[str, Any]:
    import torch

    cuda = model.device.type == "cuda"
    generator = torch.Generator(model.device).manual_seed(1)
    high = min(128000, model.spec.vocab)
    ids = torch.randint(0, high, (batch, args.prompt), device=model.device, generator=generator)

    def seconds(new: int) -> float:
        finished(cuda)
        begun = time.perf_counter()
        model.generate(
            ids, torch.ones_like(ids), max_new_tokens=new, do_sample=False, eos_token_id=[]
        )
        finished(cuda)
        return time.perf_counter() - begun

    seconds(min(args.new, 16))  # compiles what has to be
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    first = statistics.median(seconds(1) for _ in range(args.repeats))
    whole = statistics.median(seconds(args.new) for _ in range(args.repeats))
    each = (whole - first) / (args.new - 1)
    read = _weight_bytes(model) + _cache_bytes(model, batch, args.prompt + args.new // 2)
    result: dict[str, Any] = {
        "peer": "purelm",
        "model": Path(args.model).name,
        "batch": batch,
        "prompt": args.prompt,
        "new": args.new,
        "rank": args.rank,
        "bits": args.bits,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "torch": torch.__version__,
        "tok_s": round(batch * args.new / whole, 1),
        "token_ms": round(each * 1e3, 3),
        "first_token_ms": round(first * 1e3, 1),
        "roofline": round(read / BYTES_PER_SECOND / each, 3),
    }
    if cuda:
        result["peak_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 3)
    return result


def _weight_bytes(model: Any) -> int:
    """What a token reads of the weights: all but the table of embeddings, if the head has its
    own."""
    from purelm.nn import tree

    params = model.params
    total = sum(t.numel() * t.element_size() for t in tree.tensors(params))
    if "weight" in params.get("head", {}):
        table = params["embed"]["weight"]
        total -= table.numel() * table.element_size()
    return total


def _cache_bytes(model: Any, batch: int, length: int) -> int:
    size = model.params["embed"]["weight"].element_size()
    pairs = (pair for attention in model.spec.attentions() for pair in attention.cached)
    return int(batch * length * sum(heads * width for heads, width in pairs) * size)


if __name__ == "__main__":
    sys.exit(main())
