"""Measurements of several libraries one after the other, each in a process of its own, as importing
some changes others, and their memory must not add up."""

import csv
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
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


def table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """Markdown: the columns that some row has, a row's error in place of its figures."""
    shown = [c for c in columns if any(c in row for row in rows)]
    out = ["| " + " | ".join(shown) + " |", "| " + " | ".join("---" for _ in shown) + " |"]
    for row in rows:
        cells = [str(row.get(c, "")) for c in shown]
        if "error" in row:
            cells = [cells[0], row["error"].replace("|", "/")]
            cells += [""] * (len(shown) - 2)
        out.append("| " + " | ".join(cells) + " |")
    return "\n".join(out)


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """All figures of all rows; what is no single value as JSON."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        for row in rows:
            values = (row.get(name, "") for name in names)
            writer.writerow([json.dumps(v) if isinstance(v, (list, dict)) else v for v in values])
