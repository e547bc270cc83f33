"""Every kernel beside its ceiling and its peers: `purelm bench kernels`.

Each kernel is checked against its reference and then timed at the shapes of some models; one that
fails is refused: it gets no time, and the exit code is 1. The ceilings (a copy, a bf16 product)
are measured in the same run. With --output, kernels.csv keeps machine and versions, and
kernels.svg is the roofline.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from ..convert import atomic
from ..kernels import launch
from ..nn.graph import capture_stream
from ._kernel_case import SHAPES, Call, Case
from ._kernel_cases import KERNELS, cases
from ._kernel_peers import PEERS, installed
from ._kernel_time import Ceilings, Timing, ceilings, copies_for, timed
from ._roofline import Point, picture
from ._table import Row, versions, write_csv
from ._wait import finished

OURS = "purelm"
PACKAGES = ("triton", "bitsandbytes", "liger-kernel", "cut-cross-entropy", "unsloth")


def main(argv: list[str] | None = None) -> int:
    """Run the table and print it; 1 if a kernel was refused."""
    parser = argparse.ArgumentParser(prog="purelm bench kernels", description=__doc__)
    one = parser.add_argument
    one("--kernels", type=_names(KERNELS), help="of " + ",".join(KERNELS) + " (default: all)")
    one("--shapes", type=_names(SHAPES), help="of " + ",".join(SHAPES) + " (default: all but tiny)")
    one("--peers", type=_names([*PEERS, "none"]), help="(default: the installed, but for unsloth)")
    one("--output", type=Path, help="folder for kernels.csv and kernels.svg")
    one("--device", help="(default: cuda if there is one, else cpu, where the shape is tiny)")
    one("--no-first", action="store_true", help="without the time to a first result, which takes "
        "two processes a kernel")  # fmt: skip
    one("--first", choices=["all", "one"], help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    names = list(SHAPES)[:-1] if device.type == "cuda" else ["tiny"]
    shapes, kernels = args.shapes or names, args.kernels or list(KERNELS)
    if args.first:
        print(json.dumps(_first(kernels[0], shapes, device, one=args.first == "one")))
        return 0
    peers = installed() if args.peers is None else [p for p in args.peers if p != "none"]
    if device.type != "cuda":
        peers = []
    with _compiled_anew() if not args.no_first else contextlib.nullcontext():
        first = {} if args.no_first else _first_results(kernels, shapes, device)
        rows, ceiling = measure(kernels, shapes, peers, device)
        again = {} if args.no_first else _first_results(kernels, shapes, device, one=True)
    _print_first(first, again)
    if args.output is not None:
        _write(args.output, rows, ceiling, first, again)
    refused = [row for row in rows if row["refused"]]
    for row in refused:
        print(f"REFUSED {row['kernel']} {row['model']} {row['size']}: {row['refused']}")
    return 1 if refused else 0


def _names(known: Any) -> Any:
    def parsed(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in known:
                expected = ", ".join(known)
                raise argparse.ArgumentTypeError(f"{name!r}: expected some of {expected}")
        return names

    return parsed


def measure(
    kernels: Sequence[str], shapes: Sequence[str], peers: Sequence[str], device: torch.device
) -> tuple[list[Row], Ceilings]:
    """Check and time: a row for each call, also for each refused kernel."""
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    cuda = device.type == "cuda"
    rows: list[Row] = []
    with torch.cuda.device(device) if cuda else contextlib.nullcontext(), _one_stream(cuda):
        ceiling = ceilings(device)
        print(
            f"{machine}, torch {torch.__version__}: copy {ceiling.copy / 1e9:.0f} GB/s, "
            f"bf16 product {ceiling.gemm / 1e12:.1f} TFLOP/s",
            flush=True,
        )
        for kernel in kernels:
            for model in shapes:
                torch.manual_seed(0)
                for case in cases(kernel, model, device):
                    found = list(_measured(case, peers, device))
                    for row in found:
                        row |= {"family": kernel, "model": model, "machine": machine}
                        row |= _figures(row, case, ceiling)
                    rows += found
                    _print(found)
                    if cuda:
                        torch.cuda.empty_cache()
    return rows, ceiling


@contextlib.contextmanager
def _one_stream(cuda: bool) -> Iterator[None]:
    """The stream of captures for everything: a captured backward runs where its forward ran."""
    if not cuda:
        yield
        return
    with torch.cuda.stream(capture_stream(torch.cuda.current_device())):
        yield


def _measured(case: Case, peers: Sequence[str], device: torch.device) -> Iterator[Row]:
    """Rows of a case: ours, then the peers'; with a refused kernel its row alone."""
    row: Row = {"kernel": case.kernel, "size": case.size, "who": OURS, "refused": ""}
    try:
        inputs = [case.inputs()]
        case.check(*inputs[0])
        more = copies_for(case.moved) - 1 if device.type == "cuda" else 0
        inputs += [case.inputs() for _ in range(more)]
        timing = _timed(case.ours, inputs, device)
    except Exception as error:  # a kernel that raises is no better than one that is wrong
        yield {**row, "refused": " ".join(f"{type(error).__name__}: {error}".split())}
        return
    path = "triton" if launch.on_gpu(*inputs[0][0]) else "torch"
    yield row | {"path": path, "timing": timing}
    for peer in peers:
        try:
            for who, call in PEERS[peer](case).items():
                timing = _timed(call, inputs, device)
                yield row | {"who": who, "path": peer, "timing": timing}
        except Exception as error:
            text = " ".join(f"{type(error).__name__}: {error}".split())
            print(f"  {peer} failed at {case.kernel} {case.size}: {text[:200]}", flush=True)


def _timed(call: Call, inputs: Sequence[Any], device: torch.device) -> Timing:
    return timed(call.run, [call.prepare(*one) for one in inputs], device, call.graph)


def _figures(row: Row, case: Case, ceiling: Ceilings) -> Row:
    """Rates of a timed row and its share of what the ceilings allow."""
    timing: Timing | None = row.pop("timing", None)
    if timing is None:
        return {}
    seconds = timing.seconds
    return {
        "us": seconds * 1e6,
        "GB/s": case.moved / seconds / 1e9,
        "TFLOP/s": case.operations / seconds / 1e12,
        "of ceiling": ceiling.least(case.moved, case.operations) / seconds,
        "bound": "copy"
        if case.moved / ceiling.copy > case.operations / ceiling.gemm
        else "product",
        "intensity": case.operations / case.moved,
        "extra MiB": timing.extra / 2**20,
        "how": timing.how,
    }


def _print(rows: Sequence[Row]) -> None:
    ours = rows[0]
    head = f"{ours['kernel']:24} {ours['model']:11} {ours['size']:22}"
    if ours["refused"]:
        print(f"{head} REFUSED", flush=True)
        return
    rate = "GB/s" if ours["bound"] == "copy" else "TFLOP/s"
    line = f"{head} {ours['us']:10.1f} us {ours[rate]:8.1f} {rate:7} {ours['of ceiling']:5.0%}"
    for row in rows[1:]:
        line += f"  {row['who']} {row['us']:.1f} ({row['us'] / ours['us']:.2f}x)"
    print(line, flush=True)


def _write(
    folder: Path,
    rows: Sequence[Row],
    ceiling: Ceilings,
    first: dict[str, float],
    again: dict[str, float],
) -> None:
    """kernels.csv and kernels.svg in `folder`."""
    common = {
        "first s": "",
        "first again s": "",
        "copy GB/s": round(ceiling.copy / 1e9, 1),
        "product TFLOP/s": round(ceiling.gemm / 1e12, 2),
        "versions": f"torch={torch.__version__} {versions(PACKAGES)}".strip(),
    }
    fields = ["kernel", "model", "size", "who", "us", "GB/s", "TFLOP/s", "of ceiling", "bound"]
    fields += ["extra MiB", "how", "path", "refused", "machine", *common]
    kept = []
    for row in rows:
        some = {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in row.items()}
        if row["who"] == OURS and row["family"] in first:
            some["first s"] = round(first[row["family"]], 2)
            some["first again s"] = round(again[row["family"]], 2)
        kept.append(common | some)
    write_csv(folder / "kernels.csv", kept, fields)
    points = [
        Point(
            row["family"],
            f"{row['who']}: {row['kernel']} {row['size']}, {row['us']:.1f} us",
            row["intensity"],
            row["TFLOP/s"] * 1e12,
            row["who"] == OURS,
        )
        for row in rows
        if not row["refused"]
    ]
    if points:
        title = f"Kernels on one {rows[0]['machine']}"
        with atomic.file(folder / "kernels.svg") as new:
            new.write_text(picture(points, ceiling.copy, ceiling.gemm, title))


# The time to a first result: a fresh process a kernel, with nothing compiled and then again.


def _first(kernel: str, shapes: Sequence[str], device: torch.device, *, one: bool) -> float:
    """Seconds from a ready torch to the first result, the making of its inputs included; then,
    unless it is to be `one`, every case runs once, so that what they compile is there for the next
    process. NaN of a kernel without a case."""
    if device.type == "cuda":
        torch.zeros(1, device=device)
    found = 0.0
    for model in shapes:
        for case in cases(kernel, model, device):
            begun = time.perf_counter()
            case.ours.run(*case.ours.prepare(*case.inputs()))
            finished(device.type == "cuda")
            found = found or time.perf_counter() - begun
            if one:
                return found
    return found or float("nan")


def _first_results(
    kernels: Sequence[str], shapes: Sequence[str], device: torch.device, *, one: bool = False
) -> dict[str, float]:
    def run(kernel: str) -> float:
        command = [sys.executable, "-m", "purelm.bench.kernels", "--kernels", kernel]
        command += ["--first", "one" if one else "all"]
        command += ["--shapes", ",".join(shapes), "--device", str(device)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"first result of {kernel}: {done.stderr.strip().splitlines()[-1:]}")
            return float("nan")
        return float(json.loads(done.stdout.splitlines()[-1]))

    with ThreadPoolExecutor(max(1, min(8, (os.cpu_count() or 2) // 2))) as pool:
        return dict(zip(kernels, pool.map(run, kernels), strict=True))


@contextlib.contextmanager
def _compiled_anew() -> Iterator[None]:
    """An empty cache of compiled kernels for this process and those it starts."""
    before = os.environ.get("TRITON_CACHE_DIR")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ["TRITON_CACHE_DIR"]
            else:
                os.environ["TRITON_CACHE_DIR"] = before


def _print_first(first: dict[str, float], again: dict[str, float]) -> None:
    for kernel, seconds in first.items():
        print(f"first result of {kernel}: {seconds:.2f} s, compiled before {again[kernel]:.2f} s")


if __name__ == "__main__":
    sys.exit(main())
