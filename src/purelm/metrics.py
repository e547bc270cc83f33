"""metrics.jsonl: one line per training step and per evaluation, written as they happen."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from .convert import atomic
from .convert.json_file import parse_json
from .errors import SaveError

Line = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Metrics:
    """The lines so far, and the open file that they are in."""

    lines: list[Line]
    file: IO[str]

    def add(self, **line: Any) -> None:
        """Add a line; it is in the file when this returns."""
        self.lines.append(line)
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()


@contextmanager
def open_metrics(path: Path, *, keep_steps: int | None) -> Iterator[Metrics]:
    """A metrics file to add to: an empty one, or what it says of the first `keep_steps` steps.

    Lines of later steps go: a run that resumes makes them again.
    """
    kept = [] if keep_steps is None else [m for m in _lines(path) if m["step"] <= keep_steps]
    with atomic.file(path) as new:
        new.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    try:
        file = open(path, "a", encoding="utf-8")
    except OSError as problem:
        raise SaveError(f"{path} cannot be written: {problem.strerror}") from problem
    with file:
        yield Metrics(kept, file)


def _lines(path: Path) -> Iterator[Line]:
    if not path.exists():
        return
    for line in path.read_bytes().splitlines():
        try:
            value = parse_json(line)
        except ValueError:
            # The line that a killed run was writing.
            return
        if isinstance(value, dict) and isinstance(value.get("step"), int):
            yield value


def peak_memory(device: torch.device) -> int | None:
    """The most bytes used so far: of the GPU by tensors, else of the process; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
