"""Measurements of several libraries one after the other, each in a process of its own, as importing
some changes others, and their memory must not add up."""

import csv
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
TAIL = 400  # characters of a failed process's last words


def apart(module: str, arguments: Sequence[str], peer: str, timeout: float) -> list[Row]:
    """What `python -m purelm.bench.MODULE ARGUMENTS --peer PEER` prints after RESULT, a line each.

    A process that fails or takes longer than `timeout` seconds gives one row, of `peer` and
    `error`.
    """
    command = [sys.executable, "-m", f"purelm.bench.{module}", *arguments, "--peer", peer]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return [{"peer": peer, "error": f"took longer than {timeout:g} s"}]
    lines = [line.removeprefix("RESULT ") for line in done.stdout.splitlines()
             if line.startswith("RESULT ")]  # fmt: skip
    if done.returncode or not lines:
        last = (done.stderr or done.stdout).strip()[-TAIL:]
        return [{"peer": peer, "error": f"exit status {done.returncode}: {last}"}]
    return [json.loads(line) for line in lines]


def all_of(
    module: str, arguments: Sequence[str], ours: str, beside: Sequence[str], timeout: float
) -> list[Row]:
    """The rows of `ours` and of each of `beside`, in turn, each shown when it is there.

    arguments: of the program that was asked, in which `--beside` and the names are still.
    """
    kept = list(arguments)
    start = kept.index("--beside")
    del kept[start : start + 1 + len(beside)]
    rows = []
    for peer in (ours, *beside):
        found = apart(module, kept, peer, timeout)
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
            cells = [cells[0], " ".join(row["error"].split())[-TAIL:].replace("|", "/")]
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
