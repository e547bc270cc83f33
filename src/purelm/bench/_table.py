"""What benches print and keep: tables, CSV files, and the versions that figures are of."""

import contextlib
import csv
import json
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from ..convert import atomic

Row = dict[str, Any]


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


def versions(packages: Iterable[str]) -> str:
    """NAME=VERSION of those that are installed."""
    found = []
    for name in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found.append(f"{name}={metadata.version(name)}")
    return " ".join(found)


def write_csv(path: Path, rows: Sequence[Row], fields: Sequence[str] | None = None) -> None:
    """These fields of all rows (None: all there are) in a new file, whole or not at all; what is no
    single value as JSON. Its folder is made.
    """
    if fields is None:
        fields = list(dict.fromkeys(name for row in rows for name in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic.file(path) as new, new.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields, extrasaction="ignore")
        writer.writeheader()
        for row in rows:
            writer.writerow(
                {k: json.dumps(v) if isinstance(v, list | dict) else v for k, v in row.items()}
            )
