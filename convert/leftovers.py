"""What an interrupted save leaves beside its target: known by its name, cleared away, or taken up.

Whoever writes there holds a lock on it, so that what a running process is at is let be.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

# In a new folder that is still being written: how far it came, for the save that takes it up.
JOURNAL = "purelm-unfinished.json"

# `new` becomes the target, or holds the old content after the exchange; `old` is the target put
# aside where the file system cannot exchange.
_LEFTOVER = re.compile(r"\.(?P<name>.+)\.purelm-(?P<kind>new|old)-[0-9a-f]{16}")


def is_leftover(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is named like something that an interrupted save left behind."""
    return _LEFTOVER.fullmatch(Path(path).name) is not None


def recover(target: str | os.PathLike[str]) -> None:
    """Undo what an interrupted save of `target` left beside it.

    A target that was put aside goes back to its place if nothing took it; everything else that a
    crash left is deleted, but for what a save may take up. What a running process is still writing
    is let be.
    """
    clear(Path(os.path.realpath(target)), also_unfinished=False)


def clear(place: Path, *, also_unfinished: bool = True) -> None:
    """As `recover`; also_unfinished: what a save might have taken up goes too."""
    for path, kind in _leftovers(place):
        with contextlib.suppress(FileNotFoundError, BlockingIOError), locked(path):
            if kind == "old" and not place.exists():
                os.rename(path, place)
                flush(place.parent)
            elif not also_unfinished and (path / JOURNAL).exists():
                continue
            elif path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _leftovers(place: Path) -> list[tuple[Path, str]]:
    try:
        names = sorted(os.listdir(place.parent))
    except OSError:
        return []
    found = []
    for name in names:
        match = _LEFTOVER.fullmatch(name)
        if match and match["name"] == place.name:
            found.append((place.parent / name, match["kind"]))
    # The old one first: whether it goes back must not depend on a new one.
    return sorted(found, key=lambda leftover: leftover[1] != "old")


@contextlib.contextmanager
def unfinished(place: Path) -> Iterator[Path | None]:
    """The folder, held, in which an interrupted save of `place` left its journal, if there is one.

    Never on Windows, where nothing tells whether a running process is at it.
    """
    with contextlib.ExitStack() as held:
        found = [] if sys.platform == "win32" else _leftovers(place)
        yield next((path for path, kind in found if kind == "new" and _held(path, held)), None)


def _held(path: Path, held: contextlib.ExitStack) -> bool:
    """Whether a journal lies in `path`, which then stays locked as long as `held`."""
    with contextlib.suppress(OSError):  # gone, another process's or another user's
        if (path / JOURNAL).is_file():
            held.enter_context(locked(path))
            # It may have been finished or cleared away before it was held.
            return (path / JOURNAL).is_file()
    return False


def beside(place: Path, kind: str) -> Path:
    """A new name for what is left of `place` by a crash, of the kind "new" or "old"."""
    return place.parent / f".{place.name}.purelm-{kind}-{secrets.token_hex(8)}"


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold `path` against `recover`; raises BlockingIOError if another process does."""
    if sys.platform == "win32":
        # No such lock there: what another process has open cannot be deleted either.
        yield
        return
    import fcntl

    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError as problem:
            # Some network file systems have no locks; saving there goes on without.
            if problem.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
        yield
    finally:
        os.close(descriptor)


def flush(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk."""
    if sys.platform == "win32":
        if path.is_dir():
            return
        descriptor = os.open(path, os.O_RDWR | os.O_BINARY)
    else:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
