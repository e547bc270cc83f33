"""A whole run: what it prints, what it leaves, what it refuses."""

import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from purelm import chat, embedded, sft, sft_job, training
from purelm.errors import ArgumentError, DataError, SaveError, TrainingError
from purelm.sft_options import Options, embedded_options


def options(folder: Path, data: Path, output: Path, **changes: Any) -> Options:
    made = Options(
        model=str(folder),
        data=str(data),
        output=str(output),
        rank=8,
        batch_size=5,
        accumulation=1,
        learning_rate=2e-2,
        max_steps=20,
        eval_data=str(data),
        eval_every=10,
        recompute=False,
        device="cpu",
    )
    return replace(made, **changes)


def lines(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def done(folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(result, what it said, its output folder) of a run in 4 bits."""
    output = tmp_path_factory.mktemp("run") / "out"
    said: list[str] = []
    return sft.run(options(folder, data, output), say=said.append), said, output


def test_the_loss_falls_and_is_reported(done: Any) -> None:
    result, said, output = done
    assert result.loss_after < 0.7 * result.loss_before
    text = "\n".join(said)
    assert f"held-out loss: {result.loss_before:.3f} -> {result.loss_after:.3f}" in text
    assert "prompt: Where is Aldburg?" in text
    assert "answer before:" in text and "answer after:" in text
    for name in ("adapter", "merged", "metrics.jsonl", "loss.png"):
        assert str(output / name) in text


def test_a_model_without_a_chat_template_is_not_sent_to_chat(
    folder: Path, tmp_path: Path, done: Any
) -> None:
    plain = shutil.copytree(folder, tmp_path / "plain")
    (plain / "chat_template.jinja").unlink()
    data = tmp_path / "texts.jsonl"
    data.write_text('{"text": "Where is the town?"}\n')
    said: list[str] = []
    run = options(plain, data, tmp_path / "out", max_steps=1, eval_data=None, eval_every=0)
    sft.run(run, say=said.append)
    assert said[-1].endswith("out/merged --raw --prompt TEXT") and "purelm chat" not in said[-1]
    assert done[1][-1] == f"talk to it: purelm chat {done[2] / 'merged'}"


def test_metrics_have_a_line_per_step_and_evaluation(done: Any) -> None:
    result, _, output = done
    found = lines(output)
    train = [m for m in found if m["kind"] == "train"]
    assert [m["step"] for m in train] == list(range(1, 21))
    assert [m["step"] for m in found if m["kind"] == "eval"] == [0, 10, 20]
    assert found[0]["loss"] == result.loss_before and found[-1]["loss"] == result.loss_after
    for m in train:
        assert math.isfinite(m["loss"]) and m["tokens_per_second"] > 0
        assert m["memory_bytes"] > 1_000_000 and 0 < m["epoch"] <= 10 and m["grad_norm"] > 0


def test_the_output_is_whole(done: Any) -> None:
    result, _, output = done
    assert sorted(f.name for f in output.iterdir()) == [
        "adapter",
        "loss.png",
        "merged",
        "metrics.jsonl",
    ]
    assert result.picture.read_bytes().startswith(b"\x89PNG")


def test_adapter_and_merged_answer_as_trained(done: Any) -> None:
    result, _, _ = done
    question = [{"role": "user", "content": "Where is Aldburg?"}]
    for place, in_4bit in ((result.adapter, True), (result.merged, False)):
        model, tokenizer = chat.load(str(place), in_4bit=in_4bit, device="cpu")
        said = chat.answer(model, tokenizer, question, max_new_tokens=64)
        if in_4bit:
            assert said == result.sample_after
        assert isinstance(said, str)


def test_full_fine_tuning_leaves_a_model(folder: Path, data: Path, tmp_path: Path) -> None:
    run = options(folder, data, tmp_path, precision="full", learning_rate=2e-3, max_steps=8)
    result = sft.run(run, say=lambda line: None)
    assert result.adapter is None and result.merged is not None
    assert result.loss_after is not None and result.loss_before is not None
    assert result.loss_after < result.loss_before
    model, tokenizer = chat.load(str(result.merged), device="cpu")
    question = [{"role": "user", "content": "Where is Aldburg?"}]
    assert chat.answer(model, tokenizer, question, max_new_tokens=64) == result.sample_after


@pytest.mark.parametrize("precision", ["4bit", "fp8"])
def test_products_in_fp8(folder: Path, data: Path, tmp_path: Path, precision: str) -> None:
    run = options(
        *(folder, data, tmp_path),
        **{"precision": precision, "compute": "fp8", "learning_rate": 1e-2, "max_steps": 8},
        merge=False,
    )
    result = sft.run(run, say=lambda line: None)
    assert result.loss_after is not None and result.loss_before is not None
    assert result.loss_after < result.loss_before
    model = sft_job._load(run)[0]
    how = dict(line.split(": ", 1) for line in model.explain().split("\n"))["layers.0.mlp.up"]
    kind = "NF4" if precision == "4bit" else "fp8"
    assert how.startswith(f"{kind}, product of fp8 rows")


def test_without_matplotlib_one_line_says_so(
    folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    said: list[str] = []
    run = options(folder, data, tmp_path, max_steps=1, merge=False, eval_data=None)
    result = sft.run(run, say=said.append)
    assert result.picture is None and not (tmp_path / "loss.png").exists()
    assert sum("pip install" in line for line in said) == 1
    assert result.merged is None and result.loss_before is None and result.sample_after is None


def test_a_prompt_is_asked_in_the_template(folder: Path, data: Path, tmp_path: Path) -> None:
    said: list[str] = []
    run = options(folder, data, tmp_path, max_steps=1, merge=False, prompt="Where is Galt?")
    sft.run(run, say=said.append)
    assert "prompt: Where is Galt?" in said


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0"),
        ({"learning_rate": math.nan}, "learning_rate is nan"),
        ({"warmup": -1}, "warmup is -1"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"max_steps": 0}, "max_steps is 0"),
        ({"epochs": math.inf}, "epochs is inf"),
        ({"schedule": "cosin"}, "schedule is 'cosin'"),
        ({"precision": "8bit"}, "precision is '8bit'"),
        ({"dtype": "float16"}, "dtype is 'float16'"),
        ({"compute": "int8"}, "compute is 'int8'"),
        ({"compute": "fp8", "precision": "16bit"}, "these are kept in 16 bits"),
        ({"eval_fraction": 0.5}, "eval_data and eval_fraction"),
        ({"resume": True, "overwrite": True}, "resume"),
        ({"max_seq_length": 4096}, "the model's context is 128"),
        ({"device": "tpu9"}, "tpu9"),
        ({"target_modules": ("nothing_proj",)}, "nothing_proj"),
    ],
)
def test_bad_options_are_named(
    folder: Path, data: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ArgumentError) as caught:
        sft.run(options(folder, data, tmp_path / "out", **changes))
    assert words in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_bad_data_is_found_before_the_model_is(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{")
    run = options(tmp_path / "no model", tmp_path / "rows.jsonl", tmp_path / "out")
    with pytest.raises(DataError, match="line 1"):
        sft.run(replace(run, eval_data=None))


def test_an_output_that_cannot_be_written(folder: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(SaveError, match="out"):
        sft.run(options(folder, data, tmp_path / "out"))
    assert (tmp_path / "out").read_text() == "a file"


def test_a_step_that_diverges_is_named(
    folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = training.train_step

    def poisoned(model: Any, *args: Any, step: int, **kwargs: Any) -> Any:
        if step == 3:
            with torch.no_grad():
                next(iter(training.trained(model).values())).fill_(math.inf)
        return original(model, *args, step=step, **kwargs)

    monkeypatch.setattr(training, "train_step", poisoned)
    with pytest.raises(TrainingError, match="step 4"):
        sft.run(options(folder, data, tmp_path, eval_data=None), say=lambda line: None)


@pytest.mark.skipif(
    not (embedded.model_folder() / "config.json").exists(), reason="no embedded model"
)
def test_the_run_with_no_arguments(tmp_path: Path) -> None:
    """Its beginning; the embedded model's own tests run it whole, with three seeds."""
    said: list[str] = []
    run = replace(embedded_options(), output=str(tmp_path), device="cpu", max_steps=30)
    result = sft.run(run, say=said.append)
    assert result.loss_before is not None and result.loss_after is not None
    assert result.loss_after < 0.75 * result.loss_before
    assert result.sample_before and result.sample_after
    assert result.sample_before != result.sample_after
    assert result.adapter and result.merged
    base = json.loads((result.adapter / "adapter_config.json").read_text())
    # The name, which means the same on every machine, not where it lies on this one.
    assert base["base_model_name_or_path"] == embedded.MODEL
