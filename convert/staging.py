"""Tensors from files onto a GPU: read in parallel into pinned buffers, copied as they fill."""

import os
from concurrent.futures import ThreadPoolExecutor

import torch

from .encoded import Encoded
from .gguf_file import GGUFTensor, read_tensor
from .safetensors_file import TensorInfo, opened, read, read_at

CHUNK = 16 * 2**20
THREADS = 4


class Stager:
    """Reads tensors of a checkpoint onto `device`, through THREADS buffers of CHUNK bytes.

    On a CPU tensors are read into memory of their own. Used as a context manager.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            self._pool = ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1))
            self._streams = [torch.cuda.Stream(device) for _ in range(THREADS)]  # type: ignore[no-untyped-call]
            pinned = torch.empty(THREADS, CHUNK, dtype=torch.uint8, pin_memory=True)
            self._buffers = list(pinned.unbind())

    def __enter__(self) -> "Stager":
        return self

    def __exit__(self, *problem: object) -> None:
        if self.device.type == "cuda":
            self._pool.shutdown(cancel_futures=True)
            # The buffers must not be freed, nor a half-copied tensor used, before copies are done.
            torch.cuda.synchronize(self.device)

    def read(self, info: TensorInfo) -> torch.Tensor:
        """The tensor on the device, ready for the current stream. Raises CheckpointError."""
        if isinstance(info, GGUFTensor):
            return read_tensor(info).to(self.device)
        if isinstance(info, Encoded):
            return info.decode(*map(self.read, info.parts))
        if self.device.type != "cuda":
            return read(info).to(self.device)
        out = torch.empty(info.shape, dtype=info.dtype, device=self.device)
        data = out.view(-1).view(torch.uint8)
        current = torch.cuda.current_stream(self.device)
        for stream in self._streams:
            stream.wait_stream(current)

        def lane(which: int) -> None:
            """Every THREADS-th chunk through one buffer and one stream."""
            buffer, stream = self._buffers[which], self._streams[which]
            with opened(info) as file, torch.cuda.stream(stream):
                for begin in range(which * CHUNK, info.nbytes, THREADS * CHUNK):
                    size = min(CHUNK, info.nbytes - begin)
                    stream.synchronize()  # the buffer's last copy
                    read_at(file, info, begin, buffer[:size])
                    data[begin : begin + size].copy_(buffer[:size], non_blocking=True)

        lanes = min(THREADS, -(-info.nbytes // CHUNK))
        for done in [self._pool.submit(lane, which) for which in range(lanes)]:
            done.result()
        for stream in self._streams[:lanes]:
            current.wait_stream(stream)
        return out
