"""A run that was stopped and resumed ends in the same bits as one that was not."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import purelm
from purelm import sft, train_state, training
from purelm.errors import ArgumentError, CheckpointError, PurelmError, SaveError
from purelm.sft_options import Options


class Stopped(Exception):
    """What the tests stop a run with."""


@contextmanager
def final_state() -> Iterator[dict[str, torch.Tensor]]:
    """Collects what a run would save as its state, at every step; the last one stays."""
    seen: dict[str, torch.Tensor] = {}
    with pytest.MonkeyPatch.context() as patch:
        original = training.train_step

        def watched(model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(model, optimizer, *args, **kwargs)
            for name, p in training.trained(model).items():
                seen[name] = p.detach().clone()
                for key, value in optimizer.state[p].items():
                    seen[f"{key}.{name}"] = torch.as_tensor(value).clone()
            return result

        patch.setattr(training, "train_step", watched)
        yield seen


def options(folder: Path, data: Path, output: Path, **changes: Any) -> Options:
    made = Options(
        model=str(folder),
        data=str(data),
        output=str(output),
        precision="4bit",
        rank=4,
        dropout=0.3,
        batch_size=2,
        accumulation=2,
        learning_rate=1e-2,
        max_steps=12,
        save_every=6,
        eval_fraction=0.2,
        eval_every=3,
        device="cpu",
        merge=False,
    )
    return replace(made, **changes)


def train(run: Options, stop_at: int | None = None) -> sft.Result | None:
    def on_step(step: int) -> None:
        if step == stop_at:
            raise Stopped

    try:
        return sft.run(run, say=lambda line: None, on_step=on_step)
    except Stopped:
        return None


def losses(output: Path) -> list[tuple[str, int, float]]:
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [(m["kind"], m["step"], m["loss"]) for m in map(json.loads, lines)]


@pytest.mark.parametrize(
    ("precision", "optimizer"),
    [("4bit", "adamw_torch_fused"), ("full", "adamw_torch_fused"), ("full", "adamw_8bit")],
)
def test_resumed_equals_straight(
    folder: Path, data: Path, tmp_path: Path, precision: str, optimizer: str
) -> None:
    run = options(folder, data, tmp_path / "straight", precision=precision, optimizer=optimizer)
    if precision == "full":
        run = replace(run, learning_rate=1e-3)
    with final_state() as straight:
        whole = train(run)
    stopped = replace(run, output=str(tmp_path / "resumed"))
    # Two steps past the checkpoint: what they did must not be seen afterwards.
    assert train(stopped, stop_at=8) is None
    assert train_state.exists(sft.checkpoint_folder(stopped))
    with final_state() as resumed:
        result = train(replace(stopped, resume=True))
    assert straight.keys() == resumed.keys() and len(straight) > 10
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    eight = any(name.startswith("state") and t.dtype == torch.uint8 for name, t in straight.items())
    assert eight == (optimizer == "adamw_8bit")
    assert losses(tmp_path / "straight") == losses(tmp_path / "resumed")
    assert whole is not None and result is not None
    assert replace(whole, metrics=result.metrics) == replace(
        result, adapter=whole.adapter, merged=whole.merged, picture=whole.picture
    )
    assert not sft.checkpoint_folder(stopped).exists()


def test_a_run_draws_from_no_other_generator(folder: Path, data: Path, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    with final_state() as first:
        train(options(folder, data, tmp_path / "one", max_steps=2))
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(7)
    with final_state() as second:
        train(options(folder, data, tmp_path / "two", max_steps=2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    with final_state() as other:
        train(options(folder, data, tmp_path / "three", max_steps=2, seed=1))
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.fixture(scope="module")
def stopped(folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Options:
    """A run that stopped after six of twelve steps."""
    run = options(folder, data, tmp_path_factory.mktemp("stopped") / "run", eval_fraction=0.0)
    train(run, stop_at=6)
    return run


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rank": 8}, "rank was 4, is 8"),
        ({"dropout": 0.0}, "dropout was 0.3, is 0.0"),
        ({"seed": 1}, "seed was 3407, is 1"),
        ({"batch_size": 4}, "batch_size was 2, is 4"),
        ({"learning_rate": 1e-3}, "learning_rate was 0.01, is 0.001"),
        ({"max_steps": 13}, "steps was 12, is 13"),
        ({"precision": "16bit"}, "precision was '4bit', is '16bit'"),
        ({"target_modules": ("q_proj",)}, "target_modules was None, is ['q_proj']"),
        ({"eval_fraction": 0.2}, "data was"),
    ],
)
def test_another_run_is_not_resumed(stopped: Options, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        train(replace(stopped, resume=True, **changes))
    assert words in str(caught.value)
    assert train_state.exists(sft.checkpoint_folder(stopped))


def test_another_model_is_not_resumed(stopped: Options, tmp_path: Path, folder: Path) -> None:
    copy = tmp_path / "other"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-6}))
    with pytest.raises(ArgumentError, match="model was"):
        train(replace(stopped, resume=True, model=str(copy)))


def test_a_constant_rate_may_go_on_for_longer(folder: Path, data: Path, tmp_path: Path) -> None:
    run = options(
        folder, data, tmp_path / "straight", schedule="constant", warmup=2, eval_fraction=0.0
    )
    with final_state() as straight:
        train(run)
    parts = replace(run, output=str(tmp_path / "parts"), max_steps=8)
    train(parts, stop_at=8)
    with final_state() as longer:
        train(replace(parts, max_steps=12, resume=True))
    assert straight and all(torch.equal(straight[name], longer[name]) for name in straight)


def test_a_run_whose_saving_failed_needs_no_training_again(
    folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = options(folder, data, tmp_path, max_steps=2)

    def full_disk(job: Any, output: Path) -> Any:
        raise SaveError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(sft, "_save", full_disk)
        with pytest.raises(SaveError):
            train(run)
    with final_state() as trained:
        result = train(replace(run, resume=True))
    assert not trained and result is not None and result.loss_after is not None
    assert [(kind, step) for kind, step, _ in losses(tmp_path)] == [
        ("eval", 0),
        ("train", 1),
        ("train", 2),
        ("eval", 2),
    ]


def test_an_unfinished_run_is_not_overwritten_unasked(stopped: Options) -> None:
    with pytest.raises(ArgumentError, match="--resume.*--overwrite"):
        train(stopped)
    with pytest.raises(ArgumentError, match="nothing to resume"):
        train(replace(stopped, output=stopped.output + "-absent", resume=True))
    assert not Path(stopped.output + "-absent").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("train_state.json", b""),
        ("train_state.json", b'{"format": "other"}'),
        ("train_state.json", b'{"format": "purelm-train-state-1", "step": "6"}'),
        ("train_state.safetensors", b""),
        ("train_state.safetensors", None),
    ],
)
def test_a_broken_checkpoint_is_named(
    stopped: Options, tmp_path: Path, name: str, content: bytes | None
) -> None:
    state = tmp_path / "checkpoint"
    state.mkdir()
    for file in sft.checkpoint_folder(stopped).iterdir():
        (state / file.name).write_bytes(file.read_bytes())
    broken = state / name
    broken.write_bytes(broken.read_bytes()[:-100] if content is None else content)
    with pytest.raises(CheckpointError, match=name):
        train(replace(stopped, output=str(tmp_path), resume=True))


def test_overwriting_keeps_files_that_are_not_ours(
    folder: Path, data: Path, tmp_path: Path
) -> None:
    run = options(folder, data, tmp_path, max_steps=4, save_every=2)
    assert train(run, stop_at=3) is None
    (tmp_path / "checkpoint" / "notes.txt").write_text("mine")
    train(replace(run, overwrite=True))
    assert [f.name for f in (tmp_path / "checkpoint").iterdir()] == ["notes.txt"]


# A process that is forked for each kill; it trains straight first.
KILLS = """
import os, signal, sys
from dataclasses import replace
from pathlib import Path
import test_resume as t
import torch
folder, data, here = map(Path, sys.argv[1:])
run = t.options(folder, data, here / "straight", max_steps=20, save_every=2)
run = replace(run, recompute=True, eval_every=10)
with t.final_state() as straight:
    t.train(run)
for at in (3, 7, 10, 14, 19):
    killed = replace(run, output=str(here / f"killed-{at}"))
    child = os.fork()
    if child == 0:
        t.sft.run(killed, say=lambda line: None,
                  on_step=lambda step: step == at and os.kill(os.getpid(), signal.SIGKILL))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    with t.final_state() as resumed:
        t.train(replace(killed, resume=True))
    assert straight and straight.keys() == resumed.keys()
    assert all(torch.equal(straight[name], resumed[name]) for name in straight), at
    assert t.losses(here / "straight") == t.losses(here / f"killed-{at}"), at
print("5 kills in 20 steps, every bit the same")
"""


def test_a_killed_process_goes_on(folder: Path, data: Path, tmp_path: Path) -> None:
    """SIGKILL in 5 of 20 steps: dropout, shuffled rows, accumulation, layers that are run again."""
    here = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    here.append(str(Path(purelm.__file__).parents[1]))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILLS, str(folder), str(data), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(here), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "every bit the same" in done.stdout


def test_errors_leave_no_folder(folder: Path, tmp_path: Path) -> None:
    run = options(folder, tmp_path / "absent.jsonl", tmp_path / "out")
    with pytest.raises(PurelmError):
        train(run)
    assert not (tmp_path / "out").exists()
