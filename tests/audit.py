"""What a reader of foreign files does, as events of Python's own audit: opens, code, processes."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_WATCH: list[tuple[str, str]] | None = None
_FORBIDDEN = frozenset(
    "exec compile import pickle.find_class marshal.loads subprocess.Popen os.system os.exec "
    "os.posix_spawn os.fork socket.connect socket.getaddrinfo os.remove os.rename os.mkdir "
    "os.rmdir os.link os.symlink os.truncate".split()
)


def _audit(event: str, args: tuple[object, ...]) -> None:
    if _WATCH is None:
        return
    if event in _FORBIDDEN:
        _WATCH.append((event, repr(args)))
    elif event == "open" and isinstance(args[0], str | bytes):
        writing = isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        _WATCH.append(("write" if writing else "open", os.path.realpath(os.fsdecode(args[0]))))


sys.addaudithook(_audit)


@contextmanager
def watched() -> Iterator[list[tuple[str, str]]]:
    """The events of the block: ("open", real path), ("write", real path), or a forbidden one."""
    global _WATCH
    events: list[tuple[str, str]] = []
    _WATCH = events
    try:
        yield events
    finally:
        _WATCH = None
