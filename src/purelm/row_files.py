"""Training rows as they stand in files: JSON lines, parquet, or a folder that `datasets` saved."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .convert.json_file import parse_json
from .convert.local_file import locate
from .errors import CheckpointError, DataError

_FORMATS = (
    "a .jsonl file, a .parquet file, a folder of .parquet files, or a folder written by "
    "datasets' save_to_disk"
)


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row and where it stands: `place` is the line of a text file, else the row's number."""

    value: dict[str, Any]
    file: Path
    place: str

    def shown(self, limit: int = 300) -> str:
        """The row as JSON on one line, cut after `limit` characters."""
        text = json.dumps(self.value, ensure_ascii=False, default=repr)
        return text if len(text) <= limit else text[:limit] + "..."

    def error(self, problem: str) -> DataError:
        """The error that says what is wrong with this row, where it stands and what it is."""
        return DataError(f"{problem} [{self.file}, {self.place}]: {self.shown()}")


def read_rows(path: str | Path) -> list[RawRow]:
    """Every row of a data file or folder, in order; at least one.

    Raises DataError, which names the file and the line, for what cannot be read.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"there is no {path}; expected {_FORMATS}")
    if path.is_dir():
        found = list(_folder(path))
    elif path.suffix == ".parquet":
        found = list(_parquet([path]))
    elif path.suffix in (".jsonl", ".ndjson", ".json"):
        found = list(_json_lines(path))
    else:
        raise DataError(f"{path} is in no known format; expected {_FORMATS}")
    if not found:
        raise DataError(f"{path} holds no rows")
    return found


def _json_lines(path: Path) -> Iterator[RawRow]:
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                value = _json_line(line, path, number)
                yield RawRow(value, path, f"line {number}")
    except OSError as problem:
        raise DataError(f"{path} cannot be read: {problem.strerror}") from problem


def _json_line(line: bytes, path: Path, number: int) -> dict[str, Any]:
    shown = line[:200].decode("utf-8", "replace").strip()
    try:
        value = parse_json(line)
    except ValueError as problem:
        raise DataError(
            f"not valid JSON: {problem}; each line is one object [{path}, line {number}]: {shown}"
        ) from None
    if not isinstance(value, dict):
        raise DataError(
            f"expected one JSON object per line, found {type(value).__name__} "
            f"[{path}, line {number}]: {shown}"
        )
    return value


def _folder(path: Path) -> Iterator[RawRow]:
    if (path / "dataset_dict.json").exists():
        splits = _json_object(path / "dataset_dict.json").get("splits")
        if not isinstance(splits, list) or "train" not in splits:
            raise DataError(
                f"{path} holds the splits {splits}, expected one called 'train'; "
                "give the folder of the split to use"
            )
        path = path / "train"
    if (path / "state.json").exists():
        yield from _arrow(path)
        return
    parquet = sorted(path.glob("*.parquet"))
    if not parquet:
        raise DataError(
            f"{path} has neither a state.json (of save_to_disk) nor .parquet files; "
            f"expected {_FORMATS}"
        )
    yield from _parquet(parquet)


def _json_object(path: Path) -> dict[str, Any]:
    try:
        value = parse_json(path.read_bytes())
    except (OSError, ValueError) as problem:
        raise DataError(f"{path} cannot be read: {problem}") from None
    if not isinstance(value, dict):
        raise DataError(f"{path} should hold a JSON object, found {type(value).__name__}")
    return value


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise DataError(
            f"{path} needs pyarrow to be read; install it (pip install datasets), or convert the "
            "data to .jsonl"
        ) from None
    return pyarrow


def _arrow(path: Path) -> Iterator[RawRow]:
    pyarrow = _pyarrow(path)
    listed = _json_object(path / "state.json").get("_data_files")
    if not isinstance(listed, list) or not all(isinstance(f, dict) for f in listed):
        raise DataError(f"{path / 'state.json'} lists no _data_files; save the dataset again")
    number = 0
    for entry in listed:
        # `locate` refuses names and links that lead out of the folder.
        try:
            file = locate(path, str(entry.get("filename")))
        except CheckpointError as problem:
            raise DataError(f"a data file of {path / 'state.json'}: {problem}") from None
        try:
            with pyarrow.memory_map(str(file)) as source:
                for batch in pyarrow.ipc.open_stream(source):
                    for value in batch.to_pylist():
                        number += 1
                        yield RawRow(value, file, f"row {number}")
        except (pyarrow.ArrowException, OSError) as problem:
            raise DataError(f"{file} cannot be read as an arrow stream: {problem}") from None


def _parquet(files: list[Path]) -> Iterator[RawRow]:
    pyarrow = _pyarrow(files[0])
    for file in files:
        number = 0
        try:
            with pyarrow.parquet.ParquetFile(file) as source:
                for batch in source.iter_batches():
                    for value in batch.to_pylist():
                        number += 1
                        yield RawRow(value, file, f"row {number}")
        except (pyarrow.ArrowException, OSError) as problem:
            raise DataError(f"{file} cannot be read as parquet: {problem}") from None
