"""FastLanguageModel.from_pretrained: the published signature, and what each argument does."""

import inspect
import json
import random
import shutil
from pathlib import Path
from typing import Any

import corpus
import folders
import numpy
import peft
import pytest
import torch
import transformers
from bridged import ids, same_logits, spread_trained
from safetensors.torch import load_file, save_file

import purelm
from purelm import FastLanguageModel
from purelm.convert.arguments import DEFAULT_4BIT
from purelm.convert.config import Config
from purelm.errors import (
    AdapterError,
    ArgumentError,
    ConfigError,
    InputError,
    SaveError,
    SourceError,
)
from purelm.nn import tree
from purelm.quant.nf4 import NF4

PUBLISHED = {
    "model_name": "unsloth/Llama-3.2-1B-Instruct",
    "max_seq_length": 2048,
    "dtype": None,
    "load_in_4bit": True,
    "load_in_8bit": False,
    "load_in_16bit": False,
    "full_finetuning": False,
    "token": None,
    "device_map": "sequential",
    "rope_scaling": None,
    "fix_tokenizer": True,
    "trust_remote_code": False,
    "use_gradient_checkpointing": "unsloth",
    "resize_model_vocab": None,
    "revision": None,
    "use_exact_model_name": False,
    "offload_embedding": False,
    "float32_mixed_precision": None,
    "fast_inference": False,
    "gpu_memory_utilization": 0.5,
    "float8_kv_cache": False,
    "random_state": 3407,
    "max_lora_rank": 64,
    "disable_log_stats": True,
    "qat_scheme": None,
    "load_in_fp8": False,
    "unsloth_tiled_mlp": False,
}
OURS = [
    "text_only",
    "prefer_prequantized",
    "quant_skip",
    "local_files_only",
    "cache_dir",
    "subfolder",
    "compute",
    "memory_budget",
]
NOT_YET = {"device_map": "balanced"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    folders.whole(path)
    return path


@pytest.fixture(scope="module")
def hf(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )


def load(folder: Path, **arguments: Any) -> Any:
    given = {"load_in_4bit": False, "dtype": torch.float32, **arguments}
    return FastLanguageModel.from_pretrained(str(folder), **given)


# The signature.


def test_the_signature_is_the_published_one() -> None:
    found = inspect.signature(FastLanguageModel.from_pretrained).parameters
    plain = {n: p for n, p in found.items() if p.kind is p.POSITIONAL_OR_KEYWORD}
    assert [(n, p.default) for n, p in plain.items()] == list(PUBLISHED.items())
    assert [n for n, p in found.items() if p.kind is p.KEYWORD_ONLY] == OURS
    assert len(found) == len(PUBLISHED) + len(OURS)  # neither *args nor **kwargs


def test_the_default_of_load_in_4bit_reads_as_true() -> None:
    default = inspect.signature(FastLanguageModel.from_pretrained).parameters["load_in_4bit"]
    assert default.default == True and default.default is not True  # noqa: E712
    assert str(default) == "load_in_4bit: bool = True"
    assert f"{DEFAULT_4BIT}" == "True"


@pytest.mark.parametrize("name", NOT_YET)
def test_what_is_not_implemented_says_so(name: str) -> None:
    """Before anything is looked for: the model's name leads nowhere."""
    value = NOT_YET[name]
    with pytest.raises(NotImplementedError) as caught:
        FastLanguageModel.from_pretrained("/nowhere", **{name: value})
    assert name in str(caught.value) and repr(value) in str(caught.value)


def test_defaults_given_by_name_are_defaults(folder: Path) -> None:
    given = {**PUBLISHED, "model_name": str(folder), "load_in_4bit": DEFAULT_4BIT}
    model, _ = FastLanguageModel.from_pretrained(**given)
    assert any(isinstance(leaf, NF4) for leaf in tree.leaves(model.params))


def test_code_from_a_repository_is_refused_for_good(folder: Path) -> None:
    with pytest.raises(ValueError, match="never runs code"):
        load(folder, trust_remote_code=True)


def test_an_unknown_keyword_is_a_type_error(folder: Path) -> None:
    with pytest.raises(TypeError, match="load_in_4bits"):
        load(folder, load_in_4bits=True)


@pytest.mark.parametrize("name", [None, 3, b"folder"])
def test_a_model_name_is_a_text_or_a_path(folder: Path, name: Any) -> None:
    with pytest.raises(ArgumentError, match="model_name"):
        FastLanguageModel.from_pretrained(name)
    assert FastLanguageModel.from_pretrained(folder)[0].origin.name == str(folder)


# Precision.


def quantized(**arguments: Any) -> Any:
    from purelm.convert.arguments import choose_quantize

    flags = {
        "load_in_4bit": DEFAULT_4BIT,
        "load_in_8bit": False,
        "load_in_16bit": False,
        "load_in_fp8": False,
        "full_finetuning": False,
    }
    return choose_quantize(**{**flags, **arguments})


def test_another_precision_turns_the_default_off() -> None:
    assert quantized() == quantized(load_in_4bit=True) == "nf4"
    assert quantized(load_in_16bit=True) is None
    assert quantized(full_finetuning=True) is None
    assert quantized(full_finetuning=True, load_in_16bit=True) is None
    assert quantized(load_in_4bit=False) is None
    assert quantized(load_in_8bit=True) == "int8"
    assert quantized(load_in_8bit=True, load_in_4bit=False) == "int8"
    assert quantized(load_in_fp8=True) == quantized(load_in_fp8="row") == "fp8"
    assert quantized(load_in_fp8="block", load_in_4bit=False) == "fp8_block"
    with pytest.raises(ArgumentError, match="load_in_fp8 is 'tile'"):
        quantized(load_in_fp8="tile")


@pytest.mark.parametrize("other", ["load_in_8bit", "load_in_16bit", "load_in_fp8"])
def test_two_precisions_by_name_are_an_error(other: str) -> None:
    with pytest.raises(ArgumentError, match=f"load_in_4bit and {other}"):
        quantized(load_in_4bit=True, **{other: True})
    rest = "load_in_16bit" if other != "load_in_16bit" else "load_in_fp8"
    with pytest.raises(ArgumentError, match="one precision"):
        quantized(**{other: True, rest: True})


def test_four_bits_by_name_do_not_train_whole() -> None:
    with pytest.raises(ArgumentError, match="full_finetuning"):
        quantized(load_in_4bit=True, full_finetuning=True)


@pytest.mark.parametrize(
    ("given", "want"),
    [
        ("bfloat16", torch.bfloat16),
        ("torch.float16", torch.float16),
        ("float32", torch.float32),
        (torch.float16, torch.float16),
        (None, torch.bfloat16),
    ],
)
def test_dtypes(folder: Path, given: Any, want: torch.dtype) -> None:
    model, _ = load(folder, dtype=given, load_in_4bit=DEFAULT_4BIT)
    assert model.dtype == want
    for leaf in tree.leaves(model.params):
        assert leaf.dtype == want
    assert model(ids()).logits.dtype == want


@pytest.mark.parametrize("given", ["float8", "bf61", torch.int8, torch.float64, "", 16])
def test_unknown_dtypes(folder: Path, given: Any) -> None:
    with pytest.raises(ArgumentError, match="dtype"):
        load(folder, dtype=given)


# The device.


@pytest.mark.parametrize(
    "given", ["sequential", "auto", None, "cpu", torch.device("cpu"), {"": "cpu"}]
)
def test_one_device(folder: Path, given: Any) -> None:
    if given in ("sequential", "auto", None) and torch.cuda.is_available():
        pytest.skip("chooses the GPU")
    model, _ = load(folder, device_map=given)
    assert model.device == torch.device("cpu")


@pytest.mark.parametrize("given", ["balanced", "unsloth", {"a": "cpu", "b": 0}])
def test_several_devices_wait(folder: Path, given: Any) -> None:
    with pytest.raises(NotImplementedError, match="device_map"):
        load(folder, device_map=given)


@pytest.mark.parametrize("given", ["sequentiel", "disk", "meta", 3.5, {}, -1])
def test_no_such_device(folder: Path, given: Any) -> None:
    with pytest.raises(ArgumentError, match="device_map"):
        load(folder, device_map=given)


# Rope and the context.

SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64},
}


@pytest.mark.parametrize("kind", SCALINGS)
def test_rope_scaling(folder: Path, kind: str) -> None:
    """As transformers with the same config, at lengths the model could not take before."""
    config = transformers.AutoConfig.from_pretrained(folder)
    theta = config.rope_parameters["rope_theta"]
    config.rope_parameters = {"rope_theta": theta, **SCALINGS[kind]}
    config._attn_implementation = "eager"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, config=config).float()
    model, tokenizer = load(folder, rope_scaling=dict(SCALINGS[kind]), max_seq_length=128)
    tokens = ids(3, 1, 100)
    with torch.no_grad():
        same_logits(model(tokens).logits, theirs(tokens).logits)
    assert model.spec.max_positions == tokenizer.model_max_length == 128
    with pytest.raises(InputError, match="129 tokens"):
        model(ids(3, 1, 129))


SPARSE = {
    **SCALINGS,
    "llama3": {k: v for k, v in SCALINGS["llama3"].items() if not k.startswith("original")},
    "yarn": {"type": "yarn", "factor": 2.0},
    "yarn_without_factor": {"rope_type": "yarn", "original_max_position_embeddings": 32},
}


@pytest.mark.parametrize("old_style", [False, True])
@pytest.mark.parametrize("kind", SPARSE)
def test_a_scaled_model_is_saved_as_scaled(
    folder: Path, tmp_path: Path, kind: str, old_style: bool
) -> None:
    """The merged folder alone gives the same context and logits, here and in transformers."""
    if old_style:
        folder = shutil.copytree(folder, tmp_path / "old")
        fields = json.loads((folder / "config.json").read_text())
        fields["rope_theta"] = fields.pop("rope_parameters")["rope_theta"]
        (folder / "config.json").write_text(json.dumps(fields))
    model, _ = load(folder, rope_scaling=SPARSE[kind])
    context, tokens = model.spec.max_positions, ids(3, 1, 60)
    tokens = torch.cat([tokens] * 5, 1)[:, :context]
    model.save_pretrained_merged(tmp_path / "merged")
    again, _ = load(tmp_path / "merged")
    assert again.spec == model.spec
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", attn_implementation="eager"
    )
    limit = theirs.config.max_position_embeddings
    assert limit == (64 if kind == "dynamic" else context)
    with torch.no_grad():
        want = model(tokens).logits
        assert torch.equal(again(tokens).logits, want)
        same_logits(want, theirs(tokens).logits)
    raw = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert isinstance(raw["rope_scaling" if old_style else "rope_parameters"], dict)
    assert raw.get("rope_parameters" if old_style else "rope_scaling") is None


@pytest.mark.parametrize("kind", SPARSE)
def test_an_adapter_keeps_the_scaling_it_was_trained_with(
    folder: Path, tmp_path: Path, kind: str
) -> None:
    model, _ = load(folder, rope_scaling=SPARSE[kind])
    model = FastLanguageModel.get_peft_model(model, r=4)
    spread_trained(model)
    model.eval()
    model.save_pretrained(tmp_path / "adapter")
    again, _ = load(tmp_path / "adapter")
    assert again.spec == model.spec and again.config == model.config
    assert torch.equal(again(ids()).logits, model(ids()).logits)
    assert "with which the adapter was trained" in again.report()
    again.save_pretrained(tmp_path / "second")
    assert load(tmp_path / "second")[0].spec == model.spec
    asked, _ = load(tmp_path / "adapter", rope_scaling={"rope_type": "linear", "factor": 3.0})
    assert asked.spec.max_positions == 192


@pytest.mark.parametrize("text", ["{", "[1]", '{"rope_type": "spiral"}', '{"factor": 1e999}'])
def test_a_bad_scaling_in_an_adapter(folder: Path, tmp_path: Path, text: str) -> None:
    model = FastLanguageModel.get_peft_model(load(folder)[0], r=4)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file(load_file(file), file, {"format": "pt", "purelm.rope_scaling": text})
    with pytest.raises((AdapterError, ConfigError), match="rope"):
        load(tmp_path)


@pytest.mark.parametrize(
    "given", [{"rope_type": "spiral", "factor": 2.0}, {"rope_type": "linear"}, "linear", 2.0]
)
def test_a_bad_rope_scaling(folder: Path, given: Any) -> None:
    with pytest.raises((ArgumentError, ConfigError), match="rope|factor"):
        load(folder, rope_scaling=given)


def test_max_seq_length_is_a_hint_and_cuts_nothing(folder: Path) -> None:
    model, tokenizer = load(folder, max_seq_length=8)
    assert model.max_seq_length == 8
    assert tokenizer.model_max_length == 64  # the model's own context is longer
    assert model(ids(1, 1, 40)).logits.shape[1] == 40
    model, tokenizer = load(folder, max_seq_length=4096)
    assert tokenizer.model_max_length == 4096 and "4096" in model.report()
    with pytest.raises(InputError, match="65 tokens"):
        model(ids(1, 1, 65))
    assert load(folder, max_seq_length=None)[0].max_seq_length == 64


@pytest.mark.parametrize("given", [0, -1, 2.5, "2048", True])
def test_a_bad_max_seq_length(folder: Path, given: Any) -> None:
    with pytest.raises(ArgumentError, match="max_seq_length"):
        load(folder, max_seq_length=given)


# The vocabulary and the tokenizer.


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "apart"])
def test_more_rows(tmp_path: Path, tied: bool) -> None:
    theirs = folders.whole(tmp_path / "model", tie_word_embeddings=tied)
    model, _ = load(tmp_path / "model", resize_model_vocab=folders.VOCAB + 5)
    assert model.config.vocab_size == model.spec.vocab == folders.VOCAB + 5
    for path in ["embed"] if tied else ["embed", "head"]:
        weight = model.params[path]["weight"]
        hf = theirs.get_input_embeddings() if path == "embed" else theirs.get_output_embeddings()
        assert torch.equal(weight[:-5], hf.weight)
        torch.testing.assert_close(weight[-5:], hf.weight.mean(0).expand(5, -1))
    last = torch.tensor([[3, folders.VOCAB + 4]])
    assert model(last).logits.shape[-1] == folders.VOCAB + 5
    with pytest.raises(InputError, match=str(folders.VOCAB + 4)):
        model(last + 1)
    model.save_pretrained_merged(tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        same_logits(model(last).logits, merged(last).logits)


@pytest.mark.parametrize("given", [folders.VOCAB - 1, 0, -1, 500.0, "500", True])
def test_rows_are_never_thrown_away(folder: Path, given: Any) -> None:
    with pytest.raises(ArgumentError, match="resize_model_vocab"):
        load(folder, resize_model_vocab=given)


def test_fix_tokenizer(tmp_path: Path) -> None:
    """A pad token that is the end of a turn is replaced, or left for who asks for it."""
    folders.whole(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": "<|im_end|>"}))
    _, fixed = load(tmp_path)
    assert fixed.pad_token_id is not None and fixed.pad_token_id != fixed.eos_token_id
    _, left = load(tmp_path, fix_tokenizer=False)
    assert left.pad_token == left.eos_token == "<|im_end|>"


def test_fix_tokenizer_uses_no_id_without_a_row(tmp_path: Path) -> None:
    folders.whole(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    fields = json.loads(path.read_text())
    del fields["pad_token"]
    path.write_text(json.dumps(fields))
    model, tokenizer = load(tmp_path)
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    assert tokenizer.pad_token_id < model.spec.vocab == model.config.vocab_size


def test_what_the_examples_print(folder: Path) -> None:
    model, tokenizer = FastLanguageModel.from_pretrained(str(folder), device_map="cpu")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert (model.dtype, model.device) == (torch.bfloat16, torch.device("cpu"))
    assert len(tokenizer) == len(theirs)
    assert tokenizer.padding_side == "left" and tokenizer.model_max_length == 2048
    assert model.config.model_type == "llama" and model.config.vocab_size == folders.VOCAB


# Randomness and adapters.


def adapters(folder: Path, seed: int) -> Any:
    model, _ = load(folder, random_state=seed)
    return FastLanguageModel.get_peft_model(model, r=4, random_state=seed)


def test_random_state(folder: Path) -> None:
    """The same seed gives the same adapters, and no global generator moves."""
    torch.manual_seed(0)
    before = torch.get_rng_state(), random.getstate(), str(numpy.random.get_state())
    one, two, other = (adapters(folder, seed).state_dict() for seed in (1, 1, 2))
    after = torch.get_rng_state(), random.getstate(), str(numpy.random.get_state())
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_an_adapter_folder_finds_its_base(folder: Path, tmp_path: Path) -> None:
    model = adapters(folder, 1)
    spread_trained(model)
    model.save_pretrained(tmp_path / "adapter")
    again, tokenizer = load(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())[
        "base_model_name_or_path"
    ] == str(folder)
    model.eval()
    assert torch.equal(model(ids()).logits, again(ids()).logits)
    assert len(tokenizer) == len(model.tokenizer) and len(again.state_dict()) == 42


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_the_adapters_vocabulary_is_grown_to(folder: Path, hf: Any, tmp_path: Path) -> None:
    """The base has fewer rows than the adapter's copies; peft needs it resized by hand."""
    rows = hf.config.vocab_size + 5
    model, _ = load(folder, resize_model_vocab=rows)
    assert rows > hf.config.vocab_size
    model = FastLanguageModel.get_peft_model(
        model, r=4, modules_to_save=["embed_tokens", "lm_head"]
    )
    spread_trained(model)
    model.eval().save_pretrained(tmp_path / "adapter")
    again, _ = load(tmp_path / "adapter")
    assert again.spec.vocab == again.config.vocab_size == rows
    assert f"grew to {rows} rows" in again.report()
    tokens = torch.tensor([[3, rows - 1, 5]])
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    theirs.resize_token_embeddings(rows, mean_resizing=False)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    with torch.no_grad():
        same_logits(again(tokens).logits, theirs(tokens).logits)
    plain, _ = load(folder)
    with pytest.raises(AdapterError, match=f"resize_model_vocab={rows}"):
        plain.load_adapter(tmp_path / "adapter", "grown")


def test_another_precision_than_the_adapters_is_said(folder: Path, tmp_path: Path) -> None:
    adapters(folder, 1).save_pretrained(tmp_path / "adapter")
    with pytest.warns(UserWarning, match="trained on a base stored in 16bit, this one .* in nf4"):
        model, _ = load(tmp_path / "adapter", load_in_4bit=True)
    assert "trained on a base stored in 16bit" in model.report()
    with pytest.warns(UserWarning, match="stored in 16bit"):
        model.load_adapter(tmp_path / "adapter", "next")


def test_an_adapter_without_a_base(folder: Path, tmp_path: Path) -> None:
    adapters(folder, 1).save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter/adapter_config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(fields | {"base_model_name_or_path": None}))
    with pytest.raises(ConfigError, match="base_model_name_or_path"):
        load(tmp_path / "adapter")
    path.write_text(json.dumps(fields | {"base_model_name_or_path": "/gone"}))
    with pytest.raises(SourceError, match="/gone"):
        load(tmp_path / "adapter")
    path.write_text(json.dumps(fields))
    with pytest.raises(ArgumentError, match="full_finetuning"):
        load(tmp_path / "adapter", full_finetuning=True)


def test_quant_skip(folder: Path) -> None:
    model, _ = FastLanguageModel.from_pretrained(str(folder), quant_skip=["down_proj", "layers.0."])
    dense = {p for p, leaf in tree.items(model.params) if not isinstance(leaf, NF4)}
    assert {"layers.0.attn.q.weight", "layers.2.mlp.down.weight"} < dense
    assert "layers.1.attn.q.weight" not in dense
    for bad in ("down_proj", ["dwon_proj"], [""], [3]):
        with pytest.raises(ArgumentError, match="quant_skip"):
            FastLanguageModel.from_pretrained(str(folder), quant_skip=bad)


def test_use_exact_model_name_changes_nothing(folder: Path, hf: Any) -> None:
    one, two = load(folder)[0], load(folder, use_exact_model_name=True)[0]
    assert torch.equal(one(ids()).logits, two(ids()).logits)
    with torch.no_grad():
        same_logits(one(ids()).logits, hf(ids()).logits)


def test_the_config_is_the_files_own(folder: Path) -> None:
    model, _ = load(folder)
    assert model.config == Config.from_folder(folder)
    assert purelm.__version__


def test_a_pad_token_where_no_row_is_spare(tmp_path: Path) -> None:
    """It gets a row of its own, the report says so, and what is saved has it too."""
    corpus.good(tmp_path / "model")
    rows = corpus.CONFIG["vocab_size"] - 1
    found = corpus.tensors()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        found[name] = found[name][:rows].clone()
    save_file(found, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    (tmp_path / "model/config.json").write_text(json.dumps(corpus.CONFIG | {"vocab_size": rows}))
    path = tmp_path / "model/tokenizer.json"
    path.write_text(path.read_text().replace("<pad>", "<own>"))
    path = tmp_path / "model/tokenizer_config.json"
    path.write_text(path.read_text().replace("<pad>", "</s>"))
    model, left = load(tmp_path / "model", fix_tokenizer=False)
    assert model.spec.vocab == len(left) == rows and left.pad_token == "</s>"
    model, tokenizer = load(tmp_path / "model")
    assert tokenizer.pad_token_id == rows == len(tokenizer) - 1
    assert model.spec.vocab == model.config.vocab_size == rows + 1
    assert "pad_token was '</s>'" in model.report() and "260 rows" in model.report()
    tokens = torch.tensor([[3, rows]])
    model.save_pretrained_merged(tmp_path / "merged")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        same_logits(model(tokens).logits, theirs(tokens).logits)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert again.pad_token_id == rows and again.pad_token != again.eos_token


def test_full_finetuning_trains_all_in_16_bits(folder: Path) -> None:
    model, _ = FastLanguageModel.from_pretrained(str(folder), full_finetuning=True)
    assert all(p.requires_grad and p.dtype == model.dtype for p in model.parameters())
    names = [name for name, _ in model.named_parameters()]
    with pytest.warns(UserWarning, match="full_finetuning"):
        assert FastLanguageModel.get_peft_model(model) is model
    assert [name for name, _ in model.named_parameters()] == names
    assert model.state_dict().keys() == set(names)


def test_settings_belong_to_a_model(folder: Path) -> None:
    """Not to the process: loading a second one changes nothing about the first."""
    plain, _ = load(folder)
    want = plain(ids()).logits
    scaled, _ = load(folder, rope_scaling=SCALINGS["linear"], use_gradient_checkpointing=False)
    assert torch.equal(plain(ids()).logits, want) and plain.spec.max_positions == 64
    assert not torch.equal(scaled(ids()).logits, want)
    assert plain.is_gradient_checkpointing and not scaled.is_gradient_checkpointing
    assert plain.config.rope_parameters != scaled.config.rope_parameters


@pytest.mark.parametrize(
    "given",
    [
        {"load_in_16bit": "no"},
        {"load_in_4bit": None},
        {"load_in_4bit": "yes"},
        {"full_finetuning": 1},
        {"fix_tokenizer": "no"},
        {"trust_remote_code": "never"},
        {"local_files_only": 0},
        {"random_state": -1},
        {"random_state": "x"},
    ],
    ids=str,
)
def test_values_that_are_no_switch_are_refused(folder: Path, given: Any) -> None:
    with pytest.raises(ArgumentError, match=next(iter(given))):
        FastLanguageModel.from_pretrained(str(folder), **given)


def test_the_report_says_what_backward_keeps(folder: Path) -> None:
    model, _ = load(folder)
    assert "backward: x offload, qkv recompute" in model.report()
    assert (
        "backward: x keep, qkv keep" in load(folder, use_gradient_checkpointing=False)[0].report()
    )


def test_an_adapter_is_not_put_into_its_base(folder: Path, tmp_path: Path) -> None:
    """There its tokenizer would replace the base's, and the folder would load as an adapter."""
    base = shutil.copytree(folder, tmp_path / "base")
    model = FastLanguageModel.get_peft_model(load(base)[0], r=2)
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    with pytest.raises(SaveError, match="loaded from"):
        model.save_pretrained(base)
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before
    model.save_pretrained(tmp_path / "adapter")
    load(tmp_path / "adapter")[0].save_pretrained(tmp_path / "adapter")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("value", ["</s>", [2, "x"], 1.5, True, {}])
def test_an_eos_that_is_no_id_is_named_with_its_file(
    folder: Path, tmp_path: Path, name: str, value: Any
) -> None:
    bad = shutil.copytree(folder, tmp_path / "bad")
    (bad / "generation_config.json").unlink(missing_ok=True)
    fields = json.loads((bad / name).read_text()) if (bad / name).exists() else {}
    (bad / name).write_text(json.dumps({**fields, "eos_token_id": value}))
    with pytest.raises(ConfigError, match=f"eos_token_id.*bad/{name}"):
        load(bad)


def test_a_scaling_is_of_the_layers_that_see_far(folder: Path, tmp_path: Path) -> None:
    """Gemma 3 has a rotary base for each kind of layer, and scales one of them."""
    kinds_of_layers = ["sliding_attention", "full_attention", "sliding_attention"]
    folders.whole(tmp_path / "near", "gemma3_text")
    with pytest.raises(ArgumentError, match="every layer has a window"):
        load(tmp_path / "near", rope_scaling=SCALINGS["linear"])
    folders.whole(tmp_path / "new", "gemma3_text", layer_types=kinds_of_layers)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "new")
    long = config.rope_parameters["full_attention"]
    config.rope_parameters["full_attention"] = {**long, **SCALINGS["linear"]}
    config._attn_implementation = "eager"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new", config=config)
    model, _ = load(tmp_path / "new", rope_scaling=SCALINGS["linear"], max_seq_length=128)
    tokens = ids(3, 1, 100)
    with torch.no_grad():
        same_logits(model(tokens).logits, theirs.float()(tokens).logits)
    model.save_pretrained_merged(tmp_path / "saved")
    again, _ = load(tmp_path / "saved", max_seq_length=None)
    assert list(again.spec.ropes()) == list(model.spec.ropes()) and again.spec.max_positions == 128
    only = json.loads((tmp_path / "new" / "config.json").read_text())
    only["rope_parameters"].pop("full_attention")
    (tmp_path / "new" / "config.json").write_text(json.dumps(only))
    with pytest.raises(ConfigError, match="full_attention"):
        load(tmp_path / "new", rope_scaling=SCALINGS["linear"])
    only["rope_parameters"]["full_attention"] = long
    (tmp_path / "new" / "config.json").write_text(json.dumps(only))
    file = tmp_path / "new" / "config.json"
    fields = json.loads(file.read_text())
    ropes = fields.pop("rope_parameters")
    fields["rope_theta"] = ropes["full_attention"]["rope_theta"]
    fields["rope_local_base_freq"] = ropes["sliding_attention"]["rope_theta"]
    fields["layer_types"] = ["sliding_attention", "full_attention", "sliding_attention"]
    file.write_text(json.dumps(fields))
    model, _ = load(tmp_path / "new", rope_scaling=SCALINGS["linear"])
    kinds = {layer.attention.rope.kind for layer in model.spec.layers}
    assert kinds == {"default", "linear"} and model.spec.max_positions == 128
    model.save_pretrained_merged(tmp_path / "merged")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", attn_implementation="eager"
    )
    with torch.no_grad():
        same_logits(model(ids()).logits, theirs(ids()).logits)


@pytest.mark.parametrize("tied", [False, True])
def test_the_embedding_is_looked_up(tied: bool, tmp_path: Path) -> None:
    folders.whole(tmp_path, tie_word_embeddings=tied)
    lines = load(tmp_path)[0].explain().splitlines()
    assert lines[0].startswith("embed: float32, rows looked up")
    assert lines[0].endswith("as the head a dense product") == tied
    assert ("head: float32, dense product" in lines) != tied


def test_float32_mixed_precision(folder: Path) -> None:
    """What is trained is in fp32 where that is asked for, and what is computed in elsewhere."""

    def trained(model: Any) -> set[torch.dtype]:
        model.train()(ids(), labels=ids()).loss.backward()
        found = [p for p in model.parameters() if p.requires_grad]
        assert found and all(p.grad is not None and p.grad.dtype == p.dtype for p in found)
        assert model(ids()).logits.dtype == torch.bfloat16
        return {p.dtype for p in found}

    half = {"dtype": torch.bfloat16}
    for asked, want in ((None, torch.float32), (True, torch.float32), (False, torch.bfloat16)):
        model, _ = load(folder, float32_mixed_precision=asked, **half)
        model = FastLanguageModel.get_peft_model(model, r=4, modules_to_save=["lm_head"])
        assert trained(model) == {want}
    for asked, want in ((None, torch.bfloat16), (True, torch.float32), (False, torch.bfloat16)):
        model, _ = load(folder, float32_mixed_precision=asked, full_finetuning=True, **half)
        assert trained(model) == {want}
    with pytest.raises(ArgumentError, match="float32_mixed_precision is 'yes'"):
        load(folder, float32_mixed_precision="yes")


def test_weights_in_fp32_learn_what_bf16_cannot_hold(folder: Path, tmp_path: Path) -> None:
    """Steps smaller than half a step of bf16 add up; generating and saving see them."""
    options: dict[str, Any] = {"dtype": torch.bfloat16, "full_finetuning": True}
    mixed, _ = load(folder, float32_mixed_precision=True, **options)
    plain, _ = load(folder, **options)
    assert torch.equal(mixed.eval()(ids()).logits, plain.eval()(ids()).logits)
    start = plain.params["layers"][0]["mlp"]["up"]["weight"].detach().clone()
    with torch.no_grad():
        for model in (mixed, plain):
            weight = model.params["layers"][0]["mlp"]["up"]["weight"]
            for _ in range(64):
                weight.add_(start.to(weight.dtype) * 2**-10)
    assert torch.equal(plain.params["layers"][0]["mlp"]["up"]["weight"], start)
    before = mixed.reference()(ids()).logits
    assert torch.equal(before, mixed(ids()).logits)
    assert not torch.equal(before, plain(ids()).logits)
    made = mixed.generate(ids(), max_new_tokens=4)
    assert torch.equal(made, mixed.reference().generate(ids(), max_new_tokens=4))
    mixed.save_pretrained(tmp_path / "saved")
    again, _ = load(tmp_path / "saved", dtype=torch.bfloat16)
    assert torch.equal(again(ids()).logits, before)


def test_adapters_in_half_are_saved_and_read(folder: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"dtype": torch.bfloat16, "float32_mixed_precision": False}
    model, _ = load(folder, **options)
    model = FastLanguageModel.get_peft_model(model, r=4, init_lora_weights="gaussian").eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05)
    model.save_pretrained(tmp_path / "adapter")
    again, _ = load(tmp_path / "adapter", **options)
    found = {p.dtype for n, p in again.named_parameters() if "lora_" in n}
    assert found == {torch.bfloat16}
    assert torch.equal(again(ids()).logits, model(ids()).logits)
