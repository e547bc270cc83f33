"""Work on a GPU, captured once and replayed without the host."""

import functools
import logging
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

_logger = logging.getLogger("purelm.graph")

# Of a process, one capture at a time: what torch asks.
_capturing = threading.Lock()
# Graphs that broke: torch goes on asking each whose memory an allocation is.
_broken: list[torch.cuda.CUDAGraph] = []

T = TypeVar("T")


def replayable(device: torch.device) -> bool:
    """Can `capture` be asked for on `device`?"""
    return device.type == "cuda"


class Pool:
    """Memory for what steps make on the way, which graphs share that need nothing of one another
    but what is still held when the next of them is captured.
    """

    def __init__(self) -> None:
        self.handle: Any = torch.cuda.graph_pool_handle()


@dataclass(frozen=True, slots=True)
class Graph(Generic[T]):
    """A captured step; a call replays it and gives `result`.

    result: what the step returned when it was captured, whose tensors each replay overwrites.
    Replays of two graphs must follow one another, as they do on one stream: what libraries work in
    is theirs together.
    """

    result: T
    device: torch.device
    _graph: torch.cuda.CUDAGraph

    def __call__(self) -> T:
        with torch.cuda.device(self.device):  # a graph runs on the current device's stream
            self._graph.replay()
        return self.result


def capture(
    step: Callable[[], T], device: torch.device, *, pool: Pool | None = None
) -> Graph[T] | None:
    """`step` on `device` as one CUDA graph; None, with a warning in the log, where it cannot be
    captured, such as where `step` asks the device for a value.

    Nothing is computed yet: `step` runs, and its kernels are noted with the addresses they read and
    write. So it must have run before (kernels compile, constants are copied), and what it reads and
    changes must live as long as the graph, which keeps none of it: new inputs are copied into the
    tensors that it was captured with. What `step` makes on the way lies in `pool`; None: in memory
    of its own. Draws of the device's default generator go on from replay to replay; another
    generator cannot be captured. `step` may run autograd's backward, of a forward in `step` or on
    `capture_stream`: a backward runs where its forward ran.
    """
    graph, pool = torch.cuda.CUDAGraph(), Pool() if pool is None else pool
    here = torch.cuda.current_stream(device)
    with _capturing:
        stream = capture_stream(here.device_index)
        stream.wait_stream(here)
        torch.cuda.empty_cache()  # none of it can be given back while a capture is under way
        with torch.cuda.stream(stream):  # makes `device` the current one too
            graph.capture_begin(pool.handle, capture_error_mode="thread_local")
            try:
                result = step()
            except RuntimeError as problem:
                _abandon(graph, pool, here.device_index)
                _logger.warning("a step runs without a CUDA graph, more slowly: %s", problem)
                return None
            except BaseException:
                _abandon(graph, pool, here.device_index)
                raise
            graph.capture_end()
        here.wait_stream(stream)
    return Graph(result, device, graph)


@functools.cache
def capture_stream(index: int) -> torch.cuda.Stream:
    """The stream of a device's captures: libraries set aside memory for each that they see."""
    return torch.cuda.Stream(index)  # type: ignore[no-untyped-call]


def _abandon(graph: torch.cuda.CUDAGraph, pool: Pool, index: int) -> None:
    """End a capture that failed.

    One that the driver holds for broken is not ended by torch: the allocator would go on taking the
    capture's pool, and never give memory back, and the generator would refuse to draw.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a graph that is empty
        try:
            graph.capture_end()
            return
        except RuntimeError:
            _broken.append(graph)
        try:
            torch._C._cuda_endAllocateToPool(index, pool.handle)
            torch._C._cuda_releasePool(index, pool.handle)
        except RuntimeError as problem:
            _logger.warning("memory of the step may stay occupied: %s", problem)
        pool.handle = torch.cuda.graph_pool_handle()
        # The end of a capture that succeeds is the generator's too.
        again = torch.cuda.CUDAGraph()
        again.capture_begin(capture_error_mode="thread_local")
        again.capture_end()
