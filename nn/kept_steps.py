"""Steps of `generate` that outlive a call: their buffers, and the graphs over them.

A graph reads and writes the memory it was captured over, weights and buffers alike. So what is kept
is found by everything of a step that is no value in memory: its shapes, its rules, and where the
tensors of params and adapters lie. Values that are written there in place are seen; another tensor
in their stead makes another step.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch.utils import _pytree

from . import cache as kv
from . import tree
from .cache import Cache

# What may be kept, in steps and of the device's memory, until another call of `generate` needs it.
MOST = 8
SHARE = 0.1


@dataclass(slots=True)
class Step:
    """What a step of b rows reads and writes.

    eos [n] int64: the ids that end a row; token and shown [b] int64: what the rows drew, and what
    of it is given out; ended and broken [b] bool; used [] int64: in how many columns some row had
    not ended; uniform [b] fp64: what the next draw takes, None for greedy; seen [b, v] bool: the
    tokens of each row, None where no rule asks. replays: the graphs over these, by whether the
    answers are too short to end.
    """

    cache: Cache
    eos: torch.Tensor
    token: torch.Tensor
    shown: torch.Tensor
    ended: torch.Tensor
    broken: torch.Tensor
    used: torch.Tensor
    uniform: torch.Tensor | None
    seen: torch.Tensor | None
    replays: dict[bool, Callable[[], None]] = field(default_factory=dict)

    @classmethod
    def empty(
        cls, cache: Cache, eos: torch.Tensor, *, draws: bool, vocab: int | None = None
    ) -> "Step":
        """Before the first step over `cache`; vocab: v, where `seen` is asked for."""
        batch, device = len(cache.end), cache.end.device
        token, shown = torch.zeros((2, batch), dtype=torch.int64, device=device).unbind(0)
        ended, broken = torch.zeros((2, batch), dtype=torch.bool, device=device).unbind(0)
        uniform = torch.zeros(batch, dtype=torch.float64, device=device) if draws else None
        seen = None
        if vocab is not None:
            seen = torch.zeros((batch, vocab), dtype=torch.bool, device=device)
        used = torch.zeros_like(token[0])
        return cls(cache, eos, token, shown, ended, broken, used, uniform, seen)

    def begin(self) -> None:
        """As it was before its first step, in place."""
        for x in (self.ended, self.broken, self.used):
            x.zero_()
        self.cache = kv.emptied(self.cache)

    def go_on(self, before: "Step") -> None:
        """Be where another step of these rows is, in place."""
        for name in ("token", "shown", "ended", "broken", "used", "uniform", "seen"):
            value = getattr(before, name)
            if value is not None:
                getattr(self, name).copy_(value)
        self.cache = kv.copied(before.cache, self.cache)

    @property
    def captured(self) -> bool:
        """Are there graphs over it?"""
        return bool(self.replays)

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.token.device

    @property
    def nbytes(self) -> int:
        """Bytes of its buffers."""
        return tree.nbytes([*self.cache.layers, self.cache.segments, self.seen])


class Kept(Protocol):
    """What can be kept: a `Step`, a `prompt_pass.PromptPass` or speculation's `passes.Passes`."""

    @property
    def captured(self) -> bool: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def nbytes(self) -> int: ...


K = TypeVar("K", bound=Kept)
T = TypeVar("T")


class KeptSteps:
    """Steps of earlier calls, for those to come; all are given up by `clear`.

    At most `most` of a kind, and together SHARE of the device's memory. A step that is taken is
    nobody else's until it is given back, so calls in several threads do not meet. Copies and files
    are empty.
    """

    def __init__(self, most: int = MOST) -> None:
        self.most = most
        self._steps: OrderedDict[tuple[type[Kept], Hashable], Kept] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> Any:
        return KeptSteps, (self.most,)

    def __len__(self) -> int:
        return len(self._steps)

    def take(self, kind: type[K], key: Hashable) -> K | None:
        """The step of this kind and key, as it was given."""
        with self._lock:
            step = self._steps.pop((kind, key), None)
        return step if isinstance(step, kind) else None

    def give(self, key: Hashable, step: Kept) -> None:
        """Keep a step that has graphs, if there can be room; the oldest ones make it."""
        most = SHARE * _memory(step.device)
        if not step.captured or step.nbytes > most:
            return
        with self._lock:
            self._steps.pop((type(step), key), None)
            self._steps[type(step), key] = step
            alike = [k for k in self._steps if k[0] is type(step)]
            for old in alike[: max(0, len(alike) - self.most)]:
                del self._steps[old]
            while sum(s.nbytes for s in self._steps.values()) > most:
                self._steps.popitem(last=False)

    def clear(self) -> None:
        """Keep none."""
        with self._lock:
            self._steps.clear()


def with_room(kept: KeptSteps | None, make: Callable[[], T]) -> T:
    """`make()`; where the device has too little memory for it, what is kept gives way."""
    try:
        return make()
    except torch.OutOfMemoryError:
        if not kept:
            raise
        kept.clear()
    return make()


def places(*trees: tree.Tree) -> Hashable:
    """Where the tensors of trees lie, with their forms and all that their leaves hold else."""
    found, form = _pytree.tree_flatten(trees)
    where = [
        (x.data_ptr(), x.dtype, x.shape, x.stride()) if isinstance(x, torch.Tensor) else x
        for x in found
    ]
    return _Form(form), tuple(where)


@dataclass(frozen=True)
class _Form:
    """A pytree's form, which torch lets be compared and not hashed."""

    form: Any

    def __hash__(self) -> int:
        return hash(self.form.num_leaves)


def _memory(device: torch.device) -> float:
    if device.type != "cuda":
        return float("inf")
    return torch.cuda.get_device_properties(device).total_memory
