"""How long a call takes on a device: medians over cold memory, short ones under a CUDA graph.

Inputs rotate through more copies than the L2 cache holds, and the cache is flushed before each
measurement, so that figures are of memory. A busy wait before each lets the host get ahead.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from ..nn.graph import capture

# Of inputs that rotate; the largest L2 cache (B200's) has half of it.
ROTATED = 256e6
# Copies of inputs at most, and calls longer than this need no graph.
COPIES, LONG = 64, 2e-3
# Of the busy wait: a graph's launch needs little, a call's Python and launches more.
GRAPH_CYCLES, CALL_CYCLES = 400_000, 6_000_000


class Timing(NamedTuple):
    """Seconds of a call, how it was timed, and bytes it needed at most beside its inputs."""

    seconds: float
    how: str
    extra: int


def copies_for(moved: float) -> int:
    """How many sets of inputs of `moved` bytes to rotate through."""
    return max(1, min(COPIES, math.ceil(ROTATED / moved)))


def timed(
    run: Callable[..., Any], sets: Sequence[Sequence[Any]], device: torch.device, graph: bool
) -> Timing:
    """The median time of run(*set) over the sets."""
    if device.type != "cuda":
        run(*sets[0])
        begun = time.perf_counter()
        run(*sets[0])
        return Timing(time.perf_counter() - begun, "host", 0)
    run(*sets[0])  # compiles
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run(*sets[-1])
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before
    once = _median(lambda: run(*sets[0]), 3, CALL_CYCLES)
    if graph and once < LONG:
        # Its results are kept, so that outputs rotate too.
        replay = capture(lambda: [run(*one) for one in sets], device)
        if replay is not None:
            return Timing(_median(replay, 15, GRAPH_CYCLES) / len(sets), "graph", extra)
    turns = max(5, min(20, int(0.1 / once)))
    places = iter(range(turns))
    seconds = _median(lambda: run(*sets[next(places) % len(sets)]), turns, CALL_CYCLES)
    return Timing(seconds, "events", extra)


def _median(call: Callable[[], Any], turns: int, cycles: int) -> float:
    cuda: Any = torch.cuda  # whose annotations are not strict
    flush = torch.empty(int(ROTATED) // 4, dtype=torch.int32, device="cuda")
    spans = []
    for _ in range(turns):
        start, stop = (cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        cuda._sleep(cycles)
        start.record()
        call()
        stop.record()
        spans.append((start, stop))
    torch.cuda.synchronize()
    milliseconds = [float(start.elapsed_time(stop)) for start, stop in spans]
    return statistics.median(milliseconds) / 1e3


class Ceilings(NamedTuple):
    """What the device reached in this run: bytes a second of a copy (read and written), operations
    a second of a bf16 product."""

    copy: float
    gemm: float

    def least(self, moved: float, operations: float) -> float:
        """Seconds that nothing can fall below."""
        return max(moved / self.copy, operations / self.gemm)


def ceilings(device: torch.device) -> Ceilings:
    """A copy of 1 GiB and a product of Llama-8B's gate and up for 16,384 tokens; small on a CPU."""
    cuda = device.type == "cuda"
    x = torch.empty(1 << (30 if cuda else 22), dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    copied = timed(y.copy_, [(x,)], device, False).seconds
    moved = 2 * x.numel()
    del x, y
    m, n, k = (16384, 28672, 4096) if cuda else (128, 128, 128)
    a, b = (torch.randn(i, k, device=device).to(torch.bfloat16) for i in (m, n))
    product = timed(lambda: a @ b.t(), [()], device, False).seconds
    return Ceilings(moved / copied, 2 * m * n * k / product)
