"""A save while the power goes: what was not flushed is lost, and the old or the new is whole.

The model: a file holds what it held when it was last flushed, nothing if it never was. The names
in a folder are those of its last flush, or those it had when the power went; the folder that holds
the target and those within it may differ in that.
"""

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from generations import generation_of, save_generation
from safetensors.torch import load_file

from purelm.convert import atomic, leftovers, merge_journal, safetensors_write
from purelm.convert.hub import resolve

CALLS = "mkdir rename replace link symlink rmdir unlink fsync open".split()
OPEN, FSYNC = os.open, os.fsync


@dataclass
class Disk:
    """Everything below `root`: what it holds, and what of that would be there after a power cut."""

    root: Path
    flushed: dict[int, Any] = field(default_factory=dict)  # inode -> content, or names and inodes
    held: dict[int, int] = field(default_factory=dict)  # open, so that no inode is used again
    states: list[tuple[dict[int, Any], dict[int, Any]]] = field(default_factory=list)

    def now(self) -> dict[int, Any]:
        found: dict[int, Any] = {}
        for here, folders, names in os.walk(self.root):
            entries = {}
            for name in [*folders, *names]:
                path = os.path.join(here, name)
                inode = os.lstat(path).st_ino
                entries[name] = inode
                if name in names:
                    found[inode] = self._content(path, inode)
            found[os.stat(here).st_ino] = entries
            self._hold(here)
        return found

    def _content(self, path: str, inode: int) -> bytes:
        self._hold(path)
        return os.pread(self.held[inode], 1 << 20, 0)

    def _hold(self, path: str) -> None:
        inode = os.stat(path).st_ino
        if inode not in self.held:
            self.held[inode] = OPEN(path, os.O_RDONLY)

    def flush(self, descriptor: int) -> None:
        status = os.fstat(descriptor)
        if status.st_ino in (now := self.now()):
            self.flushed[status.st_ino] = now[status.st_ino]

    def keep(self) -> None:
        """Remember this moment."""
        self.states.append((self.now(), dict(self.flushed)))

    def after(
        self, state: tuple[dict[int, Any], dict[int, Any]], place: Path, outer: bool, inner: bool
    ) -> None:
        """Make what the power cut leaves; outer, inner: whether names since the last flush are."""
        now, flushed = state
        root = os.stat(self.root).st_ino

        def make(inode: int, path: Path) -> None:
            names = isinstance(now.get(inode, flushed.get(inode)), dict)
            if not names:
                path.write_bytes(flushed.get(inode, b""))
                return
            path.mkdir()
            current = outer if inode == root else inner
            # A folder that is gone by now has the names that it was flushed with.
            have = now.get(inode, flushed.get(inode)) if current else flushed.get(inode, {})
            for name, child in have.items():
                make(child, path / name)

        make(root, place)

    def close(self) -> None:
        for descriptor in self.held.values():
            os.close(descriptor)


@contextmanager
def watched(root: Path) -> Iterator[Disk]:
    """The disk while the block saves: before each call that changes it, and at the end."""
    disk = Disk(root)
    disk.flushed = disk.now()

    def noting(call: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **keywords: Any) -> Any:
            disk.keep()
            return call(*args, **keywords)

        return step

    def fsync(descriptor: int) -> None:
        disk.keep()
        FSYNC(descriptor)
        disk.flush(descriptor)

    with pytest.MonkeyPatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, noting(getattr(os, name)))
        patch.setattr(os, "fsync", fsync)
        patch.setattr(atomic, "_exchange", noting(atomic._exchange))
        patch.setattr(safetensors_write, "_write", noting(safetensors_write._write))
        yield disk
    disk.keep()


def outcomes(disk: Disk, tmp_path: Path, read: Callable[[Path], Any]) -> tuple[set[Any], set[Any]]:
    """What is read after a power cut at each moment, and at the last."""
    found, last = set(), set()
    ways = list(itertools.product((True, False), repeat=2))
    for i, state in enumerate(disk.states):
        for j, (outer, inner) in enumerate(ways):
            place = tmp_path / f"cut-{i}-{j}"
            disk.after(state, place, outer, inner)
            value = read(place)
            found.add(value)
            if i == len(disk.states) - 1:
                last.add(value)
    disk.close()
    return found, last


@pytest.mark.parametrize("swap", ["exchange", "two renames"])
def test_a_folder(swap: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if swap == "two renames":
        monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    root = tmp_path / "disk"
    save_generation(root / "out", 1)
    (root / "out" / "notes.txt").write_text("mine")
    with watched(root) as disk:
        save_generation(root / "out", 2)

    def read(place: Path) -> int:
        folder = resolve(place / "out").folder
        assert (folder / "notes.txt").read_text() == "mine"
        return generation_of(folder)

    found, last = outcomes(disk, tmp_path, read)
    assert found == {1, 2} and last == {2} and len(disk.states) > 30


def test_a_file(tmp_path: Path) -> None:
    root = tmp_path / "disk"
    root.mkdir()
    (root / "state.json").write_text("one")
    with watched(root) as disk, atomic.file(root / "state.json") as new:
        new.write_text("two")
    found, last = outcomes(disk, tmp_path, lambda place: (place / "state.json").read_text())
    assert found == {"one", "two"} and last == {"two"}


def test_a_save_that_does_not_flush_would_be_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic, "_flush_tree", lambda new: None)
    root = tmp_path / "disk"
    save_generation(root / "out", 1)
    with watched(root) as disk:
        save_generation(root / "out", 2)

    def read(place: Path) -> Any:
        try:
            return generation_of(resolve(place / "out").folder)
        except Exception:
            return None

    assert None in outcomes(disk, tmp_path, read)[0]


def test_a_journal_says_no_more_than_is_on_the_disk(tmp_path: Path) -> None:
    """What a merge's journal names is there whole, whenever the power went."""
    root = tmp_path / "disk"
    new = root / f".out.purelm-new-{'0' * 16}"
    new.mkdir(parents=True)
    files = ["model-0.safetensors", "model-1.safetensors"]
    plan = dict.fromkeys(files, "made of")
    save_generation(root / "elsewhere", 1)
    with watched(root) as disk:
        done: dict[str, dict[str, bytes]] = {}
        for i, name in enumerate(files):
            (new / name).write_bytes((root / "elsewhere" / name).read_bytes())
            tensors = load_file(new / name)
            done[name] = {n: merge_journal.digest(t) for n, t in tensors.items()}
            merge_journal.note(new, plan, done)
            assert len(done) == i + 1

    def read(place: Path) -> int:
        part = place / new.name
        if not (part / leftovers.JOURNAL).is_file():
            return 0
        noted = merge_journal._read(part)
        assert merge_journal.taken_up(part, plan).keys() == noted.keys()
        return len(noted)

    found, last = outcomes(disk, tmp_path, read)
    assert found == {0, 1, 2} and last == {2}
