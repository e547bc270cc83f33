"""`fast_inference=True`: an engine over a model's own weights, and how much memory it may take."""

import os
from typing import TYPE_CHECKING, Any

import torch

from ..errors import ArgumentError
from ..kernels import fp8
from ..nn import pages, tree
from ..nn.lora import LoRA
from ..nn.pages import PAGE
from .arguments import check_flags

if TYPE_CHECKING:
    from .bridge import CausalLM
    from .engine import Engine

# Rows decoded together.
ROWS = 64


class FastInference:
    """What was asked for at loading, and the engine once it is needed.

    Raises ArgumentError for values that cannot be used.
    """

    def __init__(self, gpu_memory_utilization: float, max_lora_rank: int, log_stats: bool) -> None:
        share = gpu_memory_utilization
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
            raise ArgumentError(
                f"gpu_memory_utilization is {share!r}, expected a number over 0 up to 1"
            )
        if type(max_lora_rank) is not int or max_lora_rank < 1:
            raise ArgumentError(f"max_lora_rank is {max_lora_rank!r}, expected a positive integer")
        check_flags(disable_log_stats=not log_stats)
        self.share, self.max_rank, self.log_stats = share, max_lora_rank, log_stats
        self._engine: Engine | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Copies and files have the settings; an engine is of one model in one process."""
        return {**self.__dict__, "_engine": None}

    def engine(self, model: "CausalLM") -> "Engine":
        """The engine over the model where it is now; raises as `cache_blocks`."""
        from .engine import Engine

        if self._engine is None or self._engine.device != model.device:
            self._engine = None  # its memory counts as free
            self._engine = Engine(
                model,
                slots=ROWS,
                max_queue=2**31,
                cache_blocks=self.cache_blocks(model),
                cache_dtype=model.cache_dtype,
                log_stats=self.log_stats,
            )
        return self._engine

    def cache_blocks(self, model: "CausalLM") -> int:
        """How many blocks the cache may have, so that this process and all others use no more than
        the given share of the device's memory; raises ArgumentError where that is less than one
        row of max_seq_length takes.
        """
        spec, dtype = model.spec, model.params["embed"]["weight"].dtype
        columns = model.cache_dtype or dtype

        def takes(blocks: int) -> int:
            return pages.nbytes(spec, ROWS, blocks, dtype=dtype, columns=columns)

        total, used = memory(model)
        least = -(-min(model.max_seq_length, pages.shared_length(spec)) // PAGE)
        free, rest = int(self.share * total) - used, takes(1)
        if free < takes(least + 1):
            raise ArgumentError(
                f"gpu_memory_utilization is {self.share}: of {_mib(total)} that leaves "
                f"{_mib(max(free, 0))} beside the {_mib(used)} in use, and the least cache, one "
                f"row of max_seq_length={model.max_seq_length} tokens, takes "
                f"{_mib(takes(least + 1))}; raise it, lower max_seq_length, or pass "
                "float8_kv_cache=True"
            )
        each = takes(2) - rest
        # Of layers with states alone, blocks take nothing: then rows are all there is to bound.
        return (free - rest) // each if each else ROWS * least

    def check_rank(self, adapters: tree.Tree) -> None:
        """Raise ArgumentError for adapters whose rank is more than was said at loading."""
        ranks = [leaf.rank for leaf in tree.leaves(adapters) if isinstance(leaf, LoRA)]
        if ranks and max(ranks) > self.max_rank:
            raise ArgumentError(
                f"an adapter has rank {max(ranks)}, more than max_lora_rank={self.max_rank}; load "
                f"with max_lora_rank={max(ranks)}, or lower the rank"
            )


def check_cache(float8_kv_cache: bool, device: torch.device) -> torch.dtype | None:
    """The dtype of the cache where it is not the model's; raises ArgumentError."""
    check_flags(float8_kv_cache=float8_kv_cache)
    if not float8_kv_cache:
        return None
    if fp8.lacks(device):
        raise ArgumentError(
            "float8_kv_cache=True needs a GPU with e4m3 (compute capability 8.9 or above); this "
            f"one has {'.'.join(map(str, torch.cuda.get_device_capability(device)))}"
        )
    return torch.float8_e4m3fn


def memory(model: "CausalLM") -> tuple[int, int]:
    """(all bytes of the model's device, those in use): what torch keeps for later is not in use,
    and of the host only the model itself is known.
    """
    if model.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(model.device)
        idle = torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
        return total, total - free - idle
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return total, sum(tree.nbytes(one) for one in model.own_trees())


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"
