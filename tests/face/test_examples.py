"""Every example runs, and what it trains learns."""

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def example(name: str) -> Any:
    """The program as a module."""
    place = ROOT / "examples" / f"{name}.py"
    described = importlib.util.spec_from_file_location(f"example_{name}", place)
    assert described is not None and described.loader is not None
    module = importlib.util.module_from_spec(described)
    described.loader.exec_module(module)
    return module


def test_functional_loop(folder: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, last = example("functional_loop").main(str(folder), str(data), steps=40, batch=8)
    assert last < 0.8 * first
    assert "step 40/40" in capsys.readouterr().out


def test_qlora_sft(folder: Path, data: Path, tmp_path: Path) -> None:
    first, last = example("qlora_sft").main(
        str(folder), str(data), str(tmp_path), steps=40, batch=8
    )
    assert last < 0.8 * first
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    assert (tmp_path / "merged" / "model.safetensors").exists()


def test_fp8_proof(folder: Path, data: Path) -> None:
    text = f"{folder} {data} --warm 2 --steps 3 --batch 2 --length 24 --seeds 1"
    result = example("fp8_proof").main(text.split())
    assert result["adapter tensors"] > 0 and 0 < result["ratio"]["median"] < 1
    assert len(result["curve, fp8, seed 0"]) == 3
    # Little is trained, and the same in both.
    held = [result[f"held-out loss, {name}"][0] for name in ("bf16", "fp8")]
    assert abs(held[0] - held[1]) < 0.02 * held[0]


def test_full_finetune(folder: Path, data: Path, tmp_path: Path) -> None:
    result = example("full_finetune").main(str(folder), str(data), str(tmp_path), steps=10)
    assert result.loss_after < result.loss_before
    assert (tmp_path / "merged" / "model.safetensors").exists()


@pytest.mark.parametrize("name", ["functional_loop", "qlora_sft", "full_finetune"])
def test_an_example_is_short(name: str) -> None:
    text = (ROOT / "examples" / f"{name}.py").read_text()
    assert len(text.splitlines()) < 80
    # It says how it is run.
    assert re.search(rf"python examples/{name}\.py", text)
