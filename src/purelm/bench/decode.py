"""One generation measurement in this process: `python -m purelm.bench.decode MODEL BATCH`.

Prints one line a batch, `RESULT {json}`: tokens per second over a whole answer, milliseconds of a
further token, time to the first, peak memory, and the share that reading every weight once a token
and the keys and values of the middle token at 3 TB/s would take. `--beside` measures other
libraries too, every one in a process of its own and in turn; it prints a table and writes
decode.csv.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from . import _peers
from ._beside import all_of
from ._table import table, write_csv
from ._wait import finished

GIB = 2**30
OURS = "purelm"
COLUMNS = (
    "peer", "batch", "tok_s", "token_ms", "first_token_ms", "roofline", "peak_gib", "error",
)  # fmt: skip
BYTES_PER_SECOND = 3e12


def main(argv: list[str] | None = None) -> int:
    """Run one measurement a batch, or those of each library, and print them."""
    parser = argparse.ArgumentParser(
        prog="purelm bench decode", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("model")
    parser.add_argument("batch", type=int, nargs="+", help="one measurement for each")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rank", type=int, default=0, help="wear adapters of this rank")
    parser.add_argument("--bits", choices=["4", "16"], default="4")
    parser.add_argument("--peer", choices=[OURS, *_peers.GENERATING], default=OURS)
    parser.add_argument("--beside", nargs="+", choices=_peers.GENERATING, help="other libraries")
    parser.add_argument("--timeout", type=float, default=900, help="seconds for each library")
    parser.add_argument("--output", type=Path, default=Path(), help="folder of decode.csv")
    args = parser.parse_args(argv)
    if args.new < 2:
        parser.error("--new: at least 2")
    if args.beside:
        return _beside(sys.argv[1:] if argv is None else argv, args)
    for result in measure(args):
        print("RESULT " + json.dumps(result), flush=True)
    return 0


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The figures of every batch, as flat dicts."""
    model = _ours(args) if args.peer == OURS else _theirs(args)
    return [_measured(model, batch, args) for batch in args.batch]


def _beside(argv: list[str], args: argparse.Namespace) -> int:
    """Ours, then the others; 1 where one failed."""
    rows = all_of("decode", argv, OURS, args.beside, args.timeout)
    floor = {r["batch"]: r["roofline"] * r["token_ms"] for r in rows if "roofline" in r}
    for row in rows:
        if row.get("batch") in floor:
            row["roofline"] = round(floor[row["batch"]] / row["token_ms"], 3)
    print(table(rows, COLUMNS))
    write_csv(args.output / "decode.csv", rows)
    return int(any("error" in row for row in rows))


def _ours(args: argparse.Namespace) -> Any:
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
    return model


def _theirs(args: argparse.Namespace) -> Any:
    _peers.bring(args.peer)
    length = args.prompt + args.new
    model = _peers.load(args.peer, args.model, length)
    if args.rank:
        model = _peers.adapted(args.peer, model, args.rank, length)
    return _peers.for_generation(args.peer, model)


def _measured(model: Any, batch: int, args: argparse.Namespace) -> dict[str, Any]:
    import torch

    cuda = model.device.type == "cuda"
    generator = torch.Generator(model.device).manual_seed(1)
    high = min(128000, model.config.vocab_size)
    ids = torch.randint(0, high, (batch, args.prompt), device=model.device, generator=generator)

    def never_ending(new: int) -> dict[str, Any]:
        if args.peer == OURS:
            return {"eos_token_id": []}
        return {"min_new_tokens": new, "pad_token_id": 0, "use_cache": True}

    def seconds(new: int) -> float:
        finished(cuda)
        begun = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                do_sample=False,
                **never_ending(new),
            )
        finished(cuda)
        return time.perf_counter() - begun

    seconds(min(args.new, 16))  # compiles what has to be
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    first = statistics.median(seconds(1) for _ in range(args.repeats))
    whole = statistics.median(seconds(args.new) for _ in range(args.repeats))
    each = (whole - first) / (args.new - 1)
    result: dict[str, Any] = {
        "peer": args.peer,
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
    }
    if args.peer == OURS:
        read = _weight_bytes(model) + _cache_bytes(model, batch, args.prompt + args.new // 2)
        result["roofline"] = round(read / BYTES_PER_SECOND / each, 3)
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
