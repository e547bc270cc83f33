"""4-bit checkpoints of transformers and bitsandbytes: the same bytes, the same logits."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import bridged
import pytest
import tiny
import tiny_tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file

import purelm
from purelm.convert import peft_config
from purelm.convert.report import describe
from purelm.errors import ArgumentError, CheckpointError, ConfigError, SaveError
from purelm.nn import decoder, lora, tree
from purelm.quant import nf4
from purelm.quant.nf4 import NF4

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

SKIPPED = "model.layers.1.mlp"
UP = "model.layers.0.mlp.up_proj.weight"
STATE = ".quant_state.bitsandbytes__nf4"
# bitsandbytes 0.50 dequantizes rows that are no multiple of the block wrongly on a CPU.
WIDE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128}


def bnb_model(source: Path, **options: Any) -> Any:
    hf: Any = transformers
    asked = hf.BitsAndBytesConfig(
        load_in_4bit=True,
        **{
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": torch.float32,
            "llm_int8_skip_modules": ["lm_head", SKIPPED],
            **options,
        },
    )
    return hf.AutoModelForCausalLM.from_pretrained(
        source, quantization_config=asked, device_map="cpu", dtype=torch.float32
    )


@pytest.fixture(scope="module", params=[True, False], ids=["double", "plain"])
def stored(request: Any, tmp_path_factory: Any) -> Path:
    """A folder that transformers wrote in 4 bits."""
    root: Path = tmp_path_factory.mktemp("bnb")
    tiny.save(tiny.hf_model("qwen2", **WIDE), root / "dense")
    made = bnb_model(root / "dense", bnb_4bit_use_double_quant=request.param)
    made.save_pretrained(root / "four", max_shard_size="60KB")
    return root / "four"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for path in folder.glob("*.safetensors") for n, t in load_file(path).items()}


def dense(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a folder, its 4-bit weights as bitsandbytes dequantizes them."""
    found = weights(folder)
    out = {n: t for n, t in found.items() if ".weight." not in n}
    for name in [n.removesuffix(STATE) for n in found if n.endswith(STATE)]:
        parts = {n: t.clone() for n, t in found.items() if n.startswith(f"{name}.")}
        state = bitsandbytes.functional.QuantState.from_dict(parts, torch.device("cpu"))
        out[name] = bitsandbytes.functional.dequantize_4bit(found[name], state)
    return out


def reload(folder: Path) -> Any:
    hf: Any = transformers
    made, report = hf.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, device_map="cpu", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return made.eval()


def oracle(folder: Path) -> Any:
    """transformers' model with the dequantized weights."""
    fields = json.loads((folder / "config.json").read_text())
    fields.pop("quantization_config", None)
    hf: Any = transformers
    config = hf.AutoConfig.for_model(**fields)
    config._attn_implementation = "eager"
    made = hf.AutoModelForCausalLM.from_config(config).float().eval()
    made.load_state_dict(dense(folder))
    return made


def test_its_bytes_are_the_leaves(stored: Path) -> None:
    spec, params = purelm.load(stored, quantize="nf4", device="cpu")
    found = weights(stored)
    leaf = params["layers"][0]["mlp"]["up"]["weight"]
    assert isinstance(leaf, NF4) and leaf.dtype == torch.float32
    assert torch.equal(leaf.packed, found[UP].view(-1))
    assert torch.equal(leaf.absmax, found[f"{UP}.absmax"])
    if leaf.absmax_scale is not None:
        assert torch.equal(leaf.absmax_scale, found[f"{UP}.nested_absmax"])
    assert (leaf.absmax_scale is None) == (f"{UP}.nested_absmax" not in found)
    four = {path for path, leaf in tree.items(params) if isinstance(leaf, NF4)}
    assert len(four) == 3 * 7 - 3 and not any(path.startswith("layers.1.mlp") for path in four)
    want = dense(stored)
    names = bridged.bridge(stored, quantize="nf4").origin.family.names
    for path, leaf in tree.items(params):
        ours = nf4.dequantize(leaf) if isinstance(leaf, NF4) else leaf
        assert torch.equal(ours, want[names.to_hf(path)]), path
    bridged.same_logits(
        decoder.forward(params, spec, bridged.ids()), oracle(stored)(bridged.ids()).logits.detach()
    )


def test_16_bits_are_dequantized(stored: Path) -> None:
    _, params = purelm.load(stored, device="cpu")
    want = dense(stored)
    assert all(isinstance(leaf, torch.Tensor) for leaf in tree.leaves(params))
    assert torch.equal(params["layers"][0]["mlp"]["up"]["weight"], want[UP])
    _, half = purelm.load(stored, device="cpu", dtype=torch.bfloat16)
    assert torch.equal(half["layers"][0]["mlp"]["up"]["weight"], want[UP].bfloat16())
    _, some = purelm.load(stored, quantize="nf4", device="cpu", quant_skip=["layers.0."])
    assert torch.equal(some["layers"][0]["mlp"]["up"]["weight"], want[UP])
    assert isinstance(some["layers"][2]["mlp"]["up"]["weight"], NF4)


def test_a_head_in_4_bits_is_dequantized(tmp_path: Path) -> None:
    tiny.save(tiny.hf_model("llama", **WIDE), tmp_path / "dense")
    bnb_model(tmp_path / "dense", llm_int8_skip_modules=["none"]).save_pretrained(tmp_path / "four")
    assert "lm_head.weight.absmax" in weights(tmp_path / "four")
    spec, params = purelm.load(tmp_path / "four", quantize="nf4", device="cpu")
    assert torch.equal(params["head"]["weight"], dense(tmp_path / "four")["lm_head.weight"])
    want = oracle(tmp_path / "four")(bridged.ids()).logits.detach()
    bridged.same_logits(decoder.forward(params, spec, bridged.ids()), want)


@pytest.mark.parametrize("quantize", ["nf4", None])
def test_merged_16_bits_onto_the_dequantized_base(
    stored: Path, quantize: Any, tmp_path: Path
) -> None:
    model = bridged.bridge(stored, quantize=quantize)
    peft_config.apply(model, r=4, lora_alpha=16, target_modules=["q_proj", "up_proj"]).eval()
    bridged.spread_trained(model)
    model.save_pretrained_merged(tmp_path / "merged")
    assert "quantization_config" not in json.loads((tmp_path / "merged/config.json").read_text())
    found, want = weights(tmp_path / "merged"), dense(stored)
    assert found.keys() == want.keys()
    changed = {name for name in want if not torch.equal(found[name], want[name])}
    assert len(changed) == 6 and UP in changed
    adapter = model.adapters["layers"][0]["mlp"]["up"]
    assert torch.equal(found[UP], want[UP] + lora.delta(adapter).detach())
    ours = model(bridged.ids()).logits.detach()
    bridged.same_logits(reload(tmp_path / "merged")(bridged.ids()).logits.detach(), ours)


def test_merged_4_bits_without_an_adapter_are_the_same_file(stored: Path, tmp_path: Path) -> None:
    bridged.bridge(stored, quantize="nf4").save_pretrained_merged(
        tmp_path / "saved", save_method="merged_4bit_forced"
    )
    found, want = weights(tmp_path / "saved"), weights(stored)
    assert found.keys() == want.keys()
    for name, tensor in want.items():
        if name.endswith(STATE):
            ours, theirs = (json.loads(t.numpy().tobytes()) for t in (found[name], tensor))
            assert ours == theirs
        else:
            assert torch.equal(found[name], tensor), name
    assert purelm.load(tmp_path / "saved", device="cpu")[0] == purelm.load(stored, device="cpu")[0]


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_merged_4_bits_run_in_transformers(double: bool, tied: bool, tmp_path: Path) -> None:
    """bitsandbytes' own bytes of the sum of dequantized weight and adapter."""
    tiny.save(
        tiny.hf_model("qwen3", tie_word_embeddings=tied, head_dim=16, **WIDE),
        tmp_path / "dense",
        max_shard_size="60KB",
    )
    model = bridged.bridge(tmp_path / "dense", quantize="nf4")
    if not double:
        plain = tree.map(
            lambda w: nf4.quantize(nf4.dequantize(w), double=False) if isinstance(w, NF4) else w,
            model.params,
        )
        model._params = model._wear(plain, lambda path: False)
    peft_config.apply(model, r=4, lora_alpha=16, target_modules=["q_proj", "up_proj"]).eval()
    bridged.spread_trained(model)
    model.save_pretrained_merged(tmp_path / "four", save_method="merged_4bit")
    found = weights(tmp_path / "four")
    up = model.params["layers"][0]["mlp"]["up"]["weight"]
    adapter = model.adapters["layers"][0]["mlp"]["up"]
    total = (nf4.dequantize(up) + lora.delta(adapter)).detach()
    codes, state = bitsandbytes.functional.quantize_4bit(
        total, blocksize=64, quant_type="nf4", compress_statistics=double
    )
    assert torch.equal(found[UP], codes)
    for name, part_of in state.as_dict(packed=True).items():
        if name.startswith("quant_state"):
            ours, theirs = (json.loads(t.numpy().tobytes()) for t in (found[UP + STATE], part_of))
            assert ours == theirs
        else:
            assert torch.equal(found[f"{UP}.{name}"], part_of), name
    spec, params = purelm.load(tmp_path / "four", quantize="nf4", device="cpu")
    down = params["layers"][2]["mlp"]["down"]["weight"]
    kept = model.params["layers"][2]["mlp"]["down"]["weight"]
    assert all(torch.equal(a, b) for a, b in zip(down.tensors, kept.tensors, strict=True))
    want = decoder.forward(params, spec, bridged.ids())
    bridged.same_logits(want, reload(tmp_path / "four")(bridged.ids()).logits.detach())
    again = bridged.bridge(tmp_path / "four", quantize="nf4")
    again.save_pretrained_merged(tmp_path / "again", save_method="merged_4bit")
    for path in (tmp_path / "four").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


def test_merged_4_bits_keep_what_is_dense(tmp_path: Path) -> None:
    tiny.save(tiny.hf_model("llama", **WIDE), tmp_path / "dense")
    dense_model = bridged.bridge(tmp_path / "dense")
    with pytest.raises(ArgumentError, match="load_in_4bit"):
        dense_model.save_pretrained_merged(tmp_path / "four", save_method="merged_4bit")
    tiny_tokenizers.byte_level(tmp_path / "tokenizer")
    for path in (tmp_path / "tokenizer").glob("token*"):
        shutil.copy(path, tmp_path / "dense")
    model, _ = purelm.FastLanguageModel.from_pretrained(
        tmp_path / "dense",
        dtype=torch.float32,
        quant_skip=["layers.1.", "q_proj"],
        fix_tokenizer=False,
        max_seq_length=None,
        device_map="cpu",
    )
    model = purelm.FastLanguageModel.get_peft_model(model, r=4).eval()
    bridged.spread_trained(model)
    up: Any = model.get_submodule("model.layers.0.mlp.up_proj.lora_B")
    with torch.no_grad():
        up.weight[3] = float("nan")
    with pytest.raises(SaveError, match=r"up_proj.weight merged cannot be stored"):
        model.save_pretrained_merged(tmp_path / "four", save_method="merged_4bit")
    assert not (tmp_path / "four").exists()
    with torch.no_grad():
        up.weight[3] = 0.0
    model.save_pretrained_merged(tmp_path / "four", save_method="merged_4bit")
    fields = json.loads((tmp_path / "four/config.json").read_text())["quantization_config"]
    assert "model.layers.0.self_attn.q_proj" in fields["llm_int8_skip_modules"]
    assert len(fields["llm_int8_skip_modules"]) == 1 + 7 + 2
    spec, params = purelm.load(tmp_path / "four", quantize="nf4", device="cpu")
    want = decoder.forward(params, spec, bridged.ids())
    bridged.same_logits(want, reload(tmp_path / "four")(bridged.ids()).logits.detach())
    assert torch.equal(
        params["layers"][1]["mlp"]["up"]["weight"],
        lora.merge(model.params, model.adapters)["layers"][1]["mlp"]["up"]["weight"],
    )


def test_from_pretrained(stored: Path, tmp_path: Path) -> None:
    """4 bits are the default and stay as stored; 16 bits are trained and saved whole."""
    folder = shutil.copytree(stored, tmp_path / "model")
    tiny_tokenizers.byte_level(tmp_path / "tokenizer")
    for path in (tmp_path / "tokenizer").glob("token*"):
        shutil.copy(path, folder)
    load = purelm.FastLanguageModel.from_pretrained
    options: dict[str, Any] = {"device_map": "cpu", "fix_tokenizer": False, "max_seq_length": None}
    model, _ = load(folder, dtype=torch.float32, **options)
    want = reload(folder)(bridged.ids()).logits.detach()
    bridged.same_logits(model(bridged.ids()).logits.detach(), want)
    double = "nested" in "".join(weights(folder))
    kind = "double-quantized" if double else "plain"
    assert "18 of 39 weights in NF4 (blocks of 64, " + kind in describe(model)
    assert model.config.quantization_config["bnb_4bit_quant_type"] == "nf4"
    trained, _ = load(folder, dtype=torch.float32, full_finetuning=True, **options)
    assert trained.config.quantization_config is None
    bridged.same_logits(trained(bridged.ids()).logits.detach(), want)
    trained.save_pretrained(tmp_path / "saved")
    bridged.same_logits(reload(tmp_path / "saved")(bridged.ids()).logits.detach(), want)


# Files that bitsandbytes never wrote.


def state(**fields: Any) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(found: dict[str, torch.Tensor]) -> None:
        kept = json.loads(found[UP + STATE].numpy().tobytes())
        kept.update(fields)
        text = json.dumps({k: v for k, v in kept.items() if v != "absent"})
        found[UP + STATE] = torch.tensor(list(text.encode()), dtype=torch.uint8)

    return change


def text(content: bytes) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda found: found.update({UP + STATE: torch.tensor(list(content), dtype=torch.uint8)})


def part(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    return lambda found: found.update({UP + name: make(found[UP + name]).contiguous()})


def put(value: Any, index: int = 0) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(t: torch.Tensor) -> torch.Tensor:
        t[index] = value
        return t

    return change


BROKEN: dict[str, tuple[Any, list[str]]] = {
    "no state": (lambda f: f.pop(UP + STATE), ["quant_state", UP]),
    "no absmax": (lambda f: f.pop(f"{UP}.absmax"), ["absmax", UP]),
    "no levels": (lambda f: f.pop(f"{UP}.quant_map"), ["quant_map", UP]),
    "half nested": (lambda f: f.pop(f"{UP}.nested_absmax"), ["nested_absmax", UP]),
    "no codes": (lambda f: f.pop(UP), ["not there", UP]),
    "fp4": (
        lambda f: f.update({f"{UP}.quant_state.bitsandbytes__fp4": f.pop(UP + STATE)}),
        ["fp4", UP],
    ),
    "fp4 in the state": (state(quant_type="fp4"), ["quant_type", "'fp4'"]),
    "block 63": (state(blocksize=63), ["blocksize", "63", "64"]),
    "block 128": (state(blocksize=128), ["absmax", "blocks of 128"]),
    "block true": (state(blocksize=True), ["blocksize", "True"]),
    "block as text": (state(blocksize="64"), ["blocksize", "'64'"]),
    "nested block": (state(nested_blocksize=64), ["nested_blocksize", "256"]),
    "nested dtype": (state(nested_dtype="float16"), ["nested_dtype"]),
    "offset as text": (state(nested_offset="0"), ["nested_offset"]),
    "offset too large": (state(nested_offset=1e39), ["nested_offset"]),
    "dtype": (state(dtype="int8"), ["dtype", "int8", "bfloat16"]),
    "dtype as list": (state(dtype=["bfloat16"]), ["dtype"]),
    "other shape": (state(shape=[81, 48]), [UP, "81"]),
    "transposed": (state(shape=[48, 80]), [UP, "[48, 80]", "[80, 48]"]),
    "negative shape": (state(shape=[-80, -48]), ["shape"]),
    "huge shape": (state(shape=[2**39] * 8), [UP, "found"]),
    "shape null": (state(shape=None), ["shape"]),
    "deep shape": (state(shape=[[[80]]]), ["nested 4 deep"]),
    "unknown field": (state(code="x"), ["expected an object"]),
    "field missing": (state(blocksize="absent"), ["blocksize"]),
    "not json": (text(b"{'quant_type'"), ["JSON"]),
    "empty": (text(b""), ["JSON"]),
    "not utf-8": (text(b"\xff\xfe"), ["JSON"]),
    "a list": (text(b"[]"), ["object"]),
    "nan": (text(b'{"nested_offset": NaN}'), ["NaN"]),
    "twice": (text(b'{"dtype": "a", "dtype": "b"}'), ["twice"]),
    "a pickle": (text(b"\x80\x02}q\x00."), ["JSON"]),
    "a long state": (text(b" " * 5000), ["4096"]),
    "state of floats": (part(STATE, lambda t: t.float()), ["uint8", "float32"]),
    "codes cut": (part("", lambda t: t[:-1]), ["[1919, 1]", "[1920, 1]"]),
    "codes flat": (part("", lambda t: t[:, 0]), ["[1920]", "[1920, 1]"]),
    "absmax cut": (part(".absmax", lambda t: t[:-1]), ["[59]", "[60]"]),
    "absmax of floats": (part(".absmax", lambda t: t.float()), ["float32", "uint8"]),
    "groups": (part(".nested_absmax", lambda t: t.repeat(2)), ["[2]", "[1]"]),
    "NaN scale": (part(".nested_absmax", put(float("nan"))), ["absmax", "NaN", "repair"]),
    "infinite scale": (part(".nested_absmax", put(float("inf"))), ["infinite"]),
    "levels changed": (part(".quant_map", put(0.5, 3)), ["levels", "quant_map"]),
    "nested levels": (part(".nested_quant_map", put(0.5, 3)), ["levels", "nested_quant_map"]),
    "levels cut": (part(".quant_map", lambda t: t[:15]), ["[15]", "[16]"]),
}


@pytest.fixture(scope="module")
def four(tmp_path_factory: Any) -> Path:
    """One file of a double-quantized model."""
    root: Path = tmp_path_factory.mktemp("four")
    tiny.save(tiny.hf_model("llama", num_hidden_layers=1), root / "dense")
    bnb_model(root / "dense", bnb_4bit_use_double_quant=True).save_pretrained(root / "four")
    return root / "four"


@pytest.mark.parametrize("what", BROKEN)
def test_broken_parts_are_named(what: str, four: Path, tmp_path: Path) -> None:
    change, words = BROKEN[what]
    folder = shutil.copytree(four, tmp_path / "model")
    found = {name: t.clone() for name, t in load_file(folder / "model.safetensors").items()}
    change(found)
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    for quantize in ("nf4", None):
        with pytest.raises(CheckpointError) as problem:
            purelm.load(folder, quantize=quantize, device="cpu")
        assert all(word in str(problem.value) for word in [*words, "model.safetensors"])


def test_a_plain_maximum_that_is_nan(stored: Path, tmp_path: Path) -> None:
    """Also one that the dtype asked for cannot hold."""
    folder = shutil.copytree(stored, tmp_path / "model")
    found = weights(folder)
    if f"{UP}.nested_absmax" in found:
        pytest.skip("covered by the scale")
    path = next(p for p in folder.glob("*.safetensors") if f"{UP}.absmax" in load_file(p))
    for value, dtype in ((float("nan"), None), (1e5, torch.float16)):
        part_of = {name: t.clone() for name, t in load_file(path).items()}
        part_of[f"{UP}.absmax"][1] = value
        save_file(part_of, path, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=r"1 of 128 block maxima.*up_proj.weight.absmax"):
            purelm.load(folder, quantize="nf4", dtype=dtype, device="cpu")


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"bnb_4bit_quant_type": "int4"}, "int4"),
        ({"bnb_4bit_quant_storage": "bfloat16"}, "bfloat16"),
        ({"load_in_8bit": True}, "bitsandbytes"),
        ({"quant_method": "hqq"}, "hqq"),
    ],
)
def test_other_ways_to_quantize_are_named(
    changes: dict[str, Any], word: str, four: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(four, tmp_path / "model")
    fields = json.loads((folder / "config.json").read_text())
    fields["quantization_config"].update(changes)
    (folder / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ConfigError, match=rf"{word}.*config\.json"):
        purelm.load(folder, quantize="nf4", device="cpu")


def test_config_and_weights_must_agree(four: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(four, tmp_path / "model")
    fields = json.loads((folder / "config.json").read_text())
    kept = fields.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ConfigError, match="no quantization_config"):
        purelm.load(folder, device="cpu")
    tiny.save(tiny.hf_model("llama"), tmp_path / "dense")
    fields = json.loads((tmp_path / "dense/config.json").read_text())
    text = json.dumps(fields | {"quantization_config": kept})
    (tmp_path / "dense/config.json").write_text(text)
    with pytest.raises(ConfigError, match="none is; remove it"):
        purelm.load(tmp_path / "dense", device="cpu")
