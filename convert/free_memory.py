"""How much memory can still be taken, and what is said where loading needs more."""

import os
import sys
from collections.abc import Callable
from typing import TypeVar

import torch

from ..errors import LoadMemoryError
from ..nn import tree
from ..nn.params import param_specs
from ..nn.plan import GIB
from ..nn.spec import ModelSpec

# Bytes a weight of what quantizers make, statistics included; of others what is computed in.
_QUANTIZED = {"nf4": 0.52, "int8": 1.01, "fp8": 1.01}

T = TypeVar("T")


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be taken on a device: on the host what is free, or less where the
    process may not grow so far.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if not hasattr(os, "sysconf") or "SC_AVPHYS_PAGES" not in os.sysconf_names:
        return 4 * GIB
    page = os.sysconf("SC_PAGE_SIZE")
    return min(os.sysconf("SC_AVPHYS_PAGES") * page, _growth(page))


def _growth(page: int) -> int:
    """How much more address space the process may have."""
    if sys.platform != "linux":
        return sys.maxsize
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return sys.maxsize
    with open("/proc/self/statm") as file:
        return max(0, limit - int(file.read().split()[0]) * page)


def loading(
    read: Callable[[], T],
    spec: ModelSpec,
    quantize: str | None,
    dtype: torch.dtype,
    device: torch.device,
) -> T:
    """`read()`, which makes the params of `spec`; LoadMemoryError where memory runs out."""
    try:
        return read()
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as problem:
        words = str(problem).splitlines()[0]
        if not _ran_out(problem):
            raise
    # Raised out here, where it does not hold on to what was read so far.
    wanted = _bytes(spec, quantize, dtype)
    raise LoadMemoryError(
        f"memory ran out while weights were read: they are about {wanted:,} bytes on {device}, of "
        f"which {free_bytes(device):,} are free now ({words}); load in 4 bits, in a smaller dtype, "
        "on another device, or give memory back first"
    )


def _ran_out(problem: BaseException) -> bool:
    if isinstance(problem, torch.OutOfMemoryError | MemoryError):
        return True
    words = str(problem)
    return "can't allocate memory" in words or "Cannot allocate memory" in words


def _bytes(spec: ModelSpec, quantize: str | None, dtype: torch.dtype) -> int:
    own = _QUANTIZED.get(quantize or "", float(dtype.itemsize))
    return sum(
        int(torch.Size(p.shape).numel() * (own if p.quantize else dtype.itemsize))
        for p in tree.leaves(param_specs(spec))
    )
