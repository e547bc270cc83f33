"""Checkpoints with fp8 weights: the model that float64 makes of codes and scales."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bridged
import pytest
import tiny
import torch
from fp8_folders import FINE, PUBLISHERS, ROWS, SIZES, Q, Tensors, scales, spread, stored
from safetensors.torch import load_file

import purelm
from purelm.convert.fp8_file import dequantize
from purelm.errors import CheckpointError, ConfigError
from purelm.nn import decoder, lora, tree
from purelm.quant.nf4 import NF4


@pytest.mark.parametrize("kind", PUBLISHERS)
def test_logits_and_four_bits(kind: str, tmp_path: Path) -> None:
    model = stored(tmp_path, kind)
    spec, params = purelm.load(tmp_path, device="cpu", dtype=torch.float32)
    state = model.state_dict()
    assert torch.equal(params["layers"][0]["attn"]["q"]["weight"], state[Q])
    with torch.no_grad():
        want = model(bridged.ids()).logits
    bridged.same_logits(decoder.forward(params, spec, bridged.ids()), want)
    _, four = purelm.load(tmp_path, quantize="nf4", device="cpu", dtype=torch.float32)
    model.save_pretrained(tmp_path / "plain")
    _, same = purelm.load(tmp_path / "plain", quantize="nf4", device="cpu", dtype=torch.float32)
    ours, theirs = (
        four["layers"][1]["mlp"]["up"]["weight"],
        same["layers"][1]["mlp"]["up"]["weight"],
    )
    assert isinstance(ours, NF4) and torch.equal(ours.packed, theirs.packed)
    assert torch.equal(ours.absmax, theirs.absmax)


def test_the_kernel_of_it_against_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    for rows, columns in ((1, 1), (128, 128), (129, 1), (1, 300), (257, 130)):
        w = torch.randn(rows, columns, generator=generator)
        codes = w.to(torch.float8_e4m3fn)
        for kind in ("block", "row", "tensor"):
            scale = scales(w, kind)
            want = (codes.double() * spread(scale, w.shape, kind)).float()
            assert torch.equal(dequantize(codes, scale), want), (rows, columns, kind)


def test_merged_onto_the_dequantized_weights(tmp_path: Path) -> None:
    stored(tmp_path / "source", "block")
    model = bridged.bridge(tmp_path / "source", dtype=torch.bfloat16)
    model.set_adapters(lora.init(model.spec, rank=4, generator=torch.Generator().manual_seed(0)))
    bridged.spread_trained(model)
    model.save_pretrained_merged(tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in config
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert found.keys() == tiny.hf_model("qwen3", **SIZES).state_dict().keys()
    base = dict(tree.items(model.params))["layers.0.attn.q.weight"].float()
    adapter = dict(tree.items(model.adapters))["layers.0.attn.q"]
    want = base + lora.delta(adapter).detach()
    assert torch.equal(found[Q], want.bfloat16())


def test_the_report_says_so(tmp_path: Path) -> None:
    import shutil

    stored(tmp_path / "m", "block")
    tiny_folder = Path(purelm.__file__).parent / "data" / "tiny"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny_folder / name, tmp_path / "m" / name)
    model, _ = purelm.FastLanguageModel.from_pretrained(
        tmp_path / "m", device_map="cpu", max_seq_length=None, fix_tokenizer=False
    )
    assert "the files store weights in fp8; dequantized" in model.report()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(Q + "_scale_inv"), "0 of them"),
        (lambda t: t.update({Q + "_scale": torch.ones(1)}), "2 of them"),
        (lambda t: t.update({Q + "_scale_inv": torch.ones(2, 3)}), r"found scales .*\[2, 3\]"),
        (lambda t: t.update({Q + "_scale_inv": t[Q + "_scale_inv"].int()}), "int32"),
        (lambda t: t[Q + "_scale_inv"].fill_(float("nan")), "NaN or infinite"),
        (lambda t: t.update({"x.weight_scale_inv": torch.ones(1)}), "x.weight_scale_inv"),
    ],
)
def test_scales_that_do_not_fit(
    change: Callable[[Tensors], Any], message: str, tmp_path: Path
) -> None:
    stored(tmp_path, "block", change)
    with pytest.raises(CheckpointError, match=message):
        purelm.load(tmp_path, device="cpu")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({**FINE, "weight_block_size": [64, 64]}, r"blocks of \[64, 64\]"),
        ({**FINE, "fmt": "e5m2"}, "'e5m2', expected 'e4m3'"),
        ({**ROWS, "format": "mxfp8-quantized"}, "'mxfp8-quantized'; read are"),
        ({"quant_method": "modelopt", "quant_algo": "W4A8"}, "'W4A8', read are 'FP8'"),
        (None, "no quantization_config"),
    ],
)
def test_configs_of_another_kind(fields: Any, message: str, tmp_path: Path) -> None:
    stored(tmp_path, "block")
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": fields}))
    with pytest.raises(ConfigError, match=message):
        purelm.load(tmp_path, device="cpu")
