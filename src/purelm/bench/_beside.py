"""Measurements of several libraries one after the other, each in a process of its own, as importing
some changes others, and their memory must not add up."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence

from ._table import Row

PREFIX = "RESULT "
TAIL = 400  # characters of a failed process's last words


class Failed(Exception):
    """Why a process gave no figures."""


def results(
    module: str, arguments: Sequence[str], timeout: float, cwd: str | None = None
) -> list[Row]:
    """What `python -m purelm.bench.MODULE ARGUMENTS` prints after RESULT, a line each. Raises
    Failed, also for one that takes longer than `timeout` seconds.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-m", f"purelm.bench.{module}", *arguments],
            capture_output=True,
            text=True,
            timeout=timeout,
            cwd=cwd,
            # What is imported here is there, wherever it runs.
            env={**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
        )
    except subprocess.TimeoutExpired:
        raise Failed(f"took longer than {timeout:g} s") from None
    lines = [line for line in done.stdout.splitlines() if line.startswith(PREFIX)]
    if done.returncode or not lines:
        last = " ".join((done.stderr or done.stdout).split())[-TAIL:]
        raise Failed(f"exit status {done.returncode}: {last}")
    return [json.loads(line.removeprefix(PREFIX)) for line in lines]


def all_of(
    module: str, arguments: Sequence[str], ours: str, beside: Sequence[str], timeout: float
) -> list[Row]:
    """The rows of `ours` and of each of `beside`, in turn, each shown when it is there; of a
    process that failed one row, of `peer` and `error`.

    arguments: of the program that was asked, in which `--beside` and the names are still.
    """
    kept = list(arguments)
    start = next(i for i, argument in enumerate(kept) if argument.split("=")[0] == "--beside")
    names = len(beside) - ("=" in kept[start])
    del kept[start : start + 1 + names]
    rows = []
    for peer in (ours, *beside):
        try:
            found = results(module, [*kept, "--peer", peer], timeout)
        except Failed as problem:
            found = [{"peer": peer, "error": str(problem)}]
        print("\n".join(json.dumps(row) for row in found), flush=True)
        rows += found
    return rows
