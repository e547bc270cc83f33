"""What a forward pass of the bridge returns."""

from collections.abc import Callable, Iterator
from typing import Any

import torch


class CausalLMOutput:
    """`.loss` (None without labels) and `.logits` [b, s, v], computed when somebody reads them.

    Also reads as a mapping and as the tuple (loss, logits), as trainers do.
    """

    def __init__(
        self,
        loss: torch.Tensor | None,
        hidden: torch.Tensor,
        head: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        self.loss = loss
        self.last_hidden_state = hidden
        self._head = head
        self._logits: torch.Tensor | None = None

    @property
    def logits(self) -> torch.Tensor:
        if self._logits is None:
            self._logits = self._head(self.last_hidden_state)
        return self._logits

    def keys(self) -> list[str]:
        """The names that are set."""
        return ["logits"] if self.loss is None else ["loss", "logits"]

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())

    def __contains__(self, name: object) -> bool:
        return name in self.keys()

    def values(self) -> list[Any]:
        """What stands behind `keys`."""
        return [self[name] for name in self.keys()]

    def items(self) -> list[tuple[str, Any]]:
        """`keys` and `values` in pairs."""
        return [(name, self[name]) for name in self.keys()]

    def to_tuple(self) -> tuple[Any, ...]:
        """`values` as a tuple: (loss, logits), or (logits,)."""
        return tuple(self.values())

    def get(self, name: str, default: Any = None) -> Any:
        """The value behind one of `keys`, else `default`."""
        return self[name] if name in self.keys() else default

    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, str):
            if key not in self.keys():
                raise KeyError(key)
            return getattr(self, key)
        if isinstance(key, slice):
            return tuple(getattr(self, name) for name in self.keys()[key])
        return getattr(self, self.keys()[key])
