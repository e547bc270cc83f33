"""A step of work on a GPU, captured once and replayed without the host."""

import logging
from collections.abc import Callable

import torch

_logger = logging.getLogger("purelm.graph")


def replayable(device: torch.device) -> bool:
    """Can `capture` be asked for on `device`?"""
    return device.type == "cuda"


def capture(step: Callable[[], None], device: torch.device) -> Callable[[], None] | None:
    """A function that does on `device` what `step` does, as one CUDA graph; None, with a warning in
    the log, where it cannot be captured, such as where `step` asks the device for a value.

    `step` must have run before (kernels compile, constants are copied) and change nothing but
    tensors that live longer than it. Nothing runs while it is captured.
    """
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    here = torch.cuda.current_stream(device)
    stream.wait_stream(here)
    with torch.cuda.stream(stream):  # makes `device` the current one too
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            step()
        except RuntimeError as problem:
            _abandon(graph)
            _logger.warning("a step runs without a CUDA graph, more slowly: %s", problem)
            return None
        except BaseException:
            _abandon(graph)
            raise
        graph.capture_end()
    here.wait_stream(stream)

    def replay() -> None:
        with torch.cuda.device(device):  # a graph runs on the current device's stream
            graph.replay()

    return replay


def _abandon(graph: torch.cuda.CUDAGraph) -> None:
    """End a capture that failed; it reports again what made it fail."""
    try:
        graph.capture_end()
    except RuntimeError:
        pass
