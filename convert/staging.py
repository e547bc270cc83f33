"""Tensors from files onto a GPU: read in parallel into pinned buffers, copied as they fill."""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from .encoded import Encoded
from .gguf_file import GGUFTensor, read_tensor
from .safetensors_file import TensorInfo, opened, read, read_at

CHUNK = 16 * 2**20
THREADS = 8


@dataclass(frozen=True, slots=True)
class _Coming:
    """A tensor on its way: complete when all lanes are done and their streams waited for."""

    tensor: torch.Tensor
    lanes: list[Future[None]]


class Stager:
    """Reads tensors of a checkpoint onto `device`, through THREADS buffers of CHUNK bytes.

    On a CPU tensors are read into memory of their own. Used as a context manager.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._coming: dict[TensorInfo, _Coming] = {}
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

    def ahead(self, info: object) -> None:
        """Begin to read a tensor that `read` will be asked for soon; nothing on a CPU, or where it
        must be decoded."""
        if self.device.type == "cuda" and type(info) is TensorInfo and info not in self._coming:
            self._coming[info] = self._begin(info)

    def read(self, info: TensorInfo) -> torch.Tensor:
        """The tensor on the device, ready for the current stream. Raises CheckpointError."""
        if isinstance(info, GGUFTensor):
            return read_tensor(info).to(self.device)
        if isinstance(info, Encoded):
            return info.decode(*map(self.read, info.parts))
        if self.device.type != "cuda":
            return read(info).to(self.device)
        found = self._coming.pop(info, None) or self._begin(info)
        for lane in found.lanes:
            lane.result()
        current = torch.cuda.current_stream(self.device)
        for stream in self._streams[: len(found.lanes)]:
            current.wait_stream(stream)
        return found.tensor

    def _begin(self, info: TensorInfo) -> _Coming:
        out = torch.empty(info.shape, dtype=info.dtype, device=self.device)
        data = out.view(-1).view(torch.uint8)
        ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
        ready.record(torch.cuda.current_stream(self.device))

        def lane(which: int) -> None:
            """Every THREADS-th chunk through one buffer and one stream."""
            buffer, stream = self._buffers[which], self._streams[which]
            with opened(info) as file, torch.cuda.stream(stream):
                for begin in range(which * CHUNK, info.nbytes, THREADS * CHUNK):
                    size = min(CHUNK, info.nbytes - begin)
                    stream.synchronize()  # the buffer's last copy
                    read_at(file, info, begin, buffer[:size])
                    stream.wait_event(ready)  # what the memory was used for before
                    data[begin : begin + size].copy_(buffer[:size], non_blocking=True)

        count = min(THREADS, -(-info.nbytes // CHUNK))
        return _Coming(out, [self._lanes[which].submit(lane, which) for which in range(count)])
