"""Opening files that came from elsewhere: names and links never lead out of their folder.

A checkpoint's index, its links and its file types are all chosen by whoever made it. Everything
that loading reads goes through `locate` and `open_regular`.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import BinaryIO

from ..errors import CheckpointError, LoadError

# One path component, nothing hidden, no separator of any system.
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}")


def locate(folder: Path, name: str, *, error: type[LoadError] = CheckpointError) -> Path:
    """The real path of the file `name` of `folder`; `name` may come from an untrusted file.

    A link is followed only when it ends inside `folder`, or, for a snapshot of the Hugging Face
    cache (`models--x/snapshots/<sha>`), inside the `blobs` of the same repository folder, where the
    cache keeps the contents. Raises `error` for any other name or link and for an absent file.
    """
    if not _NAME.fullmatch(name):
        raise error(
            f"{name[:200]!r} is not a plain file name: expected letters, digits, '.', '_' and '-' "
            "only, in the checkpoint's own folder",
            file=folder,
        )
    path = folder / name
    try:
        real = Path(os.path.realpath(path, strict=True))
    except FileNotFoundError:
        raise error(f"the folder has no file {name!r}", file=folder) from None
    except OSError as problem:
        raise error(f"the path cannot be followed: {problem.strerror}", file=path) from problem
    if not any(real.is_relative_to(root) for root in _roots(folder)):
        raise error(
            "the file is a link out of its folder, which is not followed; put the file there",
            file=path,
        )
    return real


def _roots(folder: Path) -> list[Path]:
    real = Path(os.path.realpath(folder))
    roots = [real]
    # A subfolder of a snapshot is as good as the snapshot.
    for place in (real, *real.parents):
        if place.parent.name == "snapshots" and place.parent.parent.name.startswith("models--"):
            roots.append(place.parent.parent / "blobs")
            break
    return roots


def open_regular(path: Path, *, error: type[LoadError] = CheckpointError) -> tuple[BinaryIO, int]:
    """An unbuffered binary file and its size in bytes; pipes, devices and folders raise `error`.

    Never blocks: a pipe is recognised after a non-blocking open, not read.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
    flags |= getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags)
    except OSError as problem:
        raise error(f"the file cannot be opened: {problem.strerror}", file=path) from problem
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise error("expected a regular file, found a folder, pipe or device", file=path)
        return open(descriptor, "rb", buffering=0), status.st_size
    except BaseException:
        os.close(descriptor)
        raise


def read_bytes(path: Path, *, max_bytes: int, error: type[LoadError] = CheckpointError) -> bytes:
    """The whole content of a file of at most `max_bytes` bytes; raises `error` for a larger one."""
    file, size = open_regular(path, error=error)
    with file:
        if size > max_bytes:
            raise error(f"the file has {size} bytes, more than the {max_bytes} allowed", file=path)
        try:
            # One byte more than stat said, so that a file that grows meanwhile is noticed.
            parts = []
            left = size + 1
            while left > 0 and (part := file.read(left)):
                parts.append(part)
                left -= len(part)
        except OSError as problem:
            raise error(f"the file cannot be read: {problem.strerror}", file=path) from problem
    content = b"".join(parts)
    if len(content) != size:
        raise error(f"the file changed while it was read: {size} bytes were expected", file=path)
    return content
