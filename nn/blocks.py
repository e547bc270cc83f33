"""Which blocks of a paged cache are whose: counted references, known contents, the idle ones.

Only numbers: the memory is `pages.Pages`. Block 0 is nobody's: rows without a request write there.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

Name = bytes


def names(tokens: Sequence[int], page: int) -> list[Name]:
    """One name a full block of tokens, of all tokens up to its end: equal names, equal prefixes.

    A digest that nobody finds a second text for: with less, a request could be made to read the
    cache of another.
    """
    made: list[Name] = []
    name = b""
    for i in range(0, len(tokens) - page + 1, page):
        text = array("q", tokens[i : i + page]).tobytes()
        name = hashlib.blake2b(name + text, digest_size=16).digest()
        made.append(name)
    return made


class Blocks:
    """`count` blocks of a cache, of which block 0 is left out.

    A block is free, held by the requests that use it, or idle: held by none, but its content is
    known by a name, until the longest idle one is taken for something else.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(range(count - 1, 0, -1))
        self._holders: dict[int, int] = {}
        self._block_of: dict[Name, int] = {}
        self._name_of: dict[int, Name] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def held(self) -> int:
        """How many blocks are in use."""
        return len(self._holders)

    @property
    def room(self) -> int:
        """How many `take` can give."""
        return len(self._free) + len(self._idle)

    def grow(self, count: int) -> None:
        """There are `count` blocks from now on, at least as many as before."""
        self._free[:0] = range(count - 1, self.count - 1, -1)
        self.count = count

    def known(self, named: Sequence[Name]) -> int:
        """How many blocks the longest known prefix has."""
        return next((i for i, name in enumerate(named) if name not in self._block_of), len(named))

    def match(self, named: Sequence[Name]) -> list[int]:
        """The blocks of the longest known prefix, each held once more."""
        found = []
        for name in named[: self.known(named)]:
            block = self._block_of[name]
            self._idle.pop(block, None)
            self._holders[block] = self._holders.get(block, 0) + 1
            found.append(block)
        return found

    def take(self, count: int) -> list[int] | None:
        """So many blocks of unknown content, held once; None where there is no room for all."""
        if count > self.room:
            return None
        taken = []
        for _ in range(count):
            if self._free:
                block = self._free.pop()
            else:
                block, _ = self._idle.popitem(last=False)
                del self._block_of[self._name_of.pop(block)]
            self._holders[block] = 1
            taken.append(block)
        return taken

    def name(self, blocks: Sequence[int], named: Sequence[Name]) -> None:
        """Make the content of held blocks known; where another block has it already, that stays."""
        for block, name in zip(blocks, named, strict=False):
            if name not in self._block_of and block not in self._name_of:
                self._block_of[name], self._name_of[block] = block, name

    def release(self, blocks: Sequence[int]) -> None:
        """Give blocks back that one request held; the ends of prefixes become old first."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            del self._holders[block]
            if block in self._name_of:
                self._idle[block] = None
            else:
                self._free.append(block)

    def forget(self) -> None:
        """No content is known any more: the weights that made it have changed."""
        self._block_of.clear()
        self._name_of.clear()
        self._free += self._idle
        self._idle.clear()
