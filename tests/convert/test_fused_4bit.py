"""Fused projections in bitsandbytes' 4 bits: written for transformers, and read again."""

import json
from pathlib import Path
from typing import Any

import bitsandbytes
import bridged
import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file

import purelm
from purelm.convert import fused, peft_config
from purelm.errors import CheckpointError, SaveError
from purelm.nn import decoder, lora, tree
from purelm.quant import nf4
from purelm.quant.nf4 import NF4

WIDE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128}
CASES: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "phi3": ("phi3", WIDE, ["q_proj", "v_proj", "up_proj"]),
    "glm": ("glm", WIDE, ["gate_proj", "o_proj"]),
    "glm4": ("glm4", WIDE, ["up_proj"]),
    "gpt2": ("gpt2", WIDE, ["v_proj", "c_fc"]),
    "gpt_neox": ("gpt_neox", WIDE, ["k_proj", "dense"]),
    "granitemoehybrid": (
        "granitemoehybrid",
        {**WIDE, "num_local_experts": 0},
        ["gate_proj", "output_linear"],
    ),
}


def loaded(folder: Path) -> Any:
    hf: Any = transformers
    made, report = hf.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        device_map="cpu",
        attn_implementation="eager",
        output_loading_info=True,
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return made.eval()


@pytest.mark.parametrize("case", CASES)
def test_merged_4_bits_run_in_transformers(case: str, tmp_path: Path) -> None:
    """bitsandbytes' own bytes of the parts' dequantized sums together; unchanged when read."""
    family, switches, targets = CASES[case]
    folder = tiny.save(tiny.hf_model(family, **switches), tmp_path / "dense")
    model = bridged.bridge(folder, quantize="nf4")
    peft_config.apply(model, r=4, lora_alpha=12, target_modules=targets).eval()
    bridged.spread_trained(model)
    model.save_pretrained_merged(tmp_path / "four", save_method="merged_4bit")
    stored = load_file(tmp_path / "four" / "model.safetensors")
    adapters = dict(tree.items(model.adapters))
    for name, one in fused.modules(model.spec, model.origin.family.names).items():
        sums = []
        for path in one.paths:
            dense = nf4.dequantize(tree.at(model.params, path)["weight"], torch.float32)
            sums.append(lora.merged(dense, adapters[path]) if path in adapters else dense)
        codes, _ = bitsandbytes.functional.quantize_4bit(
            one.whole(sums).detach(), blocksize=64, quant_type="nf4", compress_statistics=True
        )
        assert torch.equal(stored[f"{name}.weight"], codes)
    spec, params = purelm.load(tmp_path / "four", quantize="nf4", device="cpu")
    ids = bridged.ids()
    want = decoder.forward(params, spec, ids)
    theirs = loaded(tmp_path / "four")
    assert any(isinstance(m, bitsandbytes.nn.Linear4bit) for m in theirs.modules())
    bridged.same_logits(theirs(ids).logits.detach(), want)
    again = bridged.bridge(tmp_path / "four", quantize="nf4")
    again.save_pretrained_merged(tmp_path / "again", save_method="merged_4bit_forced")
    for path in (tmp_path / "four").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name
    # Dequantized while loading, and merged into what they dequantize to.
    dense = bridged.bridge(tmp_path / "four")
    bridged.same_logits(dense(ids).logits.detach(), want)
    again.save_pretrained_merged(tmp_path / "sixteen")
    bridged.same_logits(loaded(tmp_path / "sixteen")(ids).logits.detach(), want)


def test_trained_on_4_bits_of_a_fused_matrix(tmp_path: Path) -> None:
    """What transformers quantized itself is read to the bit, and written so after training."""
    folder = tiny.save(tiny.hf_model("gpt2", **WIDE), tmp_path / "dense")
    hf: Any = transformers
    settings = hf.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_compute_dtype=torch.float32
    )
    theirs = hf.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=settings, dtype=torch.float32, device_map="cpu"
    ).eval()
    theirs.save_pretrained(tmp_path / "four")
    model = bridged.bridge(tmp_path / "four", quantize="nf4")
    ids = bridged.ids()
    bridged.same_logits(model(ids).logits, theirs(ids).logits.detach())
    module = theirs.transformer.h[1].attn.c_attn.weight
    dense = bitsandbytes.functional.dequantize_4bit(module.data, module.quant_state)
    attn = model.params["layers"][1]["attn"]
    parts = [attn[x]["weight"] for x in "qkv"]
    assert all(isinstance(leaf, NF4) and leaf.kind == "fp4" for leaf in parts)
    assert torch.equal(torch.cat([nf4.dequantize(leaf) for leaf in parts]), dense)
    peft_config.apply(model, r=4, target_modules=["k_proj", "c_fc"]).eval()
    bridged.spread_trained(model)
    model.save_pretrained_merged(tmp_path / "merged", save_method="merged_4bit")
    spec, params = purelm.load(tmp_path / "merged", quantize="nf4", device="cpu")
    ours = decoder.forward(params, spec, ids)
    bridged.same_logits(loaded(tmp_path / "merged")(ids).logits.detach(), ours)
    fields = json.loads((tmp_path / "merged/config.json").read_text())["quantization_config"]
    assert fields["bnb_4bit_quant_type"] == "fp4"


def test_blocks_across_parts(tmp_path: Path) -> None:
    """Where a block has values of two parts, only the dequantized weights come apart."""
    switches = {"hidden_size": 20, "num_attention_heads": 5, "num_key_value_heads": 5}
    folder = tiny.save(tiny.hf_model("phi3", head_dim=4, **switches), tmp_path / "dense")
    model = bridged.bridge(folder, quantize="nf4")
    model.save_pretrained_merged(tmp_path / "four", save_method="merged_4bit")
    with pytest.raises(CheckpointError, match=r"attn\.q.* block of 64 .*load_in_4bit=False"):
        purelm.load(tmp_path / "four", quantize="nf4", device="cpu")
    dense, theirs = bridged.bridge(tmp_path / "four"), loaded(tmp_path / "four")
    for i, layer in enumerate(theirs.model.layers):
        weight, attn = layer.self_attn.qkv_proj.weight, dense.params["layers"][i]["attn"]
        want = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
        assert torch.equal(torch.cat([attn[x]["weight"] for x in "qkv"]), want)


@pytest.mark.parametrize(
    ("family", "switches", "problem"),
    [
        ("falcon", WIDE, "falcon in a class of its own.*merged_16bit"),
        ("granitemoe", WIDE, "one parameter of all experts.*merged_16bit"),
    ],
)
def test_what_transformers_does_not_have_in_4_bits(
    family: str, switches: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    folder = tiny.save(tiny.hf_model(family, **switches), tmp_path / "dense")
    model = bridged.bridge(folder, quantize="nf4")
    with pytest.raises(SaveError, match=problem):
        model.save_pretrained_merged(tmp_path / "four", save_method="merged_4bit")
    assert not (tmp_path / "four").exists()


def test_some_parts_in_16_bits(tmp_path: Path) -> None:
    folder = tiny.save(tiny.hf_model("phi3", **WIDE), tmp_path / "dense")
    model = bridged.bridge(folder, quantize="nf4")
    attn = model._params["layers"][1]["attn"]["k"]
    attn["weight"] = nf4.dequantize(attn["weight"])
    with pytest.raises(SaveError, match=r"qkv_proj.*some are not in 4 bits"):
        model.save_pretrained_merged(tmp_path / "four", save_method="merged_4bit")
