"""LoftQ: adapters that start from what 4 bits lost, as peft's do, and merge beside 4 bits only."""

from pathlib import Path
from typing import Any

import bridged
import pytest
import tiny
import torch
from oracles import assert_rows
from safetensors.torch import load_file

from purelm import FastLanguageModel
from purelm.convert import peft_config
from purelm.convert.adapter_config import read_config
from purelm.convert.bridge import CausalLM
from purelm.errors import ArgumentError
from purelm.nn import lora, stacks, tree
from purelm.quant.linear import weight_of

SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}


def four(tmp_path: Path, family: str = "llama", **given: Any) -> CausalLM:
    if not (tmp_path / "base").exists():
        tiny.save(tiny.hf_model(family, **SIZES), tmp_path / "base")
    return bridged.bridge(tmp_path / "base", quantize="nf4", **given)


def begun(model: CausalLM, **given: Any) -> CausalLM:
    given = {"r": 4, "lora_alpha": 4, "init_lora_weights": "loftq", **given}
    return peft_config.apply(model, **given)


def test_a_start_is_pefts(tmp_path: Path) -> None:
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Params4bit
    from peft.utils.loftq_utils import _low_rank_decomposition

    model = begun(four(tmp_path), loftq_config={"loftq_bits": 4, "loftq_iter": 1})
    stored = load_file(tmp_path / "base" / "model.safetensors")
    leaves = dict(tree.items(model.adapters))
    assert leaves
    for path, leaf in leaves.items():
        weight = stored[model.origin.family.names.to_hf(f"{path}.weight")]
        theirs = Params4bit(weight.clone(), requires_grad=False, quant_type="nf4").to("cpu")
        lost = weight - dequantize_4bit(theirs.data, theirs.quant_state)
        found = _low_rank_decomposition(lost, reduced_rank=4)
        u, s, v = torch.linalg.svd(lost.double(), full_matrices=False)
        exact = (u[:, :4] * s[:4]) @ v[:4]
        # The same part of the same difference; its factors may have other signs.
        assert_rows(lora.delta(leaf).detach(), found["L"] @ found["R"], exact)


def model_leaf(model: CausalLM, path: str) -> Any:
    return tree.at(stacks.one_by_one(model.params), path)["weight"]


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "mixtral"])
def test_it_begins_nearer_to_the_original(family: str, tmp_path: Path) -> None:
    sizes = {} if family == "gpt2" else SIZES
    base = tiny.hf_model(family, **{**sizes})
    tiny.save(base, tmp_path / "base")
    model = bridged.bridge(tmp_path / "base", quantize="nf4")
    plain = model(bridged.ids()).logits.detach()
    begun(model, r=16, lora_alpha=8, target_modules="all-linear")
    with torch.no_grad():
        want = base(bridged.ids()).logits
        near, far = ((x - want).norm() for x in (model.eval()(bridged.ids()).logits, plain))
    assert float(near) < 0.8 * float(far)


def test_merged_beside_the_quantized_weights(tmp_path: Path) -> None:
    """What is merged computes what was trained, not the original with the difference twice."""
    model = begun(four(tmp_path)).eval()
    bridged.spread_trained(model)
    want = model(bridged.ids()).logits.detach()
    model.save_pretrained_merged(tmp_path / "merged")
    merged = bridged.bridge(tmp_path / "merged")
    bridged.same_logits(merged(bridged.ids()).logits.detach(), want)
    # After saving, too: peft reads a plain LoRA, and we know what it belongs to.
    model.save_pretrained(tmp_path / "adapter")
    config = read_config(tmp_path / "adapter")
    assert config is not None and config["init_lora_weights"] is True
    again = four(tmp_path)
    again.load_adapter(tmp_path / "adapter", "again")
    again.set_adapter("again")
    bridged.same_logits(again.eval()(bridged.ids()).logits.detach(), want)
    again.save_pretrained_merged(tmp_path / "second")
    one, two = (load_file(tmp_path / f / "model.safetensors") for f in ("merged", "second"))
    assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


def same_files(one: Path, two: Path) -> bool:
    a, b = (load_file(folder / "model.safetensors") for folder in (one, two))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_base_is_chosen_by_the_adapters_that_are_merged(tmp_path: Path) -> None:
    model = four(tmp_path)
    model.add_adapter("lost", r=4, init_lora_weights="loftq")
    model.add_adapter("plain", r=4)
    model.set_adapter("plain")
    model.save_pretrained_merged(tmp_path / "plain")  # nothing was trained: the original itself
    assert same_files(tmp_path / "plain", tmp_path / "base")
    model.set_adapter(["plain", "lost"])
    model.save_pretrained_merged(tmp_path / "both")
    assert not same_files(tmp_path / "both", tmp_path / "base")
    served = model.to_vllm(tmp_path / "one", selected_adapters=["plain"])
    assert same_files(served.base, tmp_path / "base")
    served = model.to_vllm(tmp_path / "all")
    again = four(tmp_path)
    again.load_adapter(served.adapters["lost"], "again")
    assert again.peft_config["again"].init_lora_weights == "loftq"
    with model.disable_adapter():
        method = "merged_16bit_dequantized"
        model.save_pretrained_merged(tmp_path / "dequantized", save_method=method)
    assert same_files(served.base, tmp_path / "dequantized")


def test_a_mix_belongs_where_its_parts_do(tmp_path: Path) -> None:
    model = four(tmp_path)
    model.add_adapter("lost", r=4, init_lora_weights="loftq")
    model.add_weighted_adapter(["lost"], [0.5], "mix", "cat")
    model.delete_adapter("lost")
    model.set_adapter("mix")
    want = model(bridged.ids()).logits.detach()
    model.save_pretrained(tmp_path / "adapters")
    again = four(tmp_path)
    again.load_adapter(tmp_path / "adapters" / "mix", "again")
    again.set_adapter("again")
    for i, each in enumerate((model, again)):
        each.save_pretrained_merged(tmp_path / f"merged{i}")
        merged = bridged.bridge(tmp_path / f"merged{i}")
        bridged.same_logits(merged(bridged.ids()).logits.detach(), want)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "granitemoe"])
@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_any_adapter_onto_the_dequantized_base(family: str, quantize: str, tmp_path: Path) -> None:
    sizes = {} if family == "gpt2" else SIZES
    tiny.save(tiny.hf_model(family, **sizes), tmp_path / "base")
    model = bridged.bridge(tmp_path / "base", quantize=quantize)
    model.set_adapters(lora.init(model.spec, rank=4, generator=torch.Generator().manual_seed(0)))
    bridged.spread_trained(model)
    model.save_pretrained_merged(tmp_path / "merged", save_method="merged_16bit_dequantized")
    merged = bridged.bridge(tmp_path / "merged")
    leaves = dict(tree.items(stacks.one_by_one(model.params)))
    deltas = dict(tree.items(stacks.one_by_one(stacks.separated(model.adapters))))
    found = dict(tree.items(stacks.one_by_one(merged.params)))
    assert deltas
    for path, leaf in leaves.items():
        base = weight_of(leaf, torch.float32).detach()
        change = deltas.get(path.removesuffix(".weight"))
        if change is not None:
            base = lora.merged(base, change).detach()
        assert torch.equal(found[path].detach(), base), path


def test_what_cannot_be(tmp_path: Path) -> None:
    model = four(tmp_path)
    for config in ({"loftq_bits": 8}, {"loftq_iter": 2}, {"bits": 4}, {"loftq_bits": 4.0}):
        with pytest.raises(ArgumentError, match="loftq_config"):
            begun(model, loftq_config=config)
    with pytest.raises(ArgumentError, match="goes with init_lora_weights='loftq'"):
        begun(model, loftq_config={"loftq_bits": 4}, init_lora_weights=True)
    with pytest.raises(ArgumentError, match="not in 4 bits"):
        begun(bridged.bridge(tmp_path / "base"))
    with pytest.raises(ArgumentError, match="cannot give rank"):
        begun(model, r=65)
    assert not model.peft_config
    model.save_pretrained_merged(tmp_path / "packed", save_method="merged_4bit")
    packed = bridged.bridge(tmp_path / "packed", quantize="nf4")
    with pytest.raises(ArgumentError, match="in 4 bits, and not what that lost"):
        begun(packed)


def test_from_the_published_entry_points(tmp_path: Path) -> None:
    import folders

    folders.whole(tmp_path)
    model, _ = FastLanguageModel.from_pretrained(tmp_path, device_map="cpu", max_seq_length=None)
    model = FastLanguageModel.get_peft_model(
        model, r=4, init_lora_weights="loftq", loftq_config={"loftq_bits": 4, "loftq_iter": 1}
    )
    assert model.peft_config["default"].init_lora_weights == "loftq"
    bridged.assert_trains(model)
