"""Stored matrices that are several projections: taken apart, put together, or refused."""

from pathlib import Path
from typing import Any

import bridged
import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file

from purelm.convert import peft_config
from purelm.convert.fused import joined
from purelm.errors import CheckpointError, SaveError
from purelm.nn import decoder, lora, tree

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
QKV = "model.layers.1.self_attn.qkv_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.save(tiny.hf_model("phi3"), tmp_path / "base")


def adapted(folder: Path, **arguments: Any) -> Any:
    model = bridged.bridge(folder)
    peft_config.apply(model, **{"r": 4, "lora_alpha": 12, **arguments}).eval()
    bridged.spread_trained(model)
    return model


def test_the_parts_lie_above_each_other(folder: Path) -> None:
    model = bridged.bridge(folder)
    stored = load_file(folder / "model.safetensors")[QKV]
    attn = model.params["layers"][1]["attn"]
    assert torch.equal(torch.cat([attn[n]["weight"] for n in "qkv"]), stored)
    storages = {attn[n]["weight"].untyped_storage().data_ptr() for n in "qkv"}
    assert len(storages) == 3


@pytest.mark.parametrize("targets", [["q_proj", "v_proj", "up_proj"], ["k_proj"], "all-linear"])
def test_merged(folder: Path, targets: Any, tmp_path: Path) -> None:
    """transformers runs the merged file, fused as it was, with our logits."""
    model = adapted(folder, target_modules=targets)
    model.save_pretrained_merged(tmp_path / "merged")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    ids = bridged.ids()
    want = decoder.forward(lora.merge(model.params, model.adapters), model.spec, ids).detach()
    assert not torch.allclose(want, bridged.bridge(folder)(ids).logits)
    bridged.same_logits(theirs(ids).logits.detach(), want)
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "merged"))
    assert before.keys() == after.keys()
    if targets == ["k_proj"]:
        same = [torch.equal(*rows) for rows in zip(before[QKV], after[QKV], strict=True)]
        assert same == [True] * 48 + [False] * 24 + [True] * 24


def test_full_fine_tuning(folder: Path, tmp_path: Path) -> None:
    model = bridged.bridge(folder, train_all=True)
    bridged.spread_trained(model)
    model.save_pretrained(tmp_path / "saved")
    again = bridged.bridge(tmp_path / "saved")
    for path, leaf in tree.items(model.params):
        assert torch.equal(tree.at(again.params, path), leaf.detach()), path


def test_some_parts_trained_whole() -> None:
    whole, adapter = torch.ones(2, 3), lora.LoRA(torch.ones(1, 3), torch.ones(2, 1), 1.0)
    for others in (None, adapter):
        with pytest.raises(SaveError, match=r"qkv_proj.* some were trained whole"):
            joined(QKV, [whole, others], [2, 2])
    assert joined(QKV, [None, None], [2, 2]) is None


def test_other_rows(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[QKV] = tensors[QKV][:-1].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"(?s)\[95, 48\].* 96 rows.*qkv_proj"):
        bridged.bridge(folder)
