"""Loading in this process: `python -m purelm.bench.load MODEL`.

Prints one line, `RESULT {json}`: seconds to import and to load into NF4, the finished model's
device memory and its peak while loading, and how far the process's own memory grew. Files should
be in the page cache: run it twice.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from ._wait import finished

GIB = 2**30


def main(argv: list[str] | None = None) -> int:
    """Run the measurement and print it."""
    parser = argparse.ArgumentParser(prog="purelm bench load", description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--16bit", dest="in_16bit", action="store_true", help="no quantization")
    args = parser.parse_args(argv)
    print("RESULT " + json.dumps(measure(args)), flush=True)
    return 0


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The figures of one run, as a flat dict."""
    start = time.perf_counter()
    import torch

    torch_s = time.perf_counter() - start
    from purelm import FastLanguageModel

    import_s = time.perf_counter() - start - torch_s
    cuda = torch.cuda.is_available()
    if cuda:
        torch.zeros(1, device="cuda")  # its context is not part of loading
    before = _own_bytes()
    start = time.perf_counter()
    model, _ = FastLanguageModel.from_pretrained(
        args.model,
        dtype=torch.bfloat16,
        load_in_4bit=not args.in_16bit,
        load_in_16bit=args.in_16bit,
        local_files_only=True,
    )
    finished(cuda)
    seconds = time.perf_counter() - start
    result: dict[str, Any] = {
        "model": Path(args.model).name,
        "parameters": model.num_parameters(),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "import_torch_s": round(torch_s, 2),
        "import_s": round(import_s, 2),
        "load_s": round(seconds, 2),
        "host_growth_gib": round((_own_bytes() - before) / GIB, 3),
    }
    if cuda:
        result["model_gib"] = round(torch.cuda.memory_allocated() / GIB, 3)
        result["peak_over_model_gib"] = round(
            (torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()) / GIB, 3
        )
    return result


def _own_bytes() -> int:
    """What the process holds beside mapped files (anonymous memory); 0 where not on Linux."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


if __name__ == "__main__":
    sys.exit(main())
