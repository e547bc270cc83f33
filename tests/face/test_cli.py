"""The command: exit codes, one-line errors, quick help."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import purelm as package
from purelm import cli
from purelm.convert.gguf_architectures import families
from purelm.convert.registry import FAMILIES

# The package that the tests run on, from whatever folder a command is started in.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(package.__file__).parents[1])}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sft", "somewhere"], ["--data is missing", "somewhere"]),
        (["sft", "no/such/folder", "--data", "DATA"], ["no/such/folder"]),
        (["sft", "FOLDER", "--data", "absent.jsonl"], ["absent.jsonl"]),
        (["sft", "FOLDER", "--data", "DATA", "--rank", "0"], ["rank is 0"]),
        (["sft", "FOLDER", "--data", "DATA", "--schedule", "up"], ["schedule is 'up'"]),
        (["sft", "FOLDER", "--data", "DATA", "--resume"], ["nothing to resume"]),
        (["chat", "no/such/folder"], ["no/such/folder"]),
        (["generate", "no/such/folder", "--prompt", "a"], ["no/such/folder"]),
        (["generate", "FOLDER", "--prompt", "a", "--device", "tpu"], ["tpu"]),
        (["generate", "FOLDER", "--raw", "--prompt", ""], ["no tokens"]),
        (["generate", "FOLDER", "--prompt", "a", "--top-p", "0.5"], ["--top-p", "--temperature"]),
        (["chat", "FOLDER", "--seed", "1"], ["--seed", "--temperature"]),
        (
            ["generate", "FOLDER", "--prompt", "a", "--temperature", "1", "--top-p", "3"],
            ["top_p"],
        ),
    ],
)
def test_an_error_is_one_line_and_exit_code_2(
    folder: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    named = {"FOLDER": str(folder), "DATA": str(data)}
    assert cli.main([named.get(a, a) for a in arguments]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("purelm: error: ")
    assert all(word in said for word in words), said
    assert not (tmp_path / "purelm-sft").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "COMMAND"),
        (["train"], "invalid choice"),
        (["sft", "--ranks", "3"], "--ranks"),
        (["sft", "--rank", "three"], "three"),
        (["sft", "--max-steps", "3", "--epochs", "1"], "not allowed with"),
        (["sft", "--4bit", "--full"], "not allowed with"),
        (["generate", "model"], "--prompt"),
    ],
)
def test_a_wrong_command_line_is_argparse_s_error(
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert words in capsys.readouterr().err


def test_options_are_those_given_over_the_defaults() -> None:
    plain = cli.sft_options({})
    assert plain.model == "purelm/tiny" and plain.eval_data is not None
    mine = cli.sft_options({"data": "rows.jsonl", "rank": 3})
    assert (mine.model, mine.data, mine.rank, mine.eval_data) == (
        "purelm/tiny",
        "rows.jsonl",
        3,
        None,
    )
    other = cli.sft_options({"model": "m", "data": "d"})
    assert (other.batch_size, other.accumulation, other.eval_data) == (2, 4, None)


def test_every_option_of_a_run_is_on_the_command_line() -> None:
    from dataclasses import fields

    from purelm.sft_options import Options

    given = "sft m --data d --output o --full --rank 3 --alpha 2 --dropout 0.1 --use-rslora"
    given += " --target-modules q_proj,v_proj --dtype float32 --device cpu --batch-size 2"
    given += " --accumulation 2 --learning-rate 1e-3 --schedule linear --warmup 3 --epochs 2"
    given += " --weight-decay 0 --max-grad-norm 0 --seed 1 --no-recompute --max-seq-length 9"
    given += " --skip-long --eval-fraction 0.1 --eval-every 1 --save-every 1 --prompt p"
    given += " --no-merge --resume --overwrite --no-packing --no-graph --compute fp8"
    given += " --label-smoothing 0.1 --z-loss 1e-4 --optimizer adamw_8bit"
    found = vars(cli._parser().parse_args(given.split()))
    apart = {"max_steps", "eval_data"}
    assert found.keys() - {"run"} == {f.name for f in fields(Options)} - apart
    made = cli.sft_options({k: v for k, v in found.items() if k != "run"})
    assert made.target_modules == ("q_proj", "v_proj") and made.precision == "full"
    assert cli._targets("all-linear") == "all-linear"
    assert cli._targets(r".*\.q_proj") == r".*\.q_proj"


def test_families_lists_the_registry(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["families"]) == 0
    title, *printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert title[0] == "model_type" and title[-1] == "GGUF"
    assert [row[:2] for row in printed] == [[f.model_type, f.hf_class] for f in FAMILIES.values()]
    assert {row[0] for row in printed if row[2] != "-"} == set(families())


def test_help_imports_no_torch() -> None:
    code = "import sys, purelm.cli\nassert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env=ENVIRONMENT)


def test_generate_answers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ["generate", str(folder), "--device", "cpu", "--prompt", "Where?"]
    for extra in ([], ["--raw"], ["--temperature", "0.7", "--top-k", "5", "--seed", "1"]):
        texts = set()
        for _ in range(2):
            assert cli.main([*run, "--max-new-tokens", "8", *extra]) == 0
            texts.add(capsys.readouterr().out)
        assert len(texts) == 1


def test_sft_then_chat(
    folder: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The commands as a user types them, the last one in a pipe."""
    monkeypatch.chdir(tmp_path)
    arguments = ["sft", str(folder), "--data", str(data), "--16bit", "--learning-rate", "0.02"]
    arguments += ["--batch-size", "5", "--accumulation", "1", "--max-steps", "20"]
    arguments += ["--device", "cpu", "--eval-data", str(data), "--no-recompute"]
    assert cli.main(arguments) == 0
    assert "held-out loss" in capsys.readouterr().out
    assert (tmp_path / "purelm-sft" / "loss.png").exists()
    answers = {}
    typed = "Where is Dahl?\n/reset\nWhere is Dahl?\n/exit\n"
    for place in (str(folder), "purelm-sft/adapter", "purelm-sft/merged"):
        chat = ["chat", place, "--device=cpu", "--max-new-tokens=20"]
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        assert cli.main(chat) == 0
        answers[Path(place).name] = capsys.readouterr().out
    assert answers["adapter"] == answers["merged"] != answers["random"]
    first, second = answers["adapter"].splitlines()
    assert first == second and first.strip()
    # Bytes that are no UTF-8 are a question like any other.
    command = [sys.executable, "-m", "purelm", *chat]
    raw = b"\xff\xfe?\n/reset\n" + typed.encode()
    piped = subprocess.run(command, input=raw, capture_output=True, timeout=120, env=ENVIRONMENT)
    assert piped.returncode == 0, piped.stderr
    assert piped.stdout.decode().endswith(answers["merged"])


def test_ctrl_c_saves_the_step_and_says_how_to_go_on(
    folder: Path, data: Path, tmp_path: Path
) -> None:
    """Exit code 130, and a checkpoint of the last step that is in the metrics."""
    command = [sys.executable, "-m", "purelm", "sft", str(folder), "--data", str(data)]
    command += ["--max-steps=100000", "--save-every=100000", "--device=cpu", "--output=out"]
    pipe = subprocess.PIPE
    metrics = tmp_path / "out" / "metrics.jsonl"
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=pipe, stderr=pipe, text=True, env=ENVIRONMENT
    ) as process:
        while process.poll() is None and not (metrics.exists() and metrics.read_text()):
            pass
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "--resume" in said and "Traceback" not in said
    state = json.loads((tmp_path / "out" / "checkpoint" / "train_state.json").read_text())
    last = json.loads(metrics.read_text().splitlines()[-1])
    assert state["step"] == last["step"] >= 1
    assert not [f for f in os.listdir(tmp_path / "out") if f.startswith(".")]


def test_bench_load_prints_its_figures(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--who=purelm", "--repeats=1", f"--output={tmp_path}"]
    assert cli.main(["bench", "load", str(folder), *asked]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(lines[0].removeprefix("RESULT "))
    assert found["model"] == folder.name and found["load_s"] > 0 and found["host_peak_gib"] >= 0
    assert found["parameters"] > 0 and found["read_gb"] >= 0
    assert "load s" in lines[1] and lines[2].startswith("purelm")
    (row,) = csv.DictReader((tmp_path / "load.csv").read_text().splitlines())
    assert row["who"] == "purelm" and float(row["load_s"]) == found["load_s"]
    assert "torch=" in row["versions"]


def test_bench_load_tells_of_what_failed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text((folder / "config.json").read_text())
    assert cli.main(["bench", "load", str(broken), "--who=purelm", "--repeats=1"]) == 1
    assert "purelm failed: exit status 1: " in capsys.readouterr().out
    assert cli.main(["bench", "load", "some/name", "--who=purelm"]) == cli.FAILED


@pytest.mark.full
def test_bench_load_beside_transformers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--who=purelm,hf", "--repeats=1", "--16bit"]
    assert cli.main(["bench", "load", str(folder), *asked]) == 0
    results = [line for line in capsys.readouterr().out.splitlines() if line.startswith("RESULT")]
    ours, theirs = (json.loads(line.removeprefix("RESULT ")) for line in results)
    assert ours["parameters"] == theirs["parameters"]


def test_bench_packing_trains_the_same_either_way(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lengths = tmp_path / "lengths.json"
    lengths.write_text(json.dumps([3, 9, 5, 14, 2, 7]))
    shape = ["--batch", "3", "--steps", "1", "--warmup", "1"]
    assert cli.main(["bench", "packing", str(folder), str(lengths), *shape]) == 0
    found = json.loads(capsys.readouterr().out.removeprefix("RESULT "))
    padded, packed = found["padded_losses"], found["packed_losses"]
    assert len(padded) == len(packed) == 2 and padded == pytest.approx(packed, rel=1e-2)


def test_an_unknown_bench_names_the_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "nothing"]) == cli.FAILED
    assert "load, packing, " in capsys.readouterr().err
