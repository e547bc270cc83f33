"""How byte-level tokenizers of GGUF files cut text, under every name, against llama.cpp."""

import json
import unicodedata
from pathlib import Path
from typing import Any

import gguf
import pytest
import tokenizers
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from purelm.convert.gguf_file import open_gguf
from purelm.convert.gguf_splits import SPLITS, name_of
from purelm.convert.gguf_tokenizer import read_tokenizer
from purelm.convert.gguf_tokenizer_write import check_tokenizer, tokenizer_fields
from purelm.convert.gguf_write import _add
from purelm.convert.tokenizer import Tokenizer
from purelm.errors import TokenizerError

TEXTS = [
    "Hello world, it's DON'T I'll we've  two  spaces   three",
    "1 12 123 1234 12345 123456 1,234.56 x1y22z333 \u0663\u0664\u0665 \u00bd \u2163",
    "tabs\t\there\n\nnew\r\nlines \n \n\n  x\n", "   ", "a", "\n", " \n ",
    "!!! ??? ... $$$ `a` ~^|",
    "HTTPServer parseXMLFile camelCaseWords UPPER lower MiXeD\u00c9t\u00e9 \u0130stanbul",
    "na\u00efve cafe\u0301 \u65e5\u672c\u8a9e\u3068\u4e2d\u6587 \ud55c\uad6d\uc5b4 "
    "\u0939\u093f\u0928\u094d\u0926\u0940 \u0e44\u0e17\u0e22 \u0645\u0631\u062d\u0628\u0627",
    "def f(x):\n    return x**2 # comment\n\nclass A: pass", "\U0001f642\U0001f3fd \u200d\u200b",
    "https://example.com/a_b?c=1&d=%20#e", "a\u00a0b\u3000c\u2028d", "'s 't 're 'S 'LL x's",
]  # fmt: skip
# Rules that llama.cpp follows in ASCII only: it has others in place of letters by case with their
# marks, and of spaces, than the tokenizers that were published, which ours follow.
APPROXIMATED = (
    *("gpt-4o", "llama4", "kanana2", "minimax-m2", "tekken", "tiny_aya", "deepseek-coder"),
)


@pytest.fixture(scope="module")
def words() -> tokenizers.Tokenizer:
    """A byte-level vocabulary with tokens across all that a rule may cut."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=1400, show_progress=False, max_token_length=8,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    made.train_from_iterator(TEXTS * 3, trainer)
    return made


def file_of(words: tokenizers.Tokenizer, pre: str, path: Path) -> Path:
    model = json.loads(words.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([*tokens, "<|end|>"])
    writer.add_token_types([1] * len(tokens) + [3])
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    writer.add_token_merges(merges)
    writer.add_eos_token_id(len(tokens))
    writer.add_bos_token_id(len(tokens))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def comparable(pre: str, text: str) -> bool:
    """llama.cpp normalises nothing."""
    normalised = SPLITS[pre].normalizer is None or unicodedata.is_normalized("NFC", text)
    return normalised and (pre not in APPROXIMATED or text.isascii())


def theirs(path: Path) -> Any:
    llama_cpp = pytest.importorskip("llama_cpp")
    try:
        return llama_cpp.Llama(model_path=str(path), vocab_only=True, verbose=False)
    except ValueError:
        pytest.skip("this llama.cpp does not know the name")


@pytest.mark.parametrize("pre", SPLITS)
def test_ids_are_llama_cpps(pre: str, words: tokenizers.Tokenizer, tmp_path: Path) -> None:
    path = file_of(words, pre, tmp_path / "t.gguf")
    ours, other = read_tokenizer(open_gguf(path)), theirs(path)
    for text in TEXTS:
        if not comparable(pre, text):
            continue
        ids = ours(text, add_special_tokens=False)["input_ids"]
        assert ids == other.tokenize(text.encode(), add_bos=False, special=False), text
    assert ours("a")["input_ids"] == other.tokenize(b"a", add_bos=True, special=False)


@pytest.mark.full
@settings(max_examples=100)
@given(text=st.text(max_size=60))
@pytest.mark.parametrize("pre", SPLITS)
def test_any_text_as_llama_cpp(
    pre: str, text: str, words: tokenizers.Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = Path(tmp_path_factory.getbasetemp()) / f"{pre}.gguf"
    if not path.exists():
        file_of(words, pre, path)
    assume(comparable(pre, text) and "\0" not in text)
    ours, other = read_tokenizer(open_gguf(path)), theirs(path)
    ids = ours(text, add_special_tokens=False)["input_ids"]
    assert ids == other.tokenize(text.encode(), add_bos=False, special=False)


def made_by(words: tokenizers.Tokenizer, pre_tokenizer: Any, normalizer: Any, whole: bool) -> Any:
    """The tokenizer of a tokenizer.json with that rule."""
    made = json.loads(words.to_str())
    made["model"]["ignore_merges"] = whole
    made |= {"pre_tokenizer": pre_tokenizer, "normalizer": normalizer}
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(made)), {})


@pytest.mark.parametrize("pre", SPLITS)
def test_a_rule_is_written_under_a_name_that_means_it(
    pre: str, words: tokenizers.Tokenizer
) -> None:
    rule = SPLITS[pre]
    made = made_by(words, rule.pre_tokenizer, rule.normalizer, rule.ignore_merges)
    fields = tokenizer_fields(made, 2000)
    written = SPLITS[fields["tokenizer.ggml.pre"]]
    assert (written.patterns, written.normalizer) == (rule.patterns, rule.normalizer)
    assert written.ignore_merges == rule.ignore_merges
    assert not fields["tokenizer.ggml.add_bos_token"]


LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
DIGITS = {"type": "Digits", "individual_digits": True}
DEEPSEEK = (
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}"
    "\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
)


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


# As published in tokenizer.json files: starcoder2, command-r, GPT-2, DeepSeek-V3 (with the
# characters \r and \n themselves).
PUBLISHED: dict[str, tuple[list[Any], Any]] = {
    "smollm": ([DIGITS, LEVEL], None),
    "command-r": ([DIGITS, {**LEVEL, "use_regex": True}], {"type": "NFC"}),
    "gpt-2": ([LEVEL], {"type": "Sequence", "normalizers": []}),
    "deepseek-v3": (
        [split(r"\p{N}{1,3}"), split("[一-龥぀-ゟ゠-ヿ]+"), split(DEEPSEEK),
         {**LEVEL, "use_regex": False}], None),
}  # fmt: skip


@pytest.mark.parametrize("pre", PUBLISHED)
def test_published_forms_of_a_rule(pre: str) -> None:
    steps, normalizer = PUBLISHED[pre]
    found = name_of(normalizer, {"type": "Sequence", "pretokenizers": steps}, False)
    assert found == pre


@pytest.mark.parametrize(
    "steps",
    [
        [{**LEVEL, "add_prefix_space": True}],
        [{**LEVEL, "use_regex": False}],
        [split(r"\p{N}{1,4}"), LEVEL],
        [{**split(r"\p{N}"), "behavior": "Removed"}, LEVEL],
        [{**split(r"\p{N}"), "invert": True}, LEVEL],
        [{"type": "Whitespace"}, LEVEL],
    ],
)
def test_other_rules_have_no_name(steps: list[Any], words: tokenizers.Tokenizer) -> None:
    made = made_by(words, {"type": "Sequence", "pretokenizers": steps}, None, False)
    with pytest.raises(TokenizerError, match="has no name in a GGUF file"):
        tokenizer_fields(made, 2000)


def test_whole_words_where_llama_cpp_has_none(words: tokenizers.Tokenizer) -> None:
    """GPT-OSS takes words whole, which its name does not say: all is well if merges make them."""
    rule = SPLITS["gpt-4o"].pre_tokenizer
    fields = tokenizer_fields(made_by(words, rule, None, True), 2000)
    assert fields["tokenizer.ggml.pre"] == "gpt-4o"
    made = json.loads(words.to_str())
    made["model"]["vocab"]["never"] = len(made["model"]["vocab"])
    other = tokenizers.Tokenizer.from_str(json.dumps(made))
    with pytest.raises(TokenizerError, match="does not join|joins"):
        tokenizer_fields(made_by(other, rule, None, True), 2000)


def gemma(order: list[list[str]]) -> Tokenizer:
    """A tokenizer built as Gemma's is, with these merges first."""
    space = "\u2581"
    merges = [*order, [space, "a"], ["a", "b"], [space + "a", "b"], [space, "ab"]]
    tokens = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), space, "a", "b"]
    tokens += dict.fromkeys(left + right for left, right in merges)
    made = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": space},
        "pre_tokenizer": {"type": "Split", "pattern": {"String": " "}, "invert": False,
                          "behavior": "MergedWithPrevious"},
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": space}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {"type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True,
                  "vocab": {token: i for i, token in enumerate(tokens)}, "merges": merges},
    }  # fmt: skip
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(made)), {"unk_token": "<unk>"})


def runs(longest: int) -> list[list[str]]:
    """Merges of spaces in Gemma's order: the longest left part first."""
    pairs = [(i, j) for i in range(longest) for j in range(1, longest - i + 1) if i]
    pairs.sort(key=lambda pair: (-pair[0], -pair[1]))
    return [["\u2581" * i, "\u2581" * j] for i, j in pairs]


def test_gemmas_runs_of_spaces(tmp_path: Path) -> None:
    ours = gemma(runs(6))
    fields = tokenizer_fields(ours, 300)
    assert fields["tokenizer.ggml.model"] == "llama"
    assert not fields["tokenizer.ggml.add_space_prefix"]
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    for name, value in fields.items():
        _add(writer, name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    written = open_gguf(tmp_path / "t.gguf")
    check_tokenizer(written, ours)
    again = read_tokenizer(written)
    for text in (*("a" + " " * n + "b ab" for n in range(20)), "  ab  b   a"):
        assert again(text)["input_ids"] == ours(text)["input_ids"]
    # Shorter runs first is another tokenizer, of which scores cannot tell.
    with pytest.raises(TokenizerError, match="do not follow from scores"):
        tokenizer_fields(gemma(runs(6)[::-1]), 300)


def test_a_token_without_an_embedding_is_left_out(tmp_path: Path) -> None:
    """As Gemma 3's <image_soft_token>, which its text models have no row for."""
    ours = gemma(runs(3))
    size = len(ours)
    ours.add_tokens(["<image_soft_token>"])
    with pytest.warns(UserWarning, match=f"image_soft_token.* has the id {size}"):
        fields = tokenizer_fields(ours, size)
    assert len(fields["tokenizer.ggml.tokens"]) == size
    with pytest.raises(TokenizerError, match="embeddings; resize"):
        tokenizer_fields(ours, size - 1)
