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
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ..errors import SaveError
from .leftovers import beside, clear, flush, is_leftover, locked, recover, unfinished
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


def check_apart(folder: str | os.PathLike[str], source: Path) -> None:
    """Raise SaveError where `folder` is `source`, from which the model to save was loaded."""
    if os.path.exists(folder) and source.exists() and os.path.samefile(folder, source):
        raise SaveError(f"{folder} is what the model was loaded from; give another folder")


@contextlib.contextmanager
def folder(
    target: str | os.PathLike[str],
    *,
    need_bytes: int = 0,
    replaces: Sequence[str] = (),
    take_up: bool = False,
) -> Iterator[Path]:
    """A new, empty folder to write into, which takes the place of `target` when the block ends.

    Files of an existing `target` whose names the block does not write are kept, unless they match
    one of the patterns `replaces`. `need_bytes` free bytes are made sure of first. When the block
    raises, `target` stays as it was and the exception passes through; an OSError (a full disk, no
    permission) becomes a SaveError. take_up: the folder may be what a save that was killed left
    with a `leftovers.JOURNAL` in it, of which the block makes what it can, and which it removes.
    """
    place = _place(target)
    if place.exists() and not place.is_dir():
        raise SaveError(f"{place} is a file; give a folder, or another name")
    if place.exists() and Path(os.path.realpath(os.curdir)).is_relative_to(place):
        # The folder is replaced by another, which would take the ground from under the program.
        raise SaveError(f"{place} is or holds the working directory; give a folder inside it")
    with contextlib.ExitStack() as held:
        new = held.enter_context(unfinished(place)) if take_up else None
        there = 0 if new is None else sum(path.lstat().st_size for path in new.iterdir())
        _prepare(place, max(0, need_bytes - there))
        new = new or beside(place, "new")
        with _save_errors(place, lambda: shutil.rmtree(new, ignore_errors=True)):
            if not new.exists():
                new.mkdir()
                held.enter_context(locked(new))
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
    place = _place(path)
    if place.is_dir():
        raise SaveError(f"{place} is a folder; give the name of a file")
    _prepare(place, need_bytes)
    new = beside(place, "new")
    with _save_errors(place, lambda: new.unlink(missing_ok=True)):
        new.touch()
        with locked(new):
            yield new
            flush(new)
            os.replace(new, place)
        flush(place.parent)


def _place(target: str | os.PathLike[str]) -> Path:
    # A link to a folder stays a link: what it points to is replaced.
    place = Path(os.path.realpath(target))
    if is_leftover(place):
        raise SaveError(f"{place.name} is a name for unfinished saves; give another")
    return place


def _prepare(place: Path, need_bytes: int) -> None:
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        clear(place)
        free = shutil.disk_usage(place.parent).free
    except OSError as problem:
        raise SaveError(f"{place} cannot be written: {problem}") from problem
    if free < need_bytes:
        raise SaveError(
            f"{place} needs {need_bytes:,} bytes, {free:,} are free on its disk; make room or save "
            "elsewhere"
        )


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
                flush(Path(root, name))
        flush(Path(root))


def _swap_in(new: Path, place: Path) -> Path | None:
    """Put `new` in the place of `place`; returns where the old content is now, if there was any."""
    aside = None
    if not place.exists():
        os.rename(new, place)
    elif _exchange(new, place):
        aside = new
    else:
        old = beside(place, "old")
        os.rename(place, old)
        try:
            os.rename(new, place)
        except OSError:
            os.rename(old, place)
            raise
        aside = old
    flush(place.parent)
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
