"""How many bytes of tensors are alive at most while something runs on the CPU."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations make, until they are freed: `now`, and `most` of it."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen: set[int] = set()
        self._hidden = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not self._hidden:
            self.note(out)
        return out

    def note(self, out: Any) -> None:
        """Count the storages of these tensors that were not there before."""
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, torch.Tensor):
                self._add(t.untyped_storage())

    def know(self, held: Any) -> None:
        """Do not count the storages of these tensors, which are there already."""
        for t in torch.utils._pytree.tree_leaves(held):
            if isinstance(t, torch.Tensor):
                self._seen.add(t.untyped_storage()._cdata)

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, count = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.now += count
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._drop, key, count)

    def _drop(self, key: int, count: int) -> None:
        self._seen.discard(key)
        self.now -= count

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Inside, nothing is counted."""
        self._hidden += 1
        try:
            yield
        finally:
            self._hidden -= 1

    def as_kernel(self, f: Callable[..., Any]) -> Callable[..., Any]:
        """`f` as one launch: what it makes is counted, what it makes in between is not."""

        def run(*args: Any, **keywords: Any) -> Any:
            with self.hidden():
                out = f(*args, **keywords)
            self.note(out)
            return out

        return run
