"""Metadata that lies: GGUF fields, SentencePiece models, adapters; typed errors, time, memory.

What is spoilt is drawn by hypothesis; what can be named is named.
"""

import json
import os
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import bridged
import corpus
import gguf_models
import pytest
import stored_bases
import torch
from faults import bounded, spoil, spoilt_value
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from stored_bases import Stored

from purelm.convert.adapter_load import load as load_adapter
from purelm.convert.gguf_file import GGUF, open_gguf
from purelm.convert.gguf_model import checkpoint, config_fields
from purelm.convert.gguf_tokenizer import read_tokenizer
from purelm.convert.load import load_folder
from purelm.convert.registry import FAMILIES
from purelm.convert.tokenizer import Tokenizer
from purelm.errors import AdapterError, ArgumentError, LoadError, SourceError, TokenizerError
from purelm.nn import lora, tree

FILES = ("llama", "qwen2_moe", "gemma3_text", "cohere2", "phi3")


@pytest.fixture(scope="module")
def ggufs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, GGUF]:
    """A parsed file of families that say different things."""
    made = {}
    for family in FILES:
        folder = tmp_path_factory.mktemp(family)
        model = gguf_models.model_of(folder, family, adapt=False, **gguf_models.FAMILIES[family])
        (path,) = model.save_pretrained_gguf(
            folder / "out", gguf_models.tokenizer(), quantization_method="q8_0"
        )
        made[family] = open_gguf(path)
    return made


def used(held: GGUF) -> None:
    """All that a header is asked for."""
    fields = config_fields(held)
    FAMILIES[fields["model_type"]].spec(fields, held.file)
    checkpoint(held)
    read_tokenizer(held)


@pytest.mark.parametrize("family", FILES)
@given(data=st.data())
def test_spoilt_fields_of_a_gguf(family: str, ggufs: dict[str, GGUF], data: st.DataObject) -> None:
    held = ggufs[family]
    fields = dict(held.fields)
    if data.draw(st.booleans()):
        # What no reader sees is of no use: names that are looked up come first.
        fields[f"{family.removesuffix('_text')}.rope.scaling.type"] = data.draw(
            st.sampled_from(["linear", "yarn", "longrope"])
        )
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(sorted(fields)))
        value = fields[name]
        if isinstance(value, list) and data.draw(st.booleans()):
            value = list(value)
            at = data.draw(st.integers(0, len(value) - 1)) if value else 0
            value[at : at + 1] = [spoilt_value(data.draw)] * data.draw(st.integers(0, 2))
            fields[name] = value
        elif data.draw(st.integers(0, 4)):
            fields[name] = spoilt_value(data.draw)
        else:
            del fields[name]
    with bounded():
        try:
            used(replace(held, fields=MappingProxyType(fields)))
        except LoadError as problem:
            assert len(str(problem)) < 8000


@given(data=st.data())
def test_spoilt_bytes_of_a_gguf(
    data: st.DataObject, ggufs: dict[str, GGUF], tmp_path_factory: pytest.TempPathFactory
) -> None:
    held = ggufs[data.draw(st.sampled_from(FILES))]
    content = bytearray(held.file.read_bytes())
    first = min(info.offset for info in held.tensors.values())
    for _ in range(data.draw(st.integers(1, 4))):
        # Counts, lengths and types stand in words; the texts between them matter less.
        at = data.draw(st.integers(0, first - 8))
        what = data.draw(st.sampled_from([b"\xff" * 8, bytes(8), b"\x01", b"\x08\0\0\0", b"\x80"]))
        content[at : at + len(what)] = what
    path = tmp_path_factory.mktemp("flip") / "m.gguf"
    path.write_bytes(content)
    with bounded(), warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            used(open_gguf(path))
            load_folder(path, quantize=None, dtype=torch.float32, device=torch.device("cpu"))
        except LoadError as problem:
            assert len(str(problem)) < 8000


# SentencePiece.


def _spm(folder: Path, content: bytes, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(content)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


PIECES = stored_bases.pieces()
SPM: dict[str, tuple[bytes, str]] = {
    "no pieces": (stored_bases.sentencepiece([]), "no pieces"),
    "a piece twice": (stored_bases.sentencepiece([*PIECES, ("ab", 0.0, 1)]), "twice"),
    "no unknown": (stored_bases.sentencepiece(PIECES[1:]), "unknown"),
    "words": (stored_bases.sentencepiece(PIECES, kind=3), "kind is 3"),
    "characters": (stored_bases.sentencepiece(PIECES, kind=4), "kind is 4"),
    "score NaN": (stored_bases.sentencepiece([*PIECES, ("x", float("nan"), 1)]), "score"),
    "score infinite": (stored_bases.sentencepiece([*PIECES, ("x", float("inf"), 1)]), "score"),
    "a long piece": (stored_bases.sentencepiece([*PIECES, ("x" * 9000, 0.0, 1)]), "no text"),
    "cut": (stored_bases.sentencepiece(PIECES)[:-3], "cut short"),
    "a length of 2^60": (b"\x0a" + b"\xff" * 8 + b"\x0f", "cut short"),
    "a number without end": (b"\x08" + b"\xff" * 40, "64 bits"),
    "a group": (stored_bases.sentencepiece(PIECES) + b"\x0b\x0c", "wire type 3"),
    "pickle": (b"\x80\x04\x95\x10\0\0\0\0\0\0\0\x8c\x05posix", "SentencePiece"),
    "trainer a number": (stored_bases.sentencepiece(PIECES) + b"\x10\x01", "number"),
    "suffixed spaces": (
        stored_bases.sentencepiece(PIECES) + b"\x12\x03\xc0\x01\x01", "end of its pieces"),
    "bare spaces": (stored_bases.sentencepiece(PIECES) + b"\x1a\x02\x28\x00", "escape"),
    "a charsmap of garbage": (
        stored_bases.sentencepiece(PIECES) + b"\x1a\x06\x12\x04\xff\xff\xff\xff", "made"),
}  # fmt: skip


@pytest.mark.parametrize("what", SPM)
def test_hostile_sentencepiece_models(what: str, tmp_path: Path) -> None:
    content, said = SPM[what]
    with bounded(), pytest.raises(TokenizerError, match=said) as caught:
        Tokenizer.from_folder(_spm(tmp_path / "t", content))
    assert "tokenizer.model" in str(caught.value)


def test_the_good_one_reads(tmp_path: Path) -> None:
    folder = _spm(tmp_path / "t", stored_bases.sentencepiece(PIECES), bos_token="<s>")
    made = Tokenizer.from_folder(folder)
    assert made("ab c", add_special_tokens=False)["input_ids"] == [266, 259, 262]


@given(data=st.data())
def test_spoilt_sentencepiece_models(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    words = list(PIECES)
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, len(words) - 1))
        score = data.draw(st.sampled_from([0.0, 1e38, -1e38, float("nan"), -1.5]))
        text = data.draw(st.text(max_size=12))
        words[at] = (text, score, data.draw(st.integers(0, 9)))
    content = bytearray(stored_bases.sentencepiece(words, data.draw(st.integers(0, 5))))
    for _ in range(data.draw(st.integers(0, 2))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    config = {
        "bos_token": "<s>",
        "added_tokens_decoder": {"300": {"content": "<x>", "special": True}},
        "legacy": False,
    }
    if data.draw(st.booleans()):
        config[data.draw(st.sampled_from(sorted(config)))] = spoilt_value(data.draw)
    folder = _spm(tmp_path_factory.mktemp("spm"), bytes(content), **config)
    with bounded():
        try:
            Tokenizer.from_folder(folder)("ab \u00e9\0 <s>x")
        except LoadError as problem:
            assert str(folder) in str(problem) and len(str(problem)) < 8000


# Adapters: one folder of several, as peft writes them.


@pytest.fixture(scope="module")
def worn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A model and the folder of its two adapters, the second in a folder of its own."""
    folder = tmp_path_factory.mktemp("worn")
    model = bridged.bridge(corpus.good(folder / "base"))
    generator = torch.Generator().manual_seed(0)
    model.set_adapters(lora.init(model.spec, rank=4, generator=generator))
    model.add_adapter("second", r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model.save_pretrained(folder / "adapter")
    assert (folder / "adapter" / "second" / "adapter_config.json").is_file()
    return model, folder / "adapter"


@pytest.mark.parametrize("which", [".", "second"])
@given(data=st.data())
def test_spoilt_adapters(
    which: str,
    worn: tuple[Any, Path],
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
) -> None:
    model, whole = worn
    source = whole / which
    config = json.loads((source / "adapter_config.json").read_text())
    stored = Stored(load_file(source / "adapter_model.safetensors"), config)
    spoil(data.draw, stored)
    folder = tmp_path_factory.mktemp("adapter")
    stored_bases.write(stored, folder)
    (folder / "config.json").rename(folder / "adapter_config.json")
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    with bounded(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            made = load_adapter(model, folder)
        except LoadError as problem:
            assert len(str(problem)) < 8000
        else:
            for t in tree.tensors((made.adapters, made.trained)):
                assert bool(t.isfinite().all())


@pytest.mark.parametrize("name", ["..", "../base", "/etc", "second/../..", "", "second\0", "link"])
def test_an_adapter_is_in_its_folder(name: str, worn: tuple[Any, Path], tmp_path: Path) -> None:
    model, whole = worn
    folder = tmp_path / "several"
    shutil.copytree(whole, folder)
    shutil.copytree(whole / "second", tmp_path / "outside")
    os.symlink(tmp_path / "outside", folder / "link")
    with bounded(), pytest.raises((ArgumentError, SourceError, AdapterError)):
        model.load_adapter(folder, "another", subfolder=name)
    assert "another" not in model.peft_config


def test_an_adapter_of_another_model(worn: tuple[Any, Path], tmp_path: Path) -> None:
    import folders

    folders.whole(tmp_path / "other", "qwen2")
    with pytest.raises(AdapterError, match="lora_"):
        bridged.bridge(tmp_path / "other").load_adapter(worn[1], "another")
