"""load_in_8bit: transformers' bytes and logits with bitsandbytes; trains, reports and merges."""

from pathlib import Path
from typing import Any

import bridged
import folders
import pytest
import torch
import transformers
from safetensors.torch import load_file

import purelm
from purelm.errors import ArgumentError, ConfigError
from purelm.nn import decoder, lora, tree
from purelm.quant.int8 import Int8

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("int8")
    folders.whole(path, "qwen2")
    return path


def load(folder: Path, **options: Any) -> Any:
    given = {"load_in_8bit": True, "dtype": torch.float32, "device_map": "cpu", **options}
    return purelm.FastLanguageModel.from_pretrained(folder, **given)[0]


def test_bytes_and_logits_of_transformers(folder: Path) -> None:
    pytest.importorskip("bitsandbytes")
    hf: Any = transformers
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        dense = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16)
        plain = dense(bridged.ids()).logits.float()
        theirs = hf.AutoModelForCausalLM.from_pretrained(
            folder,
            quantization_config=hf.BitsAndBytesConfig(load_in_8bit=True),
            device_map="cpu",
            dtype=torch.float16,
        )
        want = theirs(bridged.ids()).logits.float()
    ours = load(folder, dtype=torch.float16)
    state = theirs.state_dict()
    found = {p: leaf for p, leaf in tree.items(ours.params) if isinstance(leaf, Int8)}
    assert len(found) == 7 * len(ours.spec.layers)
    for path, leaf in found.items():
        name = ours.origin.family.names.to_hf(path)
        assert torch.equal(leaf.codes, state[name])
        assert torch.equal(leaf.scale, state[name.removesuffix("weight") + "SCB"])
    got = ours(bridged.ids()).logits.detach().float()
    lost = (want - plain).abs().mean()
    # As in tests/parity/test_int8.py: roundings between the steps turn some codes.
    assert lost > 0 and (got - want).abs().mean() < 0.75 * lost


def test_it_trains_the_same_whatever_is_kept(folder: Path) -> None:
    model = purelm.FastLanguageModel.get_peft_model(load(folder), r=4, lora_dropout=0.1)
    bridged.spread_trained(model)
    bridged.assert_trains(model)


def test_per_sample_gradients(folder: Path) -> None:
    spec, params = purelm.load(folder, quantize="int8", device="cpu")
    adapters = lora.init(spec, rank=2, generator=torch.Generator().manual_seed(0), start="random")
    for a, b in bridged.per_sample(spec, params, adapters):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=float(b.abs().max()) * 1e-4)


def test_report_generation_and_merge(folder: Path, tmp_path: Path) -> None:
    model = purelm.FastLanguageModel.get_peft_model(load(folder, quant_skip=["q_proj"]), r=4)
    bridged.spread_trained(model)
    assert "18 of 39 weights in int8 (a scale a row, inputs from 6 on apart)" in model.report()
    lines = dict(line.split(": ", 1) for line in model.explain().split("\n"))
    assert lines["layers.0.mlp.up"].startswith("int8") and "int8" not in lines["layers.0.attn.q"]
    model.eval()
    out = model.generate(bridged.ids(length=5), max_new_tokens=4, do_sample=False)
    assert out.shape == (2, 9)
    model.save_pretrained_merged(tmp_path / "merged")
    name = "model.layers.1.mlp.down_proj.weight"
    change = lora.delta(model.adapters["layers"][1]["mlp"]["down"]).detach()
    base = load_file(folder / "model.safetensors")[name]
    merged = load_file(tmp_path / "merged/model.safetensors")[name]
    torch.testing.assert_close(merged, base + change)
    # In memory the adapter is added to what was trained against: the dequantized weight.
    dense = lora.merge(model.params, model.adapters)
    near = decoder.forward(dense, model.spec, bridged.ids()).detach()
    far = model(bridged.ids()).logits.detach()
    assert (near - far).abs().mean() < 0.1 * far.abs().mean()
    with pytest.raises(ArgumentError, match="merged_4bit"):
        model.save_pretrained_merged(tmp_path / "four", save_method="merged_4bit")


def test_the_base_is_frozen_and_keeps_its_dtypes(folder: Path) -> None:
    model = load(folder)
    leaf = model.params["layers"][0]["mlp"]["up"]["weight"]
    assert not any(t.requires_grad for t in leaf.tensors) and leaf.codes.dtype == torch.int8
    names = {name for name, _ in model.named_parameters()}
    assert "model.layers.0.mlp.up_proj.weight_scale" in names and model.state_dict() == {}
    assert model.to("cpu").params["layers"][0]["mlp"]["up"]["weight"].scale.dtype == torch.float32
    assert model.num_parameters() == load(folder, load_in_8bit=False).num_parameters()


def test_what_does_not_go_with_it(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="full_finetuning"):
        load(folder, full_finetuning=True)
    four = load(folder, load_in_8bit=False)
    four.save_pretrained_merged(tmp_path / "four", save_method="merged_4bit")
    with pytest.raises(ConfigError, match="stored in 4 bits"):
        load(tmp_path / "four")
