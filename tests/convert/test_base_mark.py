"""An adapter knows the weights it was trained on, and is refused beside others like them."""

import shutil
import warnings
from pathlib import Path
from typing import Any

import bridged
import folders
import fp8_folders
import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from purelm import FastLanguageModel
from purelm.convert import base_mark, peft_config
from purelm.convert.shards import open_checkpoint
from purelm.errors import AdapterError

WEIGHTS = "model.safetensors"


def loaded(folder: Path, **options: Any) -> Any:
    options = {"load_in_4bit": False, "dtype": torch.float32, "device_map": "cpu", **options}
    return FastLanguageModel.from_pretrained(folder, **options)[0]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """`base`, and an adapter trained on it in `adapter`."""
    folders.whole(tmp_path / "base")
    model = FastLanguageModel.get_peft_model(loaded(tmp_path / "base"), r=4)
    bridged.spread_trained(model)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path


def change(folder: Path, name: str | None = None) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors = {n: t + 0.01 if name in (None, n) else t for n, t in tensors.items()}
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def test_another_base_of_the_same_shapes_is_refused(place: Path) -> None:
    assert loaded(place / "adapter").worn
    change(place / "base")
    with pytest.raises(AdapterError, match="trained on other weights than those in .*base"):
        loaded(place / "adapter")
    model = loaded(place / "base")
    with pytest.raises(AdapterError, match="trained on other weights"):
        model.load_adapter(place / "adapter", "default")
    assert not model.worn
    model.load_adapter(place / "adapter", "default", check_base=False)
    assert list(model.worn) == ["default"]


def test_a_merged_model_is_another_base(place: Path) -> None:
    loaded(place / "adapter").save_pretrained_merged(place / "merged")
    with pytest.raises(AdapterError, match="trained on other weights"):
        loaded(place / "merged").load_adapter(place / "adapter", "again")


def test_the_same_weights_in_other_files_or_formats_are_taken(place: Path) -> None:
    loaded(place / "base").save_pretrained_merged(place / "parts", max_shard_size="60KB")
    assert len(list((place / "parts").glob("*.safetensors"))) > 2
    loaded(place / "parts").load_adapter(place / "adapter", "default")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the precision
        four = loaded(place / "base", load_in_4bit=True)
        four.load_adapter(place / "adapter", "default")
        four.save_pretrained_merged(place / "four", save_method="merged_4bit")
        loaded(place / "four", load_in_4bit=True).load_adapter(place / "adapter", "again")
    half = {n: t.bfloat16() for n, t in load_file(place / "base" / WEIGHTS).items()}
    save_file(half, place / "base" / WEIGHTS, {"format": "pt"})
    loaded(place / "base").load_adapter(place / "adapter", "default")


def test_every_tensor_counts(tmp_path: Path) -> None:
    folder = tiny.save(tiny.hf_model("llama"), tmp_path / "base")
    have = base_mark.mark(open_checkpoint(folder))
    assert have is not None and have == base_mark.mark(open_checkpoint(folder))
    names, marks = list(load_file(folder / WEIGHTS)), {have}
    for name in names:
        copy = shutil.copytree(folder, tmp_path / name)
        change(copy, name)
        made = base_mark.mark(open_checkpoint(copy))
        assert made is not None and made.partition(":")[0] == have.partition(":")[0]
        marks.add(made)
    assert len(marks) == len(names) + 1


def test_a_base_that_is_gone_hinders_no_saving(tmp_path: Path) -> None:
    folder = tiny.save(tiny.hf_model("llama"), tmp_path / "base")
    model = bridged.bridge(folder)
    peft_config.apply(model, r=4)
    (folder / WEIGHTS).unlink()
    model.save_pretrained(tmp_path / "adapter")
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as file:
        assert "purelm.base" not in file.metadata()


@pytest.mark.parametrize("kind", ["row", "block"])
def test_weights_in_parts(kind: str, tmp_path: Path) -> None:
    fp8_folders.stored(tmp_path / "base", kind)
    assert base_mark.mark(bridged.bridge(tmp_path / "base").origin.checkpoint) is not None
