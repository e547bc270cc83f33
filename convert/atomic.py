"""Files and folders that appear whole or not at all.

A new folder is made beside its target, everything in it is flushed to the disk, and it changes
places with the target in one step, so a crash at any moment leaves the old or the new whole. What
a crash leaves beside the target has a name that `is_leftover` knows and `recover` clears away.

A folder that exists is replaced file by file in the user's eyes: files that the new one does not
write stay (notes, logs, other checkpoints), carried over by hard links; only those matching
`replaces`, which belong to the thing saved (old shards, say), go.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fnmatch
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ..errors import SaveError
from .safetensors_write import entry, entry_bytes, write_safetensors

__all__ = [
    "ADAPTER_FILES",
    "MODEL_FILES",
    "entry",
    "entry_bytes",
    "file",
    "folder",
    "is_leftover",
    "recover",
    "write_safetensors",
]

# What a saved model or adapter replaces, so that no stale weights stay beside new ones.
MODEL_FILES = ("model*.safetensors", "model*.safetensors.index.json")
ADAPTER_FILES = ("adapter_model*.safetensors", "adapter_model*.safetensors.index.json")

# `new` becomes the target, or holds the old content after the exchange; `old` is the target put
# aside where the file system cannot exchange.
_LEFTOVER = re.compile(r"\.(?P<name>.+)\.purelm-(?P<kind>new|old)-[0-9a-f]{16}")


def is_leftover(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is named like something that an interrupted save left behind."""
    return _LEFTOVER.fullmatch(Path(path).name) is not None


def check_apart(folder: str | os.PathLike[str], source: Path) -> None:
    """Raise SaveError where `folder` is `source`, from which the model to save was loaded."""
    if os.path.exists(folder) and source.exists() and os.path.samefile(folder, source):
        raise SaveError(f"{folder} is what the model was loaded from; give another folder")


@contextlib.contextmanager
def folder(
    target: str | os.PathLike[str], *, need_bytes: int = 0, replaces: Sequence[str] = ()
) -> Iterator[Path]:
    """A new, empty folder to write into, which takes the place of `target` when the block ends.

    Files of an existing `target` whose names the block does not write are kept, unless they match
    one of the patterns `replaces`. `need_bytes` free bytes are made sure of first. When the block
    raises, `target` stays as it was and the exception passes through; an OSError (a full disk, no
    permission) becomes a SaveError.
    """
    place = _prepare(target, need_bytes)
    if place.exists() and not place.is_dir():
        raise SaveError(f"{place} is a file; give a folder, or another name")
    if place.exists() and Path(os.path.realpath(os.curdir)).is_relative_to(place):
        # The folder is replaced by another, which would take the ground from under the program.
        raise SaveError(f"{place} is or holds the working directory; give a folder inside it")
    new = _beside(place, "new")
    with _save_errors(place, lambda: shutil.rmtree(new, ignore_errors=True)):
        new.mkdir()
        with _locked(new):
            yield new
            if place.exists():
                _keep_others(place, new, replaces)
                shutil.copymode(place, new)
            _flush_tree(new)
            aside = _swap_in(new, place)
            if aside is not None:
                # What others put into the old folder meanwhile.
                _keep_others(aside, place, replaces)
                shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def file(path: str | os.PathLike[str], *, need_bytes: int = 0) -> Iterator[Path]:
    """A path to write one file to, which takes the place of `path` when the block ends.

    Failures are as in `folder`.
    """
    place = _prepare(path, need_bytes)
    if place.is_dir():
        raise SaveError(f"{place} is a folder; give the name of a file")
    new = _beside(place, "new")
    with _save_errors(place, lambda: new.unlink(missing_ok=True)):
        new.touch()
        with _locked(new):
            yield new
            _flush(new)
            os.replace(new, place)
        _flush(place.parent)


def recover(target: str | os.PathLike[str]) -> None:
    """Undo what an interrupted save of `target` left beside it.

    A target that was put aside goes back to its place if nothing took it; everything else that a
    crash left is deleted. What a running process is still writing is let be.
    """
    place = Path(os.path.realpath(target))
    for path, kind in _leftovers(place):
        with contextlib.suppress(FileNotFoundError, BlockingIOError), _locked(path):
            if kind == "old" and not place.exists():
                os.rename(path, place)
                _flush(place.parent)
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


def _prepare(target: str | os.PathLike[str], need_bytes: int) -> Path:
    # A link to a folder stays a link: what it points to is replaced.
    place = Path(os.path.realpath(target))
    if is_leftover(place):
        raise SaveError(f"{place.name} is a name for unfinished saves; give another")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        recover(place)
        free = shutil.disk_usage(place.parent).free
    except OSError as problem:
        raise SaveError(f"{place} cannot be written: {problem}") from problem
    if free < need_bytes:
        raise SaveError(
            f"{place} needs {need_bytes:,} bytes, {free:,} are free on its disk; make room or save "
            "elsewhere"
        )
    return place


def _beside(place: Path, kind: str) -> Path:
    return place.parent / f".{place.name}.purelm-{kind}-{secrets.token_hex(8)}"


@contextlib.contextmanager
def _save_errors(place: Path, clean: Callable[[], object]) -> Iterator[None]:
    try:
        yield
    except BaseException as problem:
        with contextlib.suppress(OSError):
            clean()
        if isinstance(problem, OSError) and not isinstance(problem, SaveError):
            what = problem.strerror or problem
            raise SaveError(
                f"{place} could not be written: {what}; what was there before is untouched"
            ) from problem
        raise


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
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


def _keep_others(place: Path, new: Path, replaces: Sequence[str]) -> None:
    for root, folders, names in os.walk(place):
        here = new / os.path.relpath(root, place)
        for name in [*folders, *names]:
            source, copy = Path(root, name), here / name
            if os.path.lexists(copy):
                continue
            within = source.relative_to(place).as_posix()
            if any(
                within.count("/") == pattern.count("/") and fnmatch.fnmatchcase(within, pattern)
                for pattern in replaces
            ):
                continue
            if source.is_symlink():
                os.symlink(os.readlink(source), copy)
            elif source.is_dir():
                copy.mkdir()
                shutil.copystat(source, copy)
            else:
                _link_or_copy(source, copy)
        folders[:] = [f for f in folders if (here / f).is_dir() and not (here / f).is_symlink()]


def _link_or_copy(source: Path, copy: Path) -> None:
    try:
        os.link(source, copy, follow_symlinks=False)
    except OSError as problem:
        if problem.errno not in (errno.EPERM, errno.EXDEV, errno.EMLINK, errno.EOPNOTSUPP):
            raise
        shutil.copy2(source, copy)


def _flush_tree(new: Path) -> None:
    for root, _, names in os.walk(new, topdown=False):
        for name in names:
            if not Path(root, name).is_symlink():
                _flush(Path(root, name))
        _flush(Path(root))


def _flush(path: Path) -> None:
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


def _swap_in(new: Path, place: Path) -> Path | None:
    """Put `new` in the place of `place`; returns where the old content is now, if there was any."""
    aside = None
    if not place.exists():
        os.rename(new, place)
    elif _exchange(new, place):
        aside = new
    else:
        old = _beside(place, "old")
        os.rename(place, old)
        try:
            os.rename(new, place)
        except OSError:
            os.rename(old, place)
            raise
        aside = old
    _flush(place.parent)
    return aside


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two paths in one step; False where the system or file system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    at_cwd, exchange = -100, 2
    if rename(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), exchange) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    if number == errno.EBUSY:
        raise OSError(number, "it is a mount point; give a folder inside it")
    raise OSError(number, os.strerror(number), os.fspath(other))
