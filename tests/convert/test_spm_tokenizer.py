"""Tokenizers made of SentencePiece models: ids as sentencepiece's and transformers'."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import purelm
from purelm.convert.spm_file import read_pieces
from purelm.convert.tokenizer import Tokenizer
from purelm.errors import TokenizerError

sentencepiece = pytest.importorskip("sentencepiece")
_DATA = Path(purelm.__file__).parent / "data" / "instructions"
KINDS: dict[str, dict[str, Any]] = {
    "bpe": {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False},
    "bpe, squeezed": {"model_type": "bpe", "byte_fallback": True},
    "bpe, no prefix": {"model_type": "bpe", "byte_fallback": True, "add_dummy_prefix": False,
                       "normalization_rule_name": "identity", "remove_extra_whitespaces": False},
    "unigram": {"model_type": "unigram"},
}  # fmt: skip
TEXTS = [
    "Hello world", "two  spaces ", "", "naïve café", "日本語テキスト", "a\nb\tc", "🦙🦙",
    "ﬁne ½ Ⅳ", "x" * 40, "The capital of France is Paris.",
]  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with a small model of each kind."""
    text = "\n".join(file.read_text() for file in sorted(_DATA.iterdir()))
    root, made = tmp_path_factory.mktemp("spm"), {}
    (root / "text").write_text(text[:60_000])
    for number, (kind, options) in enumerate(KINDS.items()):
        folder = made[kind] = root / str(number)
        folder.mkdir()
        sentencepiece.SentencePieceTrainer.train(
            input=str(root / "text"), model_prefix=str(folder / "tokenizer"), vocab_size=400,
            hard_vocab_limit=False, minloglevel=2, **options,
        )  # fmt: skip
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    return made


def same(folder: Path, text: str) -> None:
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    ours = Tokenizer.from_folder(folder)
    ids = ours(text, add_special_tokens=False)["input_ids"]
    assert ids == oracle.encode(text), text
    if oracle.unk_id() not in ids:  # sentencepiece writes a sign of its own for it
        assert ours.decode(ids) == oracle.decode(ids), text


@pytest.mark.parametrize("kind", KINDS)
def test_the_ids_are_those_of_sentencepiece(kind: str, models: dict[str, Path]) -> None:
    for text in TEXTS:
        same(models[kind], text)
    if "squeezed" in kind or kind == "unigram":
        same(models[kind], "  a   b ")


@given(text=st.text(max_size=30))
@settings(max_examples=60, deadline=None)
def test_any_text(text: str, models: dict[str, Path]) -> None:
    for kind in ("bpe", "bpe, no prefix"):
        # transformers puts no space before a text that begins with one.
        same(models[kind], text.lstrip(" \u2581").replace("\0", ""))


def test_as_transformers_makes_it(models: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    for number, fields in enumerate(
        ({}, {"add_eos_token": True}, {"add_bos_token": True}, {"legacy": True})
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "tokenizer.model").write_bytes((models["bpe"] / "tokenizer.model").read_bytes())
        config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>",
                  "unk_token": "<unk>"}  # fmt: skip
        config["added_tokens_decoder"] = {"400": {"content": "<|end|>", "special": True}}
        (folder / "tokenizer_config.json").write_text(json.dumps(config | fields))
        ours, theirs = Tokenizer.from_folder(folder), AutoTokenizer.from_pretrained(folder)
        for text in [*TEXTS, " a", "\u2581b", "   ", "one<|end|> two</s>three", "<s> x"]:
            assert ours(text)["input_ids"] == theirs(text)["input_ids"], (fields, text)
        assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)


def test_it_is_saved_as_a_tokenizer_json(models: dict[str, Path], tmp_path: Path) -> None:
    ours = Tokenizer.from_folder(models["bpe"])
    ours.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "tokenizer.json").is_file()
    again = Tokenizer.from_folder(tmp_path / "saved")
    for text in TEXTS:
        assert ours(text)["input_ids"] == again(text)["input_ids"]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_broken_models_give_a_typed_error(data: st.DataObject, models: dict[str, Path]) -> None:
    whole = (models["bpe"] / "tokenizer.model").read_bytes()
    broken = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    for _ in range(data.draw(st.integers(0, 4))):
        if broken:
            broken[data.draw(st.integers(0, len(broken) - 1))] = data.draw(st.integers(0, 255))
    folder = models["bpe"].parent / "broken"
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(broken)
    try:
        pieces = read_pieces(folder)
        Tokenizer.from_folder(folder)
    except TokenizerError as problem:
        assert "tokenizer.model" in str(problem)
    else:
        assert pieces.pieces


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no pieces"),
        (b"IQ== 0\nIg== 1\n", "not a SentencePiece model"),
        (b"\x0b", "wire type 3"),
        (b"\x0a\xff\xff\xff\xff\x7f", "cut short"),
        (b"\x0a\x04\x0a\x02\xff\xfe", "not a SentencePiece model"),
    ],
)
def test_what_is_no_model(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_folder(tmp_path)
