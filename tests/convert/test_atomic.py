"""Saving: whatever happens, and whenever, the old or the new is there whole."""

import errno
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from generations import generation_of, save_generation, write_generation

from purelm.convert import atomic
from purelm.convert.atomic import is_leftover, recover
from purelm.convert.hub import resolve
from purelm.errors import LoadError, SaveError, SourceError

ROOT = Path(__file__).resolve().parents[2]


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.fixture(params=["exchange", "two renames"])
def swap(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "two renames":
        monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    return str(request.param)


def test_a_new_folder(tmp_path: Path) -> None:
    target = tmp_path / "runs" / "out"
    with atomic.folder(target) as new:
        assert new.parent == target.parent and is_leftover(new)
        write_generation(new, 1)
        assert not target.exists()
    assert generation_of(target) == 1
    assert names(tmp_path / "runs") == ["out", *(f"out/{n}" for n in names(target))]
    (tmp_path / "plain").mkdir()
    assert target.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_an_existing_folder_keeps_what_is_not_replaced(tmp_path: Path, swap: str) -> None:
    target = tmp_path / "out"
    save_generation(target, 1)
    (target / "model-9.safetensors").write_bytes(b"a stale shard")
    (target / "notes.txt").write_text("mine")
    (target / "checkpoint-1").mkdir()
    (target / "checkpoint-1" / "model-1.safetensors").write_bytes(b"of another checkpoint")
    (target / "logs").symlink_to("checkpoint-1")
    target.chmod(0o750)
    log = (target / "train.log").open("w")
    save_generation(target, 2)
    assert generation_of(target) == 2
    assert not (target / "model-9.safetensors").exists()
    assert (target / "notes.txt").read_text() == "mine"
    assert (
        target / "checkpoint-1" / "model-1.safetensors"
    ).read_bytes() == b"of another checkpoint"
    assert os.readlink(target / "logs") == "checkpoint-1"
    assert target.stat().st_mode & 0o777 == 0o750
    # A file that is being written goes on being the same file.
    log.write("step 1")
    log.close()
    assert (target / "train.log").read_text() == "step 1"
    assert os.listdir(tmp_path) == ["out"]


def test_subfolders_are_merged(tmp_path: Path, swap: str) -> None:
    target = tmp_path / "out"
    (target / "adapter").mkdir(parents=True)
    (target / "adapter" / "old.txt").write_text("old")
    (target / "adapter" / "same.txt").write_text("old")
    with atomic.folder(target) as new:
        (new / "adapter").mkdir()
        (new / "adapter" / "same.txt").write_text("new")
    assert (target / "adapter" / "old.txt").read_text() == "old"
    assert (target / "adapter" / "same.txt").read_text() == "new"


def test_what_others_add_meanwhile_is_kept(
    tmp_path: Path, swap: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    save_generation(target, 1)
    put_in = atomic._swap_in

    def late(new: Path, place: Path) -> Path | None:
        (place / "late.txt").write_text("late")
        return put_in(new, place)

    monkeypatch.setattr(atomic, "_swap_in", late)
    save_generation(target, 2)
    assert generation_of(target) == 2
    assert (target / "late.txt").read_text() == "late"


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path, swap: str) -> None:
    save_generation(tmp_path / "real", 1)
    (tmp_path / "latest").symlink_to("real")
    save_generation(tmp_path / "latest", 2)
    assert (tmp_path / "latest").is_symlink()
    assert generation_of(tmp_path / "real") == 2


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_an_exception_leaves_the_old_and_passes_through(
    tmp_path: Path, error: BaseException
) -> None:
    target = tmp_path / "out"
    save_generation(target, 1)
    before = names(tmp_path)
    with pytest.raises(type(error)), atomic.folder(target) as new:
        write_generation(new, 2)
        raise error
    assert generation_of(target) == 1
    assert names(tmp_path) == before


def test_single_files(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    for text in ("one", "two"):
        with atomic.file(path) as new:
            new.write_text(text)
        assert path.read_text() == text
    with pytest.raises(ZeroDivisionError), atomic.file(path) as new:
        new.write_text("three")
        raise ZeroDivisionError
    assert path.read_text() == "two"
    assert os.listdir(tmp_path) == ["state.json"]


def test_misuse_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(SaveError, match="is a file"), atomic.folder(tmp_path / "file"):
        pass
    with pytest.raises(SaveError, match="is a folder"), atomic.file(tmp_path / "folder"):
        pass
    with (
        pytest.raises(SaveError, match="cannot be written"),
        atomic.folder(tmp_path / "file" / "a"),
    ):
        pass
    monkeypatch.chdir(tmp_path / "folder")
    for place in (".", "..", tmp_path / "folder"):
        with pytest.raises(SaveError, match="working directory"), atomic.folder(place):
            pass
    name = tmp_path / f".out.purelm-new-{'0' * 16}"
    with pytest.raises(SaveError, match="unfinished"), atomic.folder(name):
        pass


# ENOSPC and its kin.
def test_too_little_room_is_said_before_anything_is_written(tmp_path: Path) -> None:
    target = tmp_path / "out"
    save_generation(target, 1)
    with (
        pytest.raises(SaveError, match=r"needs 1,152,921,504,606,846,976 bytes"),
        atomic.folder(target, need_bytes=1 << 60),
    ):
        raise AssertionError("the block must not run")
    assert generation_of(target) == 1


FULL_AT = [0, 1, 7, 8, 9, 63, 79, 80, 200, 2040, 3999, 4000, 4079, 4080, 4081, 4100, 8160, 9000]
FULL_AT += [12_239, 16_200]


@pytest.mark.parametrize("at", FULL_AT)
def test_a_full_disk_at_any_byte(tmp_path: Path, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from purelm.convert import safetensors_write

    target = tmp_path / "out"
    save_generation(target, 1)
    before = names(tmp_path)
    left = at
    write = safetensors_write._write

    def until_full(file: object, data: memoryview) -> None:
        nonlocal left
        write(file, data[:left])  # type: ignore[arg-type]
        left -= len(data)
        if left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(safetensors_write, "_write", until_full)
    with pytest.raises(SaveError, match=r"out could not be written: No space left.*untouched"):
        save_generation(target, 2)
    monkeypatch.undo()
    assert generation_of(target) == 1
    assert names(tmp_path) == before
    save_generation(target, 3)
    assert generation_of(target) == 3


@pytest.mark.parametrize("limit", [100, 4000, 4050])
def test_a_file_size_limit_of_the_system(tmp_path: Path, limit: int) -> None:
    target = tmp_path / "out"
    save_generation(target, 1)
    script = f"""
        import resource, signal
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
        try:
            save_generation(Path({str(target)!r}), 2)
        except SaveError as problem:
            assert "File too large" in str(problem), problem
            raise SystemExit(7)
    """
    assert run(script).wait() == 7
    assert generation_of(target) == 1
    assert os.listdir(tmp_path) == ["out"]


def test_flushing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out"
    save_generation(target, 1)

    def fails(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(SaveError, match="Input/output error"):
        save_generation(target, 2)
    assert generation_of(target) == 1


def test_everything_is_flushed_before_the_swap_and_the_parent_after(
    tmp_path: Path, swap: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    save_generation(target, 1)
    done: list[str] = []

    def noting(fsync: Callable[[int], None]) -> Callable[[int], None]:
        def note(descriptor: int) -> None:
            done.append(os.readlink(f"/proc/self/fd/{descriptor}"))
            fsync(descriptor)

        return note

    put_in = atomic._swap_in

    def swapping(new: Path, place: Path) -> Path | None:
        done.append("swap")
        return put_in(new, place)

    monkeypatch.setattr(os, "fsync", noting(os.fsync))
    monkeypatch.setattr(atomic, "_swap_in", swapping)
    with atomic.folder(target) as new:
        write_generation(new, 2)
        (new / "deep").mkdir()
        (new / "deep" / "file").write_text("x")
        wanted = {str(new), *(str(new / n) for n in names(new))}
    before, after = set(done[: done.index("swap")]), done[done.index("swap") + 1 :]
    assert wanted <= before
    assert after == [str(tmp_path)]


# Crashes.
def run(script: str) -> subprocess.Popen[bytes]:
    """A process that runs `script` with the names of this file."""
    start = (
        f"import sys, importlib.util; sys.path[:0] = [{str(ROOT / 'src')!r}, "
        f"{str(ROOT / 'tests')!r}]\n"
        f"spec = importlib.util.spec_from_file_location('t', {__file__!r})\n"
        "t = importlib.util.module_from_spec(spec); spec.loader.exec_module(t)\n"
        "globals().update(vars(t))\n"
    )
    return subprocess.Popen([sys.executable, "-c", start + textwrap.dedent(script)])


def _kill_while_saving(target: Path, times: int, *, exchange: bool) -> None:
    """One process is forked for each kill, at a moment that nobody chose."""
    save_generation(target, 1)
    script = f"""
        import random, signal, time
        rng, target, reached, moved = random.Random(0), Path({str(target)!r}), 1, 0
        if not {exchange}:
            atomic._exchange = lambda one, other: False
        for kill in range({times}):
            child = os.fork()
            if child == 0:
                generation = 1000 * (kill + 1)
                while True:
                    generation += 1
                    save_generation(target, generation)
            time.sleep(rng.uniform(0.0, 0.1))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            # With an exchange, for every reader in the world, without any help of ours.
            found = generation_of(target if {exchange} else resolve(target).folder)
            assert found == reached or found > 1000 * (kill + 1), (found, reached)
            moved += found != reached
            reached = found
            (target / "notes.txt").touch()
        assert moved > {times} / 3, "nothing was saved before most kills"
        print({times}, "kills,", moved, "of them after a save, 0 mixed", flush=True)
    """
    assert run(script).wait() == 0
    save_generation(target, 1)
    assert os.listdir(target.parent) == [target.name], "left-overs are not cleared away"
    assert (target / "notes.txt").exists()


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two renames"])
def test_kill_while_saving(tmp_path: Path, exchange: bool) -> None:
    _kill_while_saving(tmp_path / "out", 25, exchange=exchange)


@pytest.mark.full
@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two renames"])
def test_kill_while_saving_full(tmp_path: Path, exchange: bool) -> None:
    _kill_while_saving(tmp_path / "out", 200, exchange=exchange)


class Crash(BaseException):
    """The power goes: nothing of the program runs after it."""


def test_a_crash_at_every_step(tmp_path: Path, swap: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop at the n-th call that touches the disk, for every n, with no clean-up at all."""
    calls = "mkdir rename replace link symlink rmdir unlink fsync open".split()
    outcomes = set()
    for stop_at in range(10_000):
        parent = tmp_path / str(stop_at)
        target = parent / "out"
        save_generation(target, 1)
        (target / "notes.txt").write_text("mine")
        count = 0
        with monkeypatch.context() as patch:

            def stopping(call: Callable[..., object], last: int = stop_at) -> Callable[..., object]:
                def step(*args: object, **keywords: object) -> object:
                    nonlocal count
                    count += 1
                    if count > last:
                        raise Crash
                    return call(*args, **keywords)

                return step

            for name in calls:
                patch.setattr(os, name, stopping(getattr(os, name)))
            exchange = atomic._exchange
            patch.setattr(atomic, "_exchange", stopping(exchange))
            try:
                save_generation(target, 2)
                crashed = False
            except Crash:
                crashed = True
        folder = resolve(target).folder
        assert (folder / "notes.txt").read_text() == "mine"
        outcomes.add(generation_of(folder))
        if swap == "exchange":
            assert generation_of(target) in (1, 2)
        recover(target)
        assert os.listdir(parent) == ["out"]
        if not crashed:
            break
    assert stop_at > 20, "too few steps were seen to mean anything"
    assert outcomes == {1, 2}
    assert generation_of(target) == 2


def test_left_overs_are_no_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(Crash), atomic.folder(tmp_path / "out") as new:
        write_generation(new, 1)
        with pytest.raises(SourceError, match="interrupted save"):
            resolve(new)
        raise Crash
    with pytest.raises(LoadError, match="no folder"):
        resolve(tmp_path / "out")


def test_recover_leaves_a_running_save_alone(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with atomic.folder(target) as new:
        write_generation(new, 1)
        recover(target)
        assert new.is_dir()
    with atomic.file(tmp_path / "file") as new:
        new.write_text("x")
        recover(tmp_path / "file")
        assert new.read_text() == "x"
    assert generation_of(target) == 1


def test_recover_touches_nobody_elses_files(tmp_path: Path) -> None:
    others = [
        f".other.purelm-new-{'0' * 16}",
        f"out.purelm-new-{'0' * 16}",
        ".out.purelm-new-1",
        ".out.swp",
        f".out.purelm-new-{'0' * 16}.txt",
    ]
    for name in others:
        (tmp_path / name).mkdir()
    (tmp_path / f".out.purelm-new-{'1' * 16}").mkdir()
    (tmp_path / f".out.purelm-old-{'1' * 16}").mkdir()
    (tmp_path / f".out.purelm-old-{'1' * 16}" / "a").touch()
    recover(tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == sorted([*others, "out"])
    assert os.listdir(tmp_path / "out") == ["a"]
