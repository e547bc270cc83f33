"""Loading a model, beside other libraries: `purelm bench load MODEL`.

Each library loads the model into NF4 in a process of its own, with the files in the page cache.
What is measured: seconds to import it beyond torch, seconds to load, the finished model's device
memory, how far the peak while loading was above it, and how far the process's own memory (without
mapped files) grew at most while loading and stayed grown. With --output, load.csv keeps machine and
versions.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from importlib import util
from pathlib import Path

from ..errors import ArgumentError
from ._beside import Failed, results
from ._table import Row, versions, write_csv

WHO = ("purelm", "hf", "unsloth")
_NEEDS = {"hf": ("transformers", "bitsandbytes"), "unsloth": ("unsloth",)}
_FIGURES = {
    "import_s": "import s",
    "load_s": "load s",
    "model_gib": "model GiB",
    "peak_over_model_gib": "peak over it GiB",
    "host_peak_gib": "host peak GiB",
    "host_growth_gib": "host stays GiB",
}
_PACKAGES = ("torch", "transformers", "bitsandbytes", "unsloth", "safetensors")


def main(argv: list[str] | None = None) -> int:
    """Run the table and print it; 1 if a library failed."""
    parser = argparse.ArgumentParser(prog="purelm bench load", description=__doc__)
    one = parser.add_argument
    one("model", help="folder of a checkpoint with a tokenizer")
    one("--who", type=_names, help=f"of {','.join(WHO)} (default: the installed, but for unsloth)")
    one("--16bit", dest="in_16bit", action="store_true", help="no quantization")
    one("--repeats", type=_number, default=3, help="processes of each library, whose median counts")
    one("--output", type=Path, help="folder for load.csv")
    one("--timeout", type=_number, default=600, help="seconds that one process may take")
    args = parser.parse_args(argv)
    if not Path(args.model).is_dir():
        raise ArgumentError(f"{args.model} is no folder: loading is measured without a network")
    size = _into_page_cache(Path(args.model))
    rows, failed = [], False
    for who in args.who or _installed():
        # What a library writes into the folder that it runs in is there for its next run only.
        with tempfile.TemporaryDirectory() as cwd:
            # The first process may compile bytecode and fill caches: if there are more, it is none.
            runs = args.repeats + (args.repeats > 1)
            found: list[Row] = []
            while len(found) < runs and (not found or "failed" not in found[-1]):
                found.append(_apart(who, args, cwd))
        if "failed" in found[-1]:
            print(f"{who} failed: {found[-1]['failed']}", flush=True)
            failed = True
            continue
        rows.append(_median(found[-args.repeats :]) | {"read_gb": round(size / 1e9, 3)})
        print("RESULT " + json.dumps(rows[-1]), flush=True)
    _print(rows)
    if args.output is not None and rows:
        _write(args.output, rows)
    return int(failed)


def _names(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in WHO:
            raise argparse.ArgumentTypeError(f"{name!r}: expected some of {', '.join(WHO)}")
    return names


def _number(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a positive integer")
    return int(text)


def _installed() -> list[str]:
    """Who runs unasked. Importing Unsloth changes other libraries and may ask the network."""
    return [
        who
        for who in WHO[:-1]
        if all(util.find_spec(package) is not None for package in _NEEDS.get(who, ()))
    ]


def _into_page_cache(folder: Path) -> int:
    """Read every shard once; returns their bytes."""
    total, buffer = 0, bytearray(16 << 20)
    for path in folder.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                total += count
    return total


def _apart(who: str, args: argparse.Namespace, cwd: str) -> Row:
    """One library's figures from a process of its own, or why it has none."""
    options = ["--16bit"] if args.in_16bit else []
    asked = [who, str(Path(args.model).resolve()), *options]
    try:
        return results("_load_one", asked, args.timeout, cwd)[-1]
    except Failed as problem:
        return {"failed": str(problem)}


def _median(found: Sequence[Row]) -> Row:
    """The middle of each figure over runs of one library."""
    return {
        name: round(statistics.median(run[name] for run in found), 3)
        if isinstance(value, float)
        else value
        for name, value in found[0].items()
    } | {"repeats": len(found)}


def _print(rows: Sequence[Row]) -> None:
    if not rows:
        return
    shown = [name for name in _FIGURES if name in rows[0]]
    print(f"{'':10}" + "".join(f"{_FIGURES[name]:>18}" for name in shown))
    for row in rows:
        print(f"{row['who']:10}" + "".join(f"{row[name]:18.3f}" for name in shown), flush=True)


def _write(folder: Path, rows: Sequence[Row]) -> None:
    fields = ["who", "model", "precision", *(name for name in _FIGURES if name in rows[0])]
    fields += ["import_torch_s", "parameters", "read_gb", "repeats", "device", "versions"]
    installed = {"versions": versions(_PACKAGES)}
    write_csv(folder / "load.csv", [row | installed for row in rows], fields)


if __name__ == "__main__":
    sys.exit(main())
