"""Tensors from files onto a GPU: read in parallel into pinned buffers, copied as they fill."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from .bnb_file import Packed
from .encoded import Encoded
from .gguf_file import GGUFTensor, read_tensor
from .safetensors_file import TensorInfo, opened, read, read_at

CHUNK = 8 * 2**20
THREADS = 16
# What may be on its way, of the GPU's memory, beside the tensor that is worked on.
AHEAD = 256 * 2**20


@dataclass(frozen=True, slots=True)
class _Coming:
    """A tensor on its way: complete when all lanes are done and their last copies waited for."""

    tensor: torch.Tensor
    lanes: list[Future[torch.cuda.Event]]


class Stager:
    """Reads tensors of a checkpoint onto `device`, through THREADS buffers of CHUNK bytes.

    On a CPU tensors are read into memory of their own. Used as a context manager.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._coming: dict[TensorInfo, _Coming] = {}
        self._planned: deque[TensorInfo] = deque()
        self._first = 0
        if device.type == "cuda":
            # One thread a buffer: what it is given runs in turn, so no two tensors share it.
            self._lanes = [ThreadPoolExecutor(1) for _ in range(THREADS)]
            self._streams = [torch.cuda.Stream(device) for _ in range(THREADS)]  # type: ignore[no-untyped-call]
            pinned = torch.empty(THREADS, CHUNK, dtype=torch.uint8, pin_memory=True)
            self._buffers = list(pinned.unbind())

    def __enter__(self) -> "Stager":
        return self

    def __exit__(self, *problem: object) -> None:
        if self.device.type == "cuda":
            for lane in self._lanes:
                lane.shutdown(cancel_futures=True)
            # The buffers must not be freed, nor a half-copied tensor used, before copies are done.
            torch.cuda.synchronize(self.device)
            self._coming.clear()

    def plan(self, infos: Iterable[Any]) -> None:
        """What `read` will be asked for, in order; it is read ahead, AHEAD bytes of it at a time.

        Nothing is on a CPU, nor what a GGUF file holds.
        """
        if self.device.type == "cuda":
            self._planned.extend(dict.fromkeys(part for info in infos for part in _plain(info)))
            self._begin_more()

    def _begin_more(self) -> None:
        busy = sum(coming.tensor.nbytes for coming in self._coming.values())
        while self._planned and (busy < AHEAD or not self._coming):
            info = self._planned.popleft()
            busy += info.nbytes
            self._coming[info] = self._begin(info)

    def read(self, info: TensorInfo) -> torch.Tensor:
        """The tensor on the device, ready for the current stream. Raises CheckpointError."""
        if isinstance(info, GGUFTensor):
            return read_tensor(info).to(self.device)
        if isinstance(info, Encoded):
            return info.decode(*map(self.read, info.parts))
        if self.device.type != "cuda":
            return read(info).to(self.device)
        found = self._coming.pop(info, None)
        if found is None:
            if info in self._planned:
                self._planned.remove(info)
            found = self._begin(info)
        # The next are read while this one is waited for, and while it is quantized.
        self._begin_more()
        current = torch.cuda.current_stream(self.device)
        for lane in found.lanes:
            current.wait_event(lane.result())
        return found.tensor

    def _begin(self, info: TensorInfo) -> _Coming:
        out = torch.empty(info.shape, dtype=info.dtype, device=self.device)
        data = out.view(-1).view(torch.uint8)
        ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
        ready.record(torch.cuda.current_stream(self.device))

        def lane(which: int, start: int) -> torch.cuda.Event:
            """Every THREADS-th chunk from one on through one buffer and one stream."""
            buffer, stream = self._buffers[which], self._streams[which]
            with opened(info) as file, torch.cuda.stream(stream):
                for begin in range(start * CHUNK, info.nbytes, THREADS * CHUNK):
                    size = min(CHUNK, info.nbytes - begin)
                    stream.synchronize()  # the buffer's last copy
                    read_at(file, info, begin, buffer[:size])
                    stream.wait_event(ready)  # what the memory was used for before
                    data[begin : begin + size].copy_(buffer[:size], non_blocking=True)
                copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
                copied.record(stream)
            return copied

        count = min(THREADS, -(-info.nbytes // CHUNK))
        # Small tensors that follow one another take different lanes.
        lanes = [(self._first + start) % THREADS for start in range(count)]
        self._first = (self._first + count) % THREADS
        begun = [self._lanes[which].submit(lane, which, i) for i, which in enumerate(lanes)]
        return _Coming(out, begun)


def _plain(info: Any) -> Iterator[TensorInfo]:
    """The stored tensors that reading `info` reads; none where it is not known."""
    if isinstance(info, Encoded):
        yield from info.parts
    elif isinstance(info, Packed):
        yield from (info.codes, info.absmax)
        if info.absmax_scale is not None:
            yield info.absmax_scale
    elif type(info) is TensorInfo:
        yield info
