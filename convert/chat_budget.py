"""What one rendering of a chat template may spend, and the prices of what a template can do.

Every price is asked before the thing is made, so a template that asks for too much has not had it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Any

from jinja2.exceptions import SecurityError

_STEPS = 300_000
_STEPS_PER_ITEM = 4_000
_SECONDS = 0.4
_SECONDS_PER_ITEM = 0.005
_SIZE = 1 << 20
# How many characters are copied for the price of one step.
_CHARS_PER_STEP = 256
MAX_WIDTH = 1_000

_METHODS: dict[type, frozenset[str]] = {
    str: frozenset(
        "capitalize casefold center count endswith find index isalnum isalpha isascii isdecimal "
        "isdigit isidentifier islower isnumeric isprintable isspace istitle isupper join ljust "
        "lower lstrip partition removeprefix removesuffix replace rfind rindex rjust rpartition "
        "rsplit rstrip split splitlines startswith strip swapcase title upper zfill".split()
    ),
    dict: frozenset("copy get items keys values".split()),
    list: frozenset("copy count index".split()),
    tuple: frozenset("count index".split()),
    int: frozenset({"bit_length"}),
    float: frozenset({"is_integer"}),
}
_WIDTH_METHODS = ("center", "ljust", "rjust", "zfill")
_WIDE_FORMAT = re.compile(r"%[^a-zA-Z%]*(?:\*|\d{4})")


class Budget:
    """What one rendering may still spend. `weights` are the sizes of the input's containers."""

    def __init__(self, weights: Mapping[int, int], items: int, size: int) -> None:
        self.weights = weights
        self.size = _SIZE + 4 * size
        self.steps = _STEPS + _STEPS_PER_ITEM * items + size // 16
        # The thread's own time: a busy machine must not make a sound template fail.
        self.deadline = time.thread_time() + _SECONDS + _SECONDS_PER_ITEM * items
        self.until_look = 8
        self.written = 0
        # Where the rendering stands in characters, and what generation blocks wrote from where.
        self.position = 0
        self.marked: list[tuple[int, str]] = []

    def spend(self, steps: int) -> None:
        self.steps -= steps
        self.until_look -= 1 + steps // 512
        if self.until_look <= 0:
            self.until_look = 8
            if time.thread_time() > self.deadline:
                raise SecurityError("it takes too long; it may loop for ever")
        if self.steps < 0:
            raise SecurityError("it takes too many steps; it may loop for ever")

    def allow(self, size: int) -> None:
        """Pays for a value of `size` characters or items that is about to be made."""
        if size > self.size:
            raise SecurityError(f"it makes a value of size {size}, more than {self.size}")
        self.spend(1 + size // _CHARS_PER_STEP)

    def weigh(self, value: Any) -> int:
        """The size of `value` written out, each part as often as it occurs."""
        if isinstance(value, str):
            return len(value)
        if not isinstance(value, list | tuple | dict):
            return 8
        weight, visited, pending = 0, 0, [value]
        while pending:
            part = pending.pop()
            visited += 1
            if isinstance(part, str):
                weight += len(part) + 4
            elif (known := self.weights.get(id(part))) is not None:
                weight += known
            else:
                weight += 8
                if isinstance(part, dict):
                    pending.extend(part)
                    pending.extend(part.values())
                elif isinstance(part, list | tuple):
                    pending.extend(part)
            if weight > self.size:
                raise SecurityError(f"it makes a value larger than {self.size}")
            if len(pending) > self.size:
                raise SecurityError(f"it makes a list longer than {self.size}")
        self.spend(visited // 32)
        return weight


def size_of(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple | dict) else 1


def check_product(budget: Budget, left: Any, right: Any) -> None:
    for one, other in ((left, right), (right, left)):
        if isinstance(one, str | list | tuple) and isinstance(other, int):
            budget.allow(size_of(one) * max(0, other))
    if isinstance(left, int) and isinstance(right, int):
        if left.bit_length() + right.bit_length() > 256:
            raise SecurityError("it multiplies large numbers")


def check_format(budget: Budget, text: str, values: Any) -> None:
    if _WIDE_FORMAT.search(text):
        raise SecurityError("it formats with a large or a computed width")
    budget.allow(len(text) + text.count("%") * (budget.weigh(values) + 16))


def check_width(*widths: Any) -> None:
    for width in widths:
        if isinstance(width, int) and abs(width) > MAX_WIDTH:
            raise SecurityError(f"it asks for the width {width}, more than {MAX_WIDTH}")


def check_method(budget: Budget, owner: Any, name: str, args: tuple[Any, ...]) -> None:
    for kind, names in _METHODS.items():
        if isinstance(owner, kind) and name in names:
            break
    else:
        raise SecurityError(f"it calls {type(owner).__name__}.{name}, which is not offered")
    if isinstance(owner, str):
        if name in _WIDTH_METHODS:
            check_width(*args[:1])
        elif name == "replace":
            check_replace(budget, owner, *args[:2])
        elif name == "join" and args:
            check_join(budget, owner, args[0])
        # A character and its place in a list take far more memory than a character in a text.
        elif name in ("split", "rsplit", "splitlines"):
            budget.spend(len(owner) // 32)


def check_replace(budget: Budget, text: str, old: Any = "", new: Any = "") -> None:
    if isinstance(old, str) and isinstance(new, str):
        found = text.count(old) if old else len(text) + 1
        budget.allow(len(text) + found * len(new))


def check_join(budget: Budget, glue: str, parts: Any) -> None:
    if isinstance(parts, list | tuple | dict | str):
        budget.allow(budget.weigh(parts) + len(parts) * len(glue))
    else:
        raise SecurityError("it joins something that is no list")
