"""Check and time the grouped products of experts on a CUDA machine.

    python tests/kernels/gpu_grouped.py [--sweep] [--tiny]

128 experts of Qwen3-30B-A3B's shape (2048 wide, 768 inside, 8 a token), beside dequantizing all of
them and `torch._grouped_mm`. Checks come first: each product against its float64 reference under
the rule of tests/oracles.py. A table goes to stdout and, with OUT set, to $OUT/grouped.csv.
`--sweep` times other cuts of the launches; `--tiny` runs the whole on the CPU, under the
interpreter, with tiny shapes.
"""

from __future__ import annotations

import csv
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1] / "src")]
TINY, SWEEP = "--tiny" in sys.argv, "--sweep" in sys.argv
# Beside `--warm i n`, only every n-th launch is made: processes that compile side by side.
WARM = (
    [int(n) for n in sys.argv[sys.argv.index("--warm") + 1 :][:2]] if "--warm" in sys.argv else []
)
if TINY:
    import shim

    shim.install()

import torch  # noqa: E402
from oracles import assert_rows  # noqa: E402

from purelm.kernels import grouped, grouped_dense_launch, grouped_nf4_launch, launch, nf4  # noqa: E402
from purelm.kernels.grouped_tiles import Config  # noqa: E402

DEVICE = "cpu" if TINY else "cuda"
EXPERTS, ACTIVE, WIDE, NARROW = (4, 2, 128, 64) if TINY else (128, 8, 2048, 768)
TOKENS = (3,) if TINY else (16384, 2048, 32, 8, 1)
BF16 = torch.bfloat16
table: list[dict[str, Any]] = []

NF4_CUTS = {
    "large": [
        Config(128, 128, 64, 4, 3),
        Config(128, 128, 64, 4, 4),
        Config(64, 64, 64, 4, 3),
        Config(64, 128, 64, 4, 3),
    ],
    "small": [Config(16, 64, 128, 4, 3), Config(16, 64, 64, 4, 4), Config(32, 64, 64, 4, 3)],
}
DENSE_CUTS = [Config(128, 256, 64, 8, 3), Config(128, 256, 64, 8, 4), Config(128, 128, 64, 8, 3)]


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE).to(BF16)


def routed(tokens: int) -> torch.Tensor:
    """Offsets [x + 1] of tokens that choose at random."""
    chosen = torch.rand(tokens, EXPERTS, device=DEVICE).topk(ACTIVE, -1).indices
    return grouped.offsets_of(chosen.flatten().sort().values, EXPERTS)


def stack(outputs: int, width: int, groups: int = EXPERTS) -> list[Any]:
    """Double-quantized 4-bit matrices, each quantized alone, and stacked."""
    made = []
    for _ in range(groups):
        packed, absmax = nf4.quantize(randn(outputs, width) * 0.02)
        made.append((packed, *nf4.quantize_absmax(absmax)))
    return [torch.stack(column) for column in zip(*made, strict=True)]


def timed(f: Callable[[], Any]) -> tuple[float, float]:
    """(median ms of a call inside a replayed graph, MiB allocated beyond what it returns)."""
    if TINY:
        f()
        return 0.0, 0.0
    made = f()
    kept = made.numel() * made.element_size() if isinstance(made, torch.Tensor) else 0
    del made
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    f()
    torch.cuda.synchronize()
    extra = (torch.cuda.max_memory_allocated() - before - kept) / 2**20
    begin = time.perf_counter()
    f()
    torch.cuda.synchronize()
    calls = max(1, min(20, int(2e-3 / (time.perf_counter() - begin))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            f()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(12)]
    for mark in marks:
        graph.replay()
        mark.record()
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) / calls for a, b in zip(marks, marks[1:], strict=False)]
    return statistics.median(times[1:]), extra


def peer(x: torch.Tensor, parts: list[Any], at: torch.Tensor, shape: Any, turned: bool) -> Any:
    absmax = grouped._block_absmax(*parts[1:]).view(-1)
    count = EXPERTS * shape[0] * shape[1]
    dense = nf4.dequantize(parts[0].view(-1), absmax, None, None, count, 64).view(EXPERTS, *shape)
    return torch._grouped_mm(x, dense if turned else dense.mT, offs=at[1:])


def variants(sizes: tuple[int, ...]) -> Iterator[tuple[dict[str, Any], Callable[[], Any]]]:
    """(what it is, the call) of everything timed."""
    for outputs, width in ((NARROW, WIDE), (WIDE, NARROW)):
        shape = (outputs, width)
        parts = stack(outputs, width)
        for tokens, turned in ((t, turned) for t in sizes for turned in (False, True)):
            if turned and 32 >= tokens > 3:
                continue
            at = routed(tokens)
            x = randn(tokens * ACTIVE, outputs if turned else width)
            what = {"tokens": tokens, "shape": f"{width}->{outputs}", "turned": turned}
            ours = partial(grouped.matmul_nf4, x, *parts, at, shape, 64, turned=turned)
            yield {**what, "how": "ours"}, ours
            if not TINY:
                other = partial(peer, x, parts, at, shape, turned)
                yield {**what, "how": "dequantize + torch._grouped_mm"}, other
            if SWEEP:
                yield from cuts(what, ours, x, at, shape)
    for tokens in (t for t in sizes if t >= 2048 or TINY):
        at = routed(tokens)
        for left, right in ((16, WIDE), (NARROW, 16)):
            dy, x = randn(tokens * ACTIVE, left), randn(tokens * ACTIVE, right)
            what = {"tokens": tokens, "shape": f"{left}x{right}", "turned": ""}
            yield {**what, "how": "outer"}, partial(grouped.outer, dy, x, at)
        for outputs, width in ((16, WIDE), (NARROW, 16)):
            x, w = randn(tokens * ACTIVE, width), randn(EXPERTS, outputs, width)
            what = {"tokens": tokens, "shape": f"{width}->{outputs}", "turned": False}
            yield {**what, "how": "low rank"}, partial(grouped.matmul, x, w, at)


def cuts(
    what: dict[str, Any], ours: Callable[[], Any], x: Any, at: Any, shape: tuple[int, int]
) -> Iterator[tuple[dict[str, Any], Callable[[], Any]]]:
    """The same product cut otherwise, in parts or not, and in 16 bits."""
    tokens, turned = what["tokens"], what["turned"]
    packed = swapped(grouped, "PACKED_ROWS", 1 << 30, ours)
    for cut in NF4_CUTS["small" if tokens <= 32 else "large"]:
        call = swapped(grouped_nf4_launch, "nf4_config", lambda *_, cut=cut: cut, packed)
        yield {**what, "how": f"packed {tuple(cut)}"}, call
    if tokens < 2048 and not TINY:
        return
    for parts in (2,) if TINY else (4, 6, 8):
        some = swapped(grouped, "PARTS", parts, swapped(grouped, "PACKED_ROWS", 0, ours))
        yield {**what, "how": f"in {parts} parts"}, some
    dense = randn(EXPERTS, *shape)
    for cut in DENSE_CUTS:
        call = partial(grouped.matmul, x, dense.mT if turned else dense, at)
        call = swapped(grouped_dense_launch, "dense_config", lambda *_, cut=cut: cut, call)
        yield {**what, "how": f"16 bits {tuple(cut)}"}, call
    if not TINY:
        call = partial(torch._grouped_mm, x, dense if turned else dense.mT, offs=at[1:])
        yield {**what, "how": "torch._grouped_mm alone"}, call


def swapped(module: Any, name: str, value: Any, f: Callable[[], Any]) -> Callable[[], Any]:
    """`f` with another value in its module."""

    def call() -> Any:
        before = getattr(module, name)
        setattr(module, name, value)
        try:
            return f()
        finally:
            setattr(module, name, before)

    return call


def checks() -> None:
    """Every product against float64, eager the loop of products in bf16."""
    for tokens in (2,) if TINY else (1, 40, 700):
        at = routed(tokens)
        rows = tokens * ACTIVE
        for outputs, width in ((NARROW, WIDE), (WIDE, NARROW)):
            parts, shape = stack(outputs, width), (outputs, width)
            for turned in (False, True):
                x = randn(rows, outputs if turned else width)
                low, b = randn(rows, 16), randn(EXPERTS, width if turned else outputs, 16)
                ours = grouped.matmul_nf4(x, *parts, at, shape, 64, "nf4", low, b, turned=turned)
                w = in_bf16(parts, shape)
                w = w if turned else w.mT
                near(ours, x, w.mT, at, low, b)
                near(grouped.matmul(x, w.mT, at, low, b), x, w.mT, at, low, b)
            dy, x = randn(rows, outputs), randn(rows, width)
            made = grouped.outer(dy, x, at)
            for i, own in grouped._slices(at):
                exact = dy[own].double().mT @ x[own].double()
                assert_rows(made[i].cpu(), (dy[own].mT @ x[own]).cpu(), exact.cpu())
            used = {i for i, _ in grouped._slices(at)}
            assert not any(bool(made[i].any()) for i in range(EXPERTS) if i not in used)
        print(f"checked {tokens} tokens", flush=True)
    in_parts_is_packed()


def in_parts_is_packed() -> None:
    """Dequantizing in parts gives what the packed product gives, but for the order of sums."""
    tokens = 3 if TINY else 100
    at = routed(tokens)
    parts, shape = stack(NARROW, WIDE), (NARROW, WIDE)
    for turned in (False, True):
        x = randn(tokens * ACTIVE, NARROW if turned else WIDE)
        low, b = randn(len(x), 16), randn(EXPERTS, WIDE if turned else NARROW, 16)
        ours = partial(grouped.matmul_nf4, x, *parts, at, shape, 64, "nf4", low, b, turned=turned)
        w = in_bf16(parts, shape)
        near(swapped(grouped, "PACKED_ROWS", 0, ours)(), x, w.mT if turned else w, at, low, b)
    print("checked in parts", flush=True)


def in_bf16(parts: list[Any], shape: tuple[int, int]) -> torch.Tensor:
    each = [[p[i] for p in parts] for i in range(EXPERTS)]
    count = shape[0] * shape[1]
    return torch.stack([nf4.dequantize(*p, count, 64, BF16).view(shape) for p in each])


def near(ours: Any, x: Any, w: Any, at: Any, low: Any, b: Any) -> None:
    eager, exact = torch.zeros_like(ours), torch.zeros_like(ours, dtype=torch.float64)
    for i, own in grouped._slices(at):
        eager[own] = x[own] @ w[i].mT + low[own] @ b[i].mT
        exact[own] = x[own].double() @ w[i].double().mT + low[own].double() @ b[i].double().mT
    assert_rows(ours.cpu(), eager.cpu(), exact.cpu())


def warm() -> None:
    here, count = WARM
    for i, (_, call) in enumerate(variants(TOKENS)):
        if i % count == here:
            with_care(call)


def with_care(f: Callable[[], Any]) -> Any:
    """What f returns, or the error: a cut may want more than there is."""
    try:
        return f()
    except Exception as problem:
        return problem


def main() -> None:
    torch.manual_seed(0)
    if WARM:
        return warm()
    if SWEEP and not TINY:
        begin = time.perf_counter()
        jobs = [
            subprocess.Popen(
                [sys.executable, __file__, *sys.argv[1:], "--warm", str(i), "12"],
                stdout=subprocess.DEVNULL,
            )
            for i in range(12)
        ]
        checks()
        for job in jobs:
            job.wait(timeout=120)
        print(f"compiled after {time.perf_counter() - begin:.0f} s", flush=True)
    else:
        checks()
    for what, call in variants(TOKENS):
        found = with_care(lambda call=call: timed(call))
        ms, extra = found if isinstance(found, tuple) else (float("nan"), float("nan"))
        table.append({**what, "us": round(ms * 1e3, 1), "extra_MiB": round(extra, 1)})
        note = "" if isinstance(found, tuple) else f" {found!r:.200}"
        print(*table[-1].values(), note, sep="  ", flush=True)
    if folder := os.environ.get("OUT"):
        with open(Path(folder) / "grouped.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, table[0].keys())
            writer.writeheader()
            writer.writerows(table)
    if not TINY:
        print(torch.cuda.get_device_name(), torch.__version__)


if __name__ == "__main__":
    if TINY:
        with launch.interpreting():
            main()
    else:
        main()
