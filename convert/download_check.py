"""Weights that were just downloaded are compared with the digest that the hub gave for them.

huggingface_hub compares sizes only. In its cache a file of Git LFS is named by the SHA-256 of what
it should contain, which is all that is needed here.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from ..errors import SourceError

_SHA256 = re.compile(r"[0-9a-f]{64}")


def check_new_weights(folder: Path, names: list[str], since: float) -> None:
    """Verify the files `names` of a cache snapshot that were written after `since` (epoch seconds).

    A file that is not what its name in the cache says is deleted, so that the next call downloads
    it again, and SourceError is raised.
    """
    for name in names:
        path = folder / name
        blob = Path(os.path.realpath(path))
        if blob.parent.name != "blobs" or not _SHA256.fullmatch(blob.name):
            # No Git LFS file, or a mirror that names files otherwise.
            continue
        try:
            if blob.stat().st_mtime < since:
                continue
            with blob.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as problem:
            raise SourceError(
                f"the download cannot be read: {problem.strerror}", file=path
            ) from problem
        if digest != blob.name:
            path.unlink(missing_ok=True)
            blob.unlink(missing_ok=True)
            raise SourceError(
                f"the download is damaged: its SHA-256 is {digest}, the hub announced {blob.name}; "
                "it was deleted, try again",
                file=path,
            )
