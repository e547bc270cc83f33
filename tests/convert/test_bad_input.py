"""Bad input through the public names: one kind of error that says what, where and what to do."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import folders
import pytest
import torch
from audit import watched
from bridged import ids
from corpus import BROKEN, CONFIG, DOWN, Broken, canary, good, sharded, tensors, write_index
from safetensors.torch import save_file

from purelm import FastLanguageModel
from purelm.errors import (
    ArgumentError,
    CheckpointError,
    ConfigError,
    InputError,
    LoadError,
    SourceError,
    TokenizerError,
)


@pytest.fixture(scope="module", autouse=True)
def everything_imported(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What loading imports late is imported before anything is watched."""
    folder = good(tmp_path_factory.mktemp("good"))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    load(folder)


def load(folder: Path, **arguments: Any) -> Any:
    return FastLanguageModel.from_pretrained(str(folder), device_map="cpu", **arguments)


def change(folder: Path, file: str = "config.json", **fields: Any) -> Path:
    """`folder` with fields of a JSON file replaced; None removes one."""
    path = folder / file
    found = json.loads(path.read_text()) if path.exists() else {}
    found = {k: v for k, v in (found | fields).items() if v is not None}
    path.write_text(json.dumps(found))
    return folder


# Every broken checkpoint.


def refused(case: Broken, tmp_path: Path) -> None:
    folder = case.build(tmp_path / "broken")
    for four_bits in (True, False):
        start = time.process_time()
        with pytest.raises(LoadError) as caught:
            load(folder, load_in_4bit=four_bits)
        assert time.process_time() - start < 2
        assert type(caught.value) is case.error
        assert str(tmp_path) in str(caught.value) or caught.value.tensor


@pytest.mark.parametrize("case", BROKEN[::4], ids=lambda case: case.name)
def test_a_quarter_of_the_broken_checkpoints(case: Broken, tmp_path: Path) -> None:
    refused(case, tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("case", BROKEN, ids=lambda case: case.name)
def test_every_broken_checkpoint(case: Broken, tmp_path: Path) -> None:
    refused(case, tmp_path)


# The list, one by one: what is wrong, and what the message must say.


def _weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        found = tensors()
        change(found)
        save_file(found, folder / "model.safetensors", metadata={"format": "pt"})

    return spoil


def _outside(folder: Path) -> None:
    canary(folder)
    write_index(folder, sharded(folder) | {DOWN: "../canary.safetensors"})


def _pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


LISTED: dict[str, tuple[Callable[[Path], object], type[LoadError], list[str]]] = {
    "no model_type": (
        lambda f: change(f, model_type=None),
        ConfigError,
        ["model_type", "config.json"],
    ),
    "unknown model_type": (
        lambda f: change(f, model_type="lama"),
        ConfigError,
        ["'lama'", "llama, mistral, qwen2, qwen3", "config.json"],
    ),
    "unknown field": (
        lambda f: change(f, attention_sinks=4, residual_multiplier=0.2),
        ConfigError,
        ["attention_sinks=4", "residual_multiplier=0.2", "config.json"],
    ),
    "a field switched on": (
        lambda f: change(f, attention_dropout=0.1),
        ConfigError,
        ["attention_dropout=0.1"],
    ),
    "stored quantized": (
        lambda f: change(f, quantization_config={"quant_method": "gptq"}),
        ConfigError,
        ["gptq", "bits", "config.json"],
    ),
    "quantized by nobody knows what": (
        lambda f: change(f, quantization_config=["gptq"]),
        ConfigError,
        ["gptq", "config.json"],
    ),
    "missing tensor": (
        _weights(lambda t: t.pop(DOWN)),
        CheckpointError,
        ["missing " + DOWN],
    ),
    "extra tensor": (
        _weights(lambda t: t.update({"model.layers.0.self_attn.sinks": torch.ones(2)})),
        CheckpointError,
        ["not expected model.layers.0.self_attn.sinks"],
    ),
    "wrong shape": (
        _weights(lambda t: t.update({DOWN: torch.zeros(16, 25)})),
        CheckpointError,
        [DOWN, "[16, 25]", "[16, 24]", "model.safetensors"],
    ),
    "not finite": (
        _weights(lambda t: t["model.norm.weight"][3].fill_(float("nan"))),
        CheckpointError,
        ["model.norm.weight", "1 of 16 values", "model.safetensors"],
    ),
    "cut": (
        lambda f: os.truncate(f / "model.safetensors", 9000),
        CheckpointError,
        ["cut short", "model.safetensors"],
    ),
    "garbage": (
        lambda f: (f / "model.safetensors").write_bytes(bytes(range(256)) * 8),
        CheckpointError,
        ["model.safetensors"],
    ),
    "index out of the folder": (_outside, CheckpointError, ["'../canary.safetensors'"]),
    "pickle only": (_pickle_only, CheckpointError, ["pytorch_model.bin", "pickle", "convert"]),
    "no tokenizer": (
        lambda f: (f / "tokenizer.json").unlink(),
        TokenizerError,
        ["tokenizer.json"],
    ),
    "a tokenizer in another format": (
        lambda f: (f / "tokenizer.json").rename(f / "tokenizer.model"),
        TokenizerError,
        ["tokenizer.model", "SentencePiece"],
    ),
    "generation_config a list": (
        lambda f: (f / "generation_config.json").write_text("[]"),
        ConfigError,
        ["generation_config.json"],
    ),
    "rope_parameters a list": (
        lambda f: change(f, rope_parameters=["linear"]),
        ConfigError,
        ["rope_parameters", "config.json"],
    ),
}


@pytest.mark.parametrize("name", LISTED)
def test_listed(name: str, tmp_path: Path) -> None:
    spoil, error, texts = LISTED[name]
    spoil(good(tmp_path / "model"))
    before = sorted(p.name for p in (tmp_path / "model").iterdir())
    for more in ({}, {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}):
        with watched() as events, pytest.raises(LoadError) as caught:
            load(tmp_path / "model", **more)
        assert type(caught.value) is error
        for text in texts:
            assert text in str(caught.value)
        assert [event for event in events if event[0] != "open"] == []
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == before


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=f"{tmp_path}/gone"):
        load(tmp_path / "gone")
    with pytest.raises(SourceError, match="found a file"):
        (tmp_path / "file").write_text("")
        load(tmp_path / "file")
    with pytest.raises(ConfigError, match="config.json"):
        (tmp_path / "empty").mkdir()
        load(tmp_path / "empty")


def test_no_weights_are_read_for_want_of_a_tokenizer(tmp_path: Path) -> None:
    good(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with watched() as events, pytest.raises(TokenizerError):
        load(tmp_path)
    assert not any(path.endswith(".safetensors") for _, path in events)


def test_values_that_the_dtype_cannot_hold(tmp_path: Path) -> None:
    _weights(lambda t: t[DOWN][0].fill_(1e6))(good(tmp_path))
    with pytest.raises(CheckpointError, match=r"24 of 384 .*float16.*float32"):
        load(tmp_path, dtype="float16", load_in_16bit=True)
    load(tmp_path, dtype="bfloat16", load_in_16bit=True)


# Adapters, keywords and batches.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    folders.whole(path)
    return path


ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "r=0": ({"r": 0}, "r is 0"),
    "r=-1": ({"r": -1}, "-1"),
    "r a text": ({"r": "16"}, "'16'"),
    "no such target": ({"target_modules": ["qkv_proj"]}, "'qkv_proj'.*q_proj"),
    "one of two targets": ({"target_modules": ["q_proj", "qkv_proj"]}, "'qkv_proj'"),
    "a pattern that matches nothing": ({"target_modules": r".*\.attention\.q"}, "target_modules"),
    "a broken pattern": ({"target_modules": "(q_proj"}, "regular expression"),
    "no target": ({"target_modules": []}, "target_modules"),
    "layers beyond the last": ({"layers_to_transform": [3]}, "layers_to_transform"),
    "alpha": ({"lora_alpha": 0}, "lora_alpha"),
    "dropout": ({"lora_dropout": 1.5}, "lora_dropout"),
    "bias": ({"bias": "some"}, "bias"),
    "start": ({"init_lora_weights": "gauss"}, "init_lora_weights"),
    "checkpointing": ({"use_gradient_checkpointing": "unslot"}, "use_gradient_checkpointing"),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_adapter_arguments(folder: Path, name: str) -> None:
    given, match = ARGUMENTS[name]
    model, _ = load(folder)
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(ArgumentError, match=match):
        FastLanguageModel.get_peft_model(model, **given)
    # Nothing half put on.
    after = dict(model.named_parameters())
    assert after.keys() == before.keys() and not model.peft_config and not model.state_dict()
    assert all(torch.equal(p, before[n]) for n, p in after.items())


def test_unknown_keywords(folder: Path) -> None:
    with pytest.raises(TypeError, match="max_sequence_length"):
        load(folder, max_sequence_length=2048)
    model, _ = load(folder)
    with pytest.raises(TypeError, match="rank"):
        FastLanguageModel.get_peft_model(model, rank=8)


def test_batches(folder: Path) -> None:
    model, _ = load(folder)
    with pytest.raises(InputError, match=f"0..{folders.VOCAB - 1}"):
        model(ids() + folders.VOCAB)
    with pytest.raises(InputError, match="context of 64"):
        model(ids(1, 1, 65))
    with pytest.raises(InputError):
        model.generate(ids() + folders.VOCAB, max_new_tokens=1)


# Hostile repositories: nothing of theirs runs, nobody is called, nothing is written.

EVIL = {"AutoConfig": "modeling_evil.Config", "AutoModelForCausalLM": "modeling_evil.Model"}
REMOTE = "somebody/flash-kernel"
PAYLOAD = "{{ cycler.__init__.__globals__.os.mkdir('executed') }}"
HOSTILE: dict[str, Callable[[Path], object]] = {
    "auto_map": lambda f: change(f, auto_map=EVIL),
    "auto_map elsewhere": lambda f: change(f, auto_map={"AutoModel": "somebody/x--evil.Model"}),
    "internal attention": lambda f: change(f, _attn_implementation_internal=REMOTE),
    "internal attention again": lambda f: change(f, _attn_implementation=REMOTE),
    "attention": lambda f: change(f, attn_implementation=REMOTE),
    "experts": lambda f: change(f, _experts_implementation_internal=REMOTE),
    "trust in itself": lambda f: change(f, trust_remote_code=True),
    "architectures": lambda f: change(f, architectures=["os.system"]),
    "dtype": lambda f: change(f, torch_dtype="__import__('os').mkdir('executed')"),
    "activation": lambda f: change(f, hidden_act="os.mkdir"),
    "custom pipelines": lambda f: change(f, custom_pipelines={"x": {"impl": "evil.Pipeline"}}),
    "name_or_path": lambda f: change(f, name_or_path=REMOTE, _name_or_path=REMOTE),
    "quantizer": lambda f: change(f, quantization_config={"quant_method": "evil", "modules": "x"}),
    "class": lambda f: change(f, __class__="evil", __dict__={"x": 1}, fields={"vocab_size": 1}),
    "tokenizer auto_map": lambda f: change(
        f, "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Tokenizer", None]}
    ),
    "tokenizer class": lambda f: change(f, "tokenizer_config.json", tokenizer_class="evil.Evil"),
    "tokenizer file": lambda f: change(
        f, "tokenizer_config.json", tokenizer_file=str(f.parent / "canary"), vocab_file="/dev/zero"
    ),
    "template": lambda f: change(f, "tokenizer_config.json", chat_template=PAYLOAD),
    "template file": lambda f: (f / "chat_template.jinja").write_text(PAYLOAD),
    "template that includes": lambda f: (f / "chat_template.jinja").write_text(
        "{% include '/etc/passwd' %}{% import 'os' as os %}"
    ),
    "template link": lambda f: (f / "chat_template.jinja").symlink_to("/etc/hostname"),
    "generation": lambda f: change(
        f, "generation_config.json", custom_generate=REMOTE, _from_model_config=True
    ),
    "pickles beside": lambda f: (f / "training_args.bin").write_bytes(b"\x80\x02cos\nmkdir\n."),
    "processor auto_map": lambda f: change(
        f, "preprocessor_config.json", auto_map={"AutoProcessor": "modeling_evil.Processor"}
    ),
    "kernels of the hub": lambda f: change(f, use_kernels=True, kernel_config={"x": REMOTE}),
    "quantization by code": lambda f: change(
        f, quantization_config={"quant_method": "custom", "auto_map": EVIL, "code": PAYLOAD}
    ),
    "modules of known names": lambda f: [
        (f / name).write_text("import os\nos.mkdir('executed')\n")
        for name in ("torch.py", "gguf.py", "sitecustomize.py", "conftest.py", "setup.py")
    ],
    "entry points": lambda f: (
        (f / "x.dist-info").mkdir(),
        (f / "x.dist-info" / "entry_points.txt").write_text("[torch.backends]\nx = modeling_evil"),
    ),
    "adapter elsewhere": lambda f: change(
        f, "adapter_config.json", peft_type="LORA", base_model_name_or_path="/nowhere/base", r=4
    ),
    "adapter of another kind": lambda f: change(
        f, "adapter_config.json", peft_type="__import__('os')", base_model_name_or_path=str(f)
    ),
    "adapter auto_mapping": lambda f: change(
        f,
        "adapter_config.json",
        peft_type="LORA",
        base_model_name_or_path=str(f),
        auto_mapping={"base_model_class": "Evil", "parent_library": "modeling_evil"},
    ),
}


def _of_jinja(event: tuple[str, str]) -> bool:
    kind, what = event
    if kind == "compile":
        return what.startswith('(b"from jinja2.runtime import') and what.endswith("'<template>')")
    return kind == "exec" and 'file "<template>"' in what


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_repositories(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = good(tmp_path / "model")
    (folder / "modeling_evil.py").write_text("import os\nos.mkdir('executed')\n")
    HOSTILE[name](folder)
    monkeypatch.chdir(folder)  # where an import by name would find the module
    with watched() as events:
        try:
            model, _ = load(folder)
        except LoadError:
            model = None
    inside = os.path.realpath(tmp_path)
    # A template is looked at when loading; jinja2 compiles it for its sandbox.
    events = [e for e in events if not ("template" in name and _of_jinja(e))]
    assert [e for e in events if e[0] != "open" or not Path(e[1]).is_relative_to(inside)] == []
    assert not any(path.endswith((".py", ".bin", "canary")) for _, path in events)
    assert not (folder / "executed").exists()
    if model is not None:
        assert model.config.model_type == "llama" and model.spec.vocab == CONFIG["vocab_size"]
        assert not [name for name in model.config.to_dict() if name.startswith("_")]
