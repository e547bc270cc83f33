"""GPTQ, AWQ, MXFP4 and bitsandbytes' int8 and FP4 files: the model that their parts stand for."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bridged
import pytest
import tiny
import torch
from packed_fields import packed
from safetensors.torch import load_file, save_file

import purelm
from purelm.convert import mxfp4_file
from purelm.convert.bnb_file import entries
from purelm.convert.encoded import seen
from purelm.convert.load import load_folder
from purelm.convert.shards import open_checkpoint
from purelm.errors import CheckpointError, ConfigError
from purelm.nn import decoder, lora, tree
from purelm.quant import int8, nf4
from purelm.quant.int8 import Int8

Tensors = dict[str, torch.Tensor]
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
Q = "model.layers.0.self_attn.q_proj"


def gptq(w: torch.Tensor, bits: int, group: int, layout: str, shuffled: bool) -> Any:
    """The four tensors of w [out, in], and the weight that they stand for in float64."""
    rows, columns = w.shape
    index = torch.arange(columns) // group
    if shuffled:
        index = index[torch.randperm(columns, generator=torch.Generator().manual_seed(0))]
    count, top = columns // group, 2**bits - 1
    scales, zeros = torch.empty(count, rows, dtype=torch.float16), torch.empty(count, rows)
    fields = torch.empty(columns, rows)
    for g in range(count):
        own = w[:, index == g].T
        low, high = own.amin(0), own.amax(0)
        scales[g] = ((high - low) / top).half()
        zeros[g] = (-low / scales[g]).round().clamp(1, top)
        fields[index == g] = (own / scales[g] + zeros[g]).round().clamp(0, top)
    want = (fields.double() - zeros[index].double()) * scales[index].double()
    below = 1 if layout == "gptq" else 0
    parts = {
        "qweight": packed(fields, bits),
        "qzeros": packed((zeros - below).T.contiguous(), bits).T.contiguous(),
        "scales": scales,
        "g_idx": index.int(),
    }
    return parts, want.T


def awq(w: torch.Tensor, group: int) -> Any:
    rows, columns = w.shape
    grouped = w.T.reshape(-1, group, rows)
    low, high = grouped.amin(1), grouped.amax(1)
    scales = ((high - low) / 15).half()
    zeros = (-low / scales).round().clamp(0, 15)
    fields = (grouped / scales[:, None] + zeros[:, None]).round().clamp(0, 15)
    want = ((fields.double() - zeros[:, None].double()) * scales[:, None].double()).flatten(0, 1)

    def words(values: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(len(values), rows // 8, dtype=torch.int64)
        # Field i of a word holds output order[i].
        for i, output in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
            out += values[:, output::8].long() << (4 * i)
        return torch.where(out >= 2**31, out - 2**32, out).int()

    parts = {"qweight": words(fields.flatten(0, 1)), "qzeros": words(zeros), "scales": scales}
    return parts, want.T


def without(made: Any, name: str) -> Any:
    parts, want = made
    return {n: t for n, t in parts.items() if n != name}, want


CASES: dict[str, tuple[dict[str, Any], Callable[[torch.Tensor], Any]]] = {
    "gptq4": ({"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True},
              lambda w: gptq(w, 4, 32, "gptq", False)),
    "gptq4 act-order": ({"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True},
                        lambda w: gptq(w, 4, 32, "gptq", True)),
    "gptq8 v2": ({"quant_method": "gptq", "bits": 8, "checkpoint_format": "gptq_v2"},
                 lambda w: gptq(w, 8, 16, "gptq_v2", True)),
    "gptq2": ({"quant_method": "gptq", "bits": 2}, lambda w: gptq(w, 2, w.shape[1], "gptq", False)),
    "gptq3 act-order": ({"quant_method": "gptq", "bits": 3, "desc_act": True},
                        lambda w: gptq(w, 3, 16, "gptq", True)),
    "gptq by module": ({"quant_method": "gptq", "bits": 4, "dynamic": {"+:.*": {"bits": 8}}},
                       lambda w: gptq(w, 8 if len(w) == 96 else 4, 32, "gptq", False)),
    "autoround gptq": ({"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": True,
                        "packing_format": "auto_round:auto_gptq"},
                       lambda w: without(gptq(w, 4, 32, "gptq", False), "g_idx")),
    "autoround awq": ({"quant_method": "auto-round", "bits": 4, "group_size": 32,
                       "packing_format": "auto_round:auto_awq"}, lambda w: awq(w, 32)),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm"},
            lambda w: awq(w, 16)),
}  # fmt: skip


def stored(
    folder: Path,
    case: str,
    change: Callable[[Tensors], Any] | None = None,
    sharded: bool = False,
    family: str = "qwen2",
) -> Any:
    """A folder in that format, and transformers' model with the weights that it stands for."""
    config, make = CASES[case]
    model = tiny.hf_model(family, **(SIZES if family == "qwen2" else {}))
    tensors, state = {}, model.state_dict()
    tiny.save(model, folder)
    plain = load_file(folder / "model.safetensors")
    for name, w in plain.items():
        if "_proj.weight" in name:
            parts, want = make(w)
            module = name.removesuffix(".weight")
            tensors |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
            state[name] = want.float().contiguous()
        else:
            tensors[name] = w
    if family == "qwen2":
        model.load_state_dict(state)
    else:
        # A mixture's file has a name for each expert, the model one for all.
        (folder / "meant").mkdir()
        tiny.save(model, folder / "meant")
        save_file(
            {n: state.get(n, t) for n, t in plain.items()}, folder / "meant/model.safetensors"
        )
    if change is not None:
        change(tensors)
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, "quantization_config": config}))
    if not sharded:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return model
    (folder / "model.safetensors").unlink()
    where = {name: f"model-{1 + (len(name) % 2)}.safetensors" for name in tensors}
    for file in set(where.values()):
        save_file({n: t for n, t in tensors.items() if where[n] == file}, folder / file)
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return model


@pytest.mark.parametrize("case", CASES)
def test_logits_and_four_bits(case: str, tmp_path: Path) -> None:
    model = stored(tmp_path, case, sharded=case == "awq")
    spec, params = purelm.load(tmp_path, device="cpu", dtype=torch.float32)
    assert torch.equal(
        params["layers"][0]["attn"]["q"]["weight"], model.state_dict()[Q + ".weight"]
    )
    with torch.no_grad():
        want = model(bridged.ids()).logits
    bridged.same_logits(decoder.forward(params, spec, bridged.ids()), want)
    _, four = purelm.load(tmp_path, quantize="nf4", device="cpu", dtype=torch.float32)
    ours = four["layers"][1]["mlp"]["up"]["weight"]
    theirs = nf4.quantize(model.state_dict()["model.layers.1.mlp.up_proj.weight"])
    assert torch.equal(ours.packed, theirs.packed)


@pytest.mark.parametrize("case", ["gptq8 v2", "awq"])
def test_experts_of_a_mixture(case: str, tmp_path: Path) -> None:
    stored(tmp_path, case, family="qwen3_moe")
    _, params = purelm.load(tmp_path, device="cpu", dtype=torch.float32)
    _, meant = purelm.load(tmp_path / "meant", device="cpu", dtype=torch.float32)
    found, want = dict(tree.items(params)), dict(tree.items(meant))
    assert any("experts" in name for name in want)
    assert all(torch.equal(found[name], want[name]) for name in want)


@pytest.mark.parametrize("case", ["gptq4 act-order", "awq"])
def test_merged_onto_the_dequantized_weights(case: str, tmp_path: Path) -> None:
    stored(tmp_path / "source", case, sharded=True)
    model = bridged.bridge(tmp_path / "source")
    model.set_adapters(lora.init(model.spec, rank=4, generator=torch.Generator().manual_seed(0)))
    bridged.spread_trained(model)
    model.save_pretrained_merged(tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in config
    merged = open_checkpoint(tmp_path / "merged").tensors
    assert merged.keys() == tiny.hf_model("qwen2", **SIZES).state_dict().keys()
    spec, params = purelm.load(tmp_path / "merged", device="cpu", dtype=torch.float32)
    base = dict(tree.items(model.params))["layers.0.attn.q.weight"]
    delta = lora.delta(dict(tree.items(model.adapters))["layers.0.attn.q"]).detach()
    # Each rounded once to the dtype of the stored scales.
    assert torch.equal(
        params["layers"][0]["attn"]["q"]["weight"], (base.half().float() + delta).half().float()
    )


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        ("gptq4", lambda t: t.pop(Q + ".scales"), "scales of the same module missing"),
        ("gptq4", lambda t: t[Q + ".g_idx"].fill_(2), "outside the 2"),
        ("gptq4", lambda t: t[Q + ".g_idx"].fill_(-1), "outside the 2"),
        ("gptq4", lambda t: t.update({Q + ".g_idx": torch.zeros(63).int()}), r"expected .*\[64\]"),
        ("gptq4", lambda t: t.update({Q + ".qweight": t[Q + ".qweight"].long()}), "int64"),
        ("gptq4", lambda t: t[Q + ".scales"].fill_(float("inf")), "NaN or infinite"),
        ("awq", lambda t: t.update({Q + ".qzeros": t[Q + ".qzeros"][:1].clone()}), "qzeros"),
        ("awq", lambda t: t.update({Q + ".weight": torch.ones(64, 64)}), "stored twice"),
        ("awq", lambda t: t.update({Q + ".scales": torch.ones(3, 64).half()}), "3 groups"),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit(
    case: str, change: Callable[[Tensors], Any], message: str, tmp_path: Path
) -> None:
    stored(tmp_path, case, change)
    with pytest.raises(CheckpointError, match=message):
        purelm.load(tmp_path, device="cpu")


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"quant_method": "gptq", "bits": 5}, ConfigError, "5 bits"),
        ({"quant_method": "gptq", "bits": 3}, CheckpointError, "of which some lack"),
        ({"quant_method": "gptq", "bits": 8}, CheckpointError, "qzeros"),
        ({"quant_method": "gptq", "bits": 4, "group_size": "128"}, ConfigError, "group_size"),
        ({"quant_method": "gptq", "bits": 4, "is_marlin_format": True}, ConfigError, "marlin"),
        ({"quant_method": "auto-round", "bits": 4}, ConfigError, "auto-round"),
        ({**CASES["autoround gptq"][0], "checkpoint_format": ["v3"]}, ConfigError, "v3"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, ConfigError, "marlin"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, ConfigError, "gemv"),
        ({"quant_method": "hqq"}, ConfigError, "hqq"),
        ({"quant_method": "mxfp4"}, CheckpointError, "none is"),
        (None, ConfigError, "no quantization_config"),
    ],
)
def test_other_kinds(fields: Any, error: type[Exception], message: str, tmp_path: Path) -> None:
    stored(tmp_path, "gptq4")
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": fields}))
    with pytest.raises(error, match=message):
        purelm.load(tmp_path, device="cpu")


def eight_bits(folder: Path) -> Any:
    """A tiny model that transformers and bitsandbytes quantized to 8 bits and saved."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    model = tiny.hf_model("qwen2", **SIZES).bfloat16()
    tiny.save(model, folder / "plain")
    made = AutoModelForCausalLM.from_pretrained(
        folder / "plain",
        quantization_config=BitsAndBytesConfig(load_in_8bit=True),
        device_map="cpu",
        dtype=torch.bfloat16,
    )
    made.save_pretrained(folder / "eight")
    return made


def test_bitsandbytes_int8_is_kept_or_dequantized(tmp_path: Path) -> None:
    eight_bits(tmp_path)
    tensors = load_file(tmp_path / "eight" / "model.safetensors")
    assert tensors[Q + ".weight"].dtype == torch.int8, "the oracle stored 8 bits"
    _, kept = purelm.load(tmp_path / "eight", quantize="int8", device="cpu")
    leaf = kept["layers"][0]["attn"]["q"]["weight"]
    assert isinstance(leaf, Int8) and leaf.dtype == torch.bfloat16 and leaf.threshold == 6.0
    assert torch.equal(leaf.codes, tensors[Q + ".weight"])
    assert torch.equal(leaf.scale, tensors[Q + ".SCB"])
    _, own = purelm.load(tmp_path / "plain", quantize="int8", device="cpu")
    assert torch.equal(own["layers"][0]["attn"]["q"]["weight"].codes, leaf.codes)
    _, wide = purelm.load(tmp_path / "eight", device="cpu", dtype=torch.float32)
    want = tensors[Q + ".weight"].double() * tensors[Q + ".SCB"].double()[:, None] / 127
    got = wide["layers"][0]["attn"]["q"]["weight"]
    torch.testing.assert_close(got.double(), want, rtol=2**-23, atol=0)
    assert torch.equal(got, int8.dequantize(leaf, torch.float32))
    loaded = load_folder(
        tmp_path / "eight", quantize="int8", dtype=None, device=torch.device("cpu")
    )
    assert loaded.dequantized_from is None
    loaded = load_folder(tmp_path / "eight", quantize="nf4", dtype=None, device=torch.device("cpu"))
    assert loaded.dequantized_from == "8 bits by bitsandbytes"
    loaded = load_folder(tmp_path / "eight", quantize=None, dtype=None, device=torch.device("cpu"))
    assert loaded.dequantized_from == "8 bits by bitsandbytes"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(Q + ".SCB"), "needs two dimensions and SCB"),
        (lambda t: t[Q + ".SCB"].fill_(float("nan")), "NaN"),
        (lambda t: t[Q + ".weight_format"].fill_(2), "layout other than rows"),
    ],
)
def test_int8_parts_that_do_not_fit(
    change: Callable[[Tensors], Any], message: str, tmp_path: Path
) -> None:
    eight_bits(tmp_path)
    file = tmp_path / "eight" / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        purelm.load(tmp_path / "eight", quantize="int8", device="cpu")


def test_fp4_by_bitsandbytes_is_kept(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    tiny.save(tiny.hf_model("qwen2", **SIZES).bfloat16(), tmp_path / "plain")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4")
    made = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=config, device_map="cpu", dtype=torch.bfloat16
    )
    made.save_pretrained(tmp_path / "four")
    tensors = load_file(tmp_path / "four" / "model.safetensors")
    _, params = purelm.load(tmp_path / "four", quantize="nf4", device="cpu")
    leaf = params["layers"][0]["attn"]["q"]["weight"]
    assert leaf.kind == "fp4"
    assert torch.equal(leaf.packed, tensors[Q + ".weight"].view(-1))
    linear = made.model.layers[0].self_attn.q_proj
    eye = torch.eye(64, dtype=torch.bfloat16)
    with torch.no_grad():
        want = (linear(eye) - linear(eye.new_zeros(1, 64))).float().T
    # bitsandbytes' product rounds once more, and the bias it adds another time.
    got = nf4.dequantize(leaf, torch.float32)
    assert float((got - want).abs().max()) <= 2**-7 * float(want.abs().max())


@pytest.mark.parametrize("seed", range(3))
def test_mxfp4_against_transformers(seed: int, tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (3, 10, 2, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(118, 136, (3, 10, 2), dtype=torch.uint8, generator=generator)
    want = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    assert torch.equal(mxfp4_file.dequantize(blocks, scales), want)
    name = "model.layers.0.mlp.experts.down_proj"
    save_file({name + "_blocks": blocks, name + "_scales": scales}, tmp_path / "model.safetensors")
    read = seen(open_checkpoint(tmp_path), {}, mxfp4_file.MXFP4)
    (entry,) = entries(read)
    assert (entry.name, entry.shape, entry.dtype) == (name, (3, 64, 10), torch.bfloat16)


def test_mxfp4_exponents_at_the_ends() -> None:
    blocks = torch.full((1, 1, 3, 16), 0x77, dtype=torch.uint8)
    scales = torch.tensor([[[0, 254, 255]]], dtype=torch.uint8)
    made = mxfp4_file.dequantize(blocks, scales).view(3, 32)
    assert bool((made[0] == 6 * 2.0**-127).all()) and bool(made[1].isinf().all())
    assert bool(made[2].isnan().all())
