"""A merge that was killed leaves the old or nothing, and the next goes on where it was."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import bridged
import pytest
import stored_bases
import tiny
import torch

from purelm.convert import atomic, leftovers, merge, peft_config, safetensors_write
from purelm.convert.bridge import CausalLM
from purelm.errors import SaveError

ROOT = Path(__file__).resolve().parents[2]
FILES = 5


def base(tmp_path: Path) -> Path:
    """A model in FILES files."""
    folder = tiny.save(tiny.hf_model("llama"), tmp_path / "base", max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) == FILES
    return folder


def adapted(folder: Path, seed: int = 7, quantize: Any = None) -> CausalLM:
    model = bridged.bridge(folder, quantize=quantize)
    peft_config.apply(model, r=4).eval()
    bridged.spread_trained(model, seed)
    return model


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Crash(BaseException):
    """The process is killed: nothing of the program runs after it."""


@contextmanager
def crash_at(last: int) -> Iterator[None]:
    """Stop at the call number `last` that changes the disk, with no clean-up at all."""
    count = 0

    def stopping(call: Any) -> Any:
        def step(*args: Any, **keywords: Any) -> Any:
            nonlocal count
            count += 1
            if count > last:
                raise Crash
            return call(*args, **keywords)

        return step

    with pytest.MonkeyPatch.context() as patch:
        for name in "mkdir rename replace link rmdir unlink fsync".split():
            patch.setattr(os, name, stopping(getattr(os, name)))
        patch.setattr(atomic, "_exchange", stopping(atomic._exchange))
        patch.setattr(safetensors_write, "_write", stopping(safetensors_write._write))
        yield


@contextmanager
def written() -> Iterator[list[str]]:
    """The names of the files that merges write meanwhile."""
    names: list[str] = []
    write = atomic.write_safetensors

    def noting(path: Path, *rest: Any) -> None:
        names.append(path.name)
        write(path, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merge.atomic, "write_safetensors", noting)
        yield names


def crashed(model: CausalLM, target: Path, at: int, method: str = "merged_16bit") -> bool:
    try:
        with crash_at(at):
            model.save_pretrained_merged(target, save_method=method)
    except Crash:
        return True
    return False


def steps(model: CausalLM, target: Path) -> int:
    """How many calls that change the disk a merge makes: found by halving."""
    low, high = 0, 1000
    while high - low > 1:
        middle = (low + high) // 2
        if crashed(model, target / str(middle), middle):
            low = middle
        else:
            high = middle
    return high


def every_step(tmp_path: Path, chosen: slice) -> None:
    model, older = adapted(base(tmp_path)), adapted(tmp_path / "base", 8)
    model.save_pretrained_merged(tmp_path / "want")
    older.save_pretrained_merged(tmp_path / "older")
    want, old = contents(tmp_path / "want"), contents(tmp_path / "older")
    kept = set()
    for at in range(steps(model, tmp_path / "halves"))[chosen]:
        target = tmp_path / str(at) / "out"
        shutil.copytree(tmp_path / "older", target)
        assert crashed(model, target, at)
        assert contents(target) in (old, want)  # for every reader, without any help of ours
        with written() as names:
            model.save_pretrained_merged(target)
        assert contents(target) == want and os.listdir(target.parent) == ["out"]
        kept.add(FILES - len(names))
    assert kept == set(range(FILES + 1)) if chosen.step is None else len(kept) > 2


def test_a_merge_that_was_killed_is_taken_up(tmp_path: Path) -> None:
    every_step(tmp_path, slice(5, None, 11))


@pytest.mark.full
def test_a_merge_that_was_killed_anywhere_is_taken_up(tmp_path: Path) -> None:
    every_step(tmp_path, slice(None))


def unfinished(model: CausalLM, target: Path, files: int, method: str = "merged_16bit") -> Path:
    """What a merge leaves that is killed when `files` are in its journal."""
    note = merge.merge_journal.note

    def noting(*args: Any) -> None:
        note(*args)
        if len(args[-1]) == files:
            raise Crash

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merge.merge_journal, "note", noting)
        patch.setattr(atomic.shutil, "rmtree", lambda *args, **keywords: None)
        with pytest.raises(Crash):
            model.save_pretrained_merged(target, save_method=method)
    (found,) = target.parent.glob(f".{target.name}.purelm-new-*")
    return found


@pytest.mark.parametrize("method", ["merged_4bit", "merged_16bit_dequantized"])
def test_weights_that_are_in_memory_alone_count_too(method: str, tmp_path: Path) -> None:
    """A quantized weight that is another one now, whose file is the same, is written again."""
    model = adapted(base(tmp_path), quantize="nf4")
    unfinished(model, tmp_path / "out", 3, method)
    with written() as names:
        model.save_pretrained_merged(tmp_path / "out", save_method=method)
    assert len(names) == FILES - 3
    unfinished(model, tmp_path / "other", 3, method)
    with torch.no_grad():
        for layer in model.params["layers"]:
            layer["attn"]["q"]["weight"].absmax_scale.mul_(0.5)
    with written() as names:
        model.save_pretrained_merged(tmp_path / "other", save_method=method)
    assert len(names) > FILES - 3


def test_what_is_not_taken_up(tmp_path: Path) -> None:
    """Files of other adapters, of a base that changed, broken ones, and another's journal."""
    model, target = adapted(base(tmp_path)), tmp_path / "out"
    model.save_pretrained_merged(tmp_path / "want")
    want = contents(tmp_path / "want")

    def again(model: CausalLM) -> int:
        with written() as names:
            model.save_pretrained_merged(target)
        found = contents(target)
        for path in target.iterdir():
            path.unlink()
        target.rmdir()
        assert os.listdir(tmp_path) == before
        assert (found == want) == (model is not other)
        return FILES - len(names)

    other = adapted(tmp_path / "base", 8)
    before = os.listdir(tmp_path)
    unfinished(model, target, 2)
    # The first file holds the embedding, which no adapter changes.
    assert again(other) < 2
    part = unfinished(model, target, 3)
    file = sorted(part.glob("*.safetensors"))[1]
    content = bytearray(file.read_bytes())
    content[-7] ^= 1
    file.write_bytes(content)
    assert again(model) == 2
    part = unfinished(model, target, 3)
    file = sorted(part.glob("*.safetensors"))[0]
    (tmp_path / "base" / "copy").write_bytes(file.read_bytes())
    file.unlink()
    file.symlink_to(tmp_path / "base" / "copy")
    (part / "junk").mkdir()
    assert again(model) == 2
    (tmp_path / "base" / "copy").unlink()
    for text in ("", "[]", '{"model-00001-of-00005.safetensors": 3}', '{"a": ["b", {"c": 1}]}'):
        part = unfinished(model, target, 2)
        (part / leftovers.JOURNAL).write_text(text)
        assert again(model) == 0
    # A folder that somebody holds is let be, and one that is not asked for again goes.
    part = unfinished(model, target, 2)
    with leftovers.locked(part):
        model.save_pretrained_merged(target)
        assert part.exists()
    assert contents(target) == want
    model.save_pretrained(target)
    assert not part.exists()


def test_a_base_that_is_read_otherwise_now_is_merged_into_anew(tmp_path: Path) -> None:
    """The same quantized weights under a corrected config, which alone says what they mean."""
    stored = stored_bases.FORMS["gptq"]()
    folder, target = stored_bases.write(stored, tmp_path / "base"), tmp_path / "out"
    unfinished(adapted(folder), target, 1)
    weights = os.stat(folder / "model.safetensors")
    stored.config["quantization_config"]["checkpoint_format"] = "gptq_v2"
    stored_bases.write(stored, folder)
    os.utime(folder / "model.safetensors", ns=(weights.st_atime_ns, weights.st_mtime_ns))
    model = adapted(folder)
    model.save_pretrained_merged(tmp_path / "want")
    model.save_pretrained_merged(target)
    assert contents(target) == contents(tmp_path / "want")


def test_a_link_to_nowhere_in_what_is_taken_up(tmp_path: Path) -> None:
    model, target = adapted(base(tmp_path)), tmp_path / "out"
    (unfinished(model, target, 2) / "dangling").symlink_to("nowhere")
    with written() as names:
        model.save_pretrained_merged(target)
    assert len(names) == FILES - 2 and not (target / "dangling").is_symlink()


def test_a_failure_that_is_told_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error while going on: the room is free again, and the old is there."""
    model, target = adapted(base(tmp_path)), tmp_path / "out"
    adapted(tmp_path / "base", 8).save_pretrained_merged(target)
    old = contents(target)
    unfinished(model, target, 2)

    def full(file: Any, data: memoryview) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors_write, "_write", full)
    with pytest.raises(SaveError, match=r"No space left on device; what was there before"):
        model.save_pretrained_merged(target)
    assert contents(target) == old and sorted(os.listdir(tmp_path)) == ["base", "out"]


def test_room_that_is_taken_already_is_not_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, target = adapted(base(tmp_path)), tmp_path / "out"
    part = unfinished(model, target, 3)
    there = sum(path.stat().st_size for path in part.iterdir())
    whole = sum(path.stat().st_size for path in (tmp_path / "base").glob("*.safetensors"))
    usage = atomic.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(
        atomic.shutil, "disk_usage", lambda path: usage._replace(free=whole - there + 100)
    )
    with pytest.raises(SaveError, match="are free on its disk"):
        model.save_pretrained_merged(tmp_path / "elsewhere")
    model.save_pretrained_merged(target)
    assert (target / "config.json").exists()


# A process that loads once and is forked for each merge, so that many can be killed.
KILLS = """
import os, random, signal, sys, time
from pathlib import Path
import test_merge_again as t
here, times = Path(sys.argv[1]), int(sys.argv[2])
models = [t.adapted(here / "base", seed) for seed in (7, 8)]
wants = []
for i, model in enumerate(models):
    model.save_pretrained_merged(here / f"want{i}")
    wants.append(t.contents(here / f"want{i}"))
target, rng, taken, old, started = here / "runs" / "out", random.Random(5), 0, None, 0.0
begin = time.perf_counter()
models[0].save_pretrained_merged(here / "timed")
long = time.perf_counter() - begin
for kill in range(times):
    which = rng.randrange(2)
    child = os.fork()
    if child == 0:
        models[which].save_pretrained_merged(target)
        os._exit(0)
    time.sleep(rng.uniform(0, 1.2 * long))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    found = t.contents(target) if target.exists() else None
    assert found in (old, wants[which]), f"kill {kill} left a folder that is neither"
    old = found
    part = list(target.parent.glob(".out.purelm-new-*"))
    if part and (part[0] / t.leftovers.JOURNAL).exists():
        with t.written() as names:
            models[which].save_pretrained_merged(target)
        taken += t.FILES - len(names)
        old = t.contents(target)
        assert old == wants[which] and os.listdir(target.parent) == ["out"]
print(f"{times} kills, {taken} files taken up, 0 mixed")
assert taken or times < 100  # few may all come too early or too late on a busy machine
"""


def killed(tmp_path: Path, times: int) -> None:
    base(tmp_path)
    (tmp_path / "runs").mkdir()
    here = [str(ROOT / "src"), str(ROOT / "tests"), str(Path(__file__).parent)]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILLS, str(tmp_path), str(times)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(here), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    print(done.stdout)
    assert f"{times} kills" in done.stdout


def test_kills_at_moments_that_nobody_chose(tmp_path: Path) -> None:
    killed(tmp_path, 12)


@pytest.mark.full
def test_many_kills(tmp_path: Path) -> None:
    killed(tmp_path, 200)
