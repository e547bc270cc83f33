"""Publishers' tokenizers, where they lie: the tokenizers library's ids and texts, transformers'
encodings, and time in proportion to the text.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from assets import PUBLISHED, published, shared
from hypothesis import given, settings
from hypothesis import strategies as st

from purelm.convert.tokenizer import Tokenizer
from purelm.convert.tokenizer_repair import diagnose, repair

HERE = {name: f"assets/tokenizers/{name}" for name in ("smollm2", "minimind")}
HERE["stories260K"] = "assets/stories260K"
FAMILIES = [*PUBLISHED, *HERE]
QUICK = ["qwen3", "llama2", *HERE]  # the others take seconds to open
# What pieces of texts are made of where tokenizers have come apart before.
ODD = [
    *" \n\t\r\x00\x7f\u00a0\u1680\u200b\u200d\u2028\u202e\u3000\ufe0f\ufeff\ufffd\uffff▁Ġ",
    *("é", "e\u0301", "ﷺ", "ǅ", "İ", "ß", "ﬀ", "가", "각", "が", "👩‍👧", "🏳️‍🌈", "🇯🇵"),
    *("  ", "\r\n", "\n\n\n", " \n ", "don't", "I'LL", "'s", "1234567", "٣٤", "½", "²", "<0x0A>"),
    *("<s>", "</s>", "<|im_end|>", "<|eot_id|>", "<bos>", "<|end|>", "<｜end▁of▁sentence｜>"),
    *("[INST]", "<think>", "<|", "|>", "<unk>", "<pad>", "x_y.z(", "http://", "\u4e00", "ひらカタ"),
]
PIECE = st.sampled_from(ODD) | st.text(max_size=6) | st.text(alphabet="ab .,1", max_size=6)
TEXT = st.lists(PIECE, max_size=8).map("".join)
AT_ONCE = 20
RUNS = [*"a A1é你!'\n\t▁\u0301\U0001f600", "\r\n", " \n", "ab", "</s>", "e\u0301", "a ", "don't"]


def folder(name: str) -> Path:
    return shared(HERE[name]) if name in HERE else published(name)


@cache
def tokenizer(name: str) -> Tokenizer:
    return Tokenizer.from_folder(folder(name))


@cache
def backend(name: str) -> Any:
    """The library's own reading of the file; special tokens that only the config names added."""
    made = tokenizers.Tokenizer.from_file(str(folder(name) / "tokenizer.json"))
    made.no_padding()
    made.no_truncation()
    special = tokenizer(name).all_special_tokens
    made.add_special_tokens([t for t in special if made.token_to_id(t) is None])
    return made


@cache
def theirs(name: str) -> Any:
    return transformers.PreTrainedTokenizerFast.from_pretrained(folder(name))


@contextmanager
def sided(name: str, sides: tuple[str, str]) -> Iterator[tuple[Tokenizer, Any]]:
    """Ours and theirs, cutting and padding at these sides."""
    pair = tokenizer(name), theirs(name)
    before = [(each.truncation_side, each.padding_side) for each in pair]
    try:
        for each in pair:
            each.truncation_side, each.padding_side = sides
        yield pair
    finally:
        for each, old in zip(pair, before, strict=True):
            each.truncation_side, each.padding_side = old


def plain(encoding: Any) -> dict[str, Any]:
    return {k: v.tolist() if hasattr(v, "tolist") else v for k, v in encoding.items()}


def compare(name: str, texts: list[str], specials: bool) -> None:
    ours, library = tokenizer(name), backend(name)
    made = ours(texts, add_special_tokens=specials, return_offsets_mapping=True)
    want = library.encode_batch(texts, add_special_tokens=specials)
    assert made.input_ids == [row.ids for row in want]
    assert made["offset_mapping"] == [row.offsets for row in want]
    assert made.attention_mask == [row.attention_mask for row in want]
    for skip in (True, False):
        decoded = ours.batch_decode(made.input_ids, skip_special_tokens=skip)
        assert decoded == library.decode_batch([r.ids for r in want], skip_special_tokens=skip)


def strings(count: int) -> Any:
    """`count` strings in all, some at a time."""
    draws = st.lists(TEXT, min_size=AT_ONCE, max_size=AT_ONCE)
    return lambda test: settings(max_examples=count // AT_ONCE)(
        given(texts=draws, specials=st.booleans())(test)
    )


@pytest.mark.parametrize("name", QUICK)
@strings(1_000)
def test_a_thousand_strings(name: str, texts: list[str], specials: bool) -> None:
    compare(name, texts, specials)


@pytest.mark.full
@pytest.mark.parametrize("name", FAMILIES)
@strings(10_000)
def test_ten_thousand_strings(name: str, texts: list[str], specials: bool) -> None:
    compare(name, texts, specials)


@pytest.mark.full
@pytest.mark.parametrize("name", FAMILIES)
def test_every_character(name: str) -> None:
    """All of Unicode, each character alone behind a letter and in a row with its neighbours."""
    numbers = [n for n in range(0x110000) if not 0xD800 <= n <= 0xDFFF]
    # Most of planes 3 to 14 is not assigned, and what is not falls to one rule: its bytes.
    numbers = [n for n in numbers if n < 0x30000 or n % 97 == 0 or n >= 0xE0000 and n < 0xE0200]
    for start in range(0, len(numbers), 4096):
        some = [chr(n) for n in numbers[start : start + 4096]]
        compare(name, [f"a{c}" for c in some] + ["".join(some)], False)


@pytest.mark.full
@pytest.mark.parametrize("name", FAMILIES)
def test_runs_of_a_hundred_thousand(name: str) -> None:
    for piece in RUNS:
        text = (piece * 100_000)[:100_000]
        compare(name, [text, f"{text}x", f"x {text}"], True)


@pytest.mark.full
@pytest.mark.parametrize("name", FAMILIES)
def test_a_megabyte_takes_seconds(name: str) -> None:
    """There and back, on one thread: 5 s for what is 1 MB in UTF-8, whatever it is made of."""
    ours, slowest = tokenizer(name), (0.0, "")
    for piece in ("a", "1", "é", "你", "\n", " \n", "a ", "</s>"):
        text = piece * (1_000_000 // len(piece.encode()))
        began = time.process_time()
        ours.decode(ours.encode(text, add_special_tokens=False))
        slowest = max(slowest, (time.process_time() - began, piece))
    print(f"{name}: 1 MB there and back in at most {slowest[0]:.2f} s, of {slowest[1]!r}")
    assert slowest[0] < 5


OPTIONS = st.fixed_dictionaries(
    {
        "add_special_tokens": st.booleans(),
        "truncation": st.sampled_from([False, True, "longest_first"]),
        "max_length": st.sampled_from([8, 16, 32]),
        "stride": st.integers(0, 2),
        "return_overflowing_tokens": st.booleans(),
        "pad_to_multiple_of": st.sampled_from([None, 8]),
        "split_special_tokens": st.booleans(),
    }
)


@pytest.mark.full
@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=200)
@given(
    texts=st.lists(TEXT, min_size=1, max_size=4),
    pairs=st.booleans(),
    words=st.booleans(),
    sides=st.tuples(st.sampled_from(["left", "right"]), st.sampled_from(["left", "right"])),
    padding=st.sampled_from([False, "longest", "max_length"]),
    options=OPTIONS,
)
def test_calls_equal_transformers(
    name: str,
    texts: list[str],
    pairs: bool,
    words: bool,
    sides: tuple[str, str],
    padding: bool | str,
    options: dict[str, Any],
) -> None:
    given_ = dict(options, padding=padding if theirs(name).pad_token else False)
    if not given_["padding"]:
        given_["pad_to_multiple_of"] = None
    if not given_["truncation"]:
        given_ |= {"stride": 0, "return_overflowing_tokens": False}
        given_["max_length"] = 64 if given_["padding"] == "max_length" else None
    rows: Any = [text.split(" ") for text in texts] if words else texts
    more = [rows[::-1]] if pairs else []
    given_ |= {"is_split_into_words": words, "return_special_tokens_mask": True}
    given_ |= {"return_offsets_mapping": True, "return_length": True}
    with sided(name, sides) as (ours, hf):
        made, want = ours(rows, *more, **given_), hf(rows, *more, **given_)
        assert plain(made) == plain(want)
        assert made.word_ids(0) == want.word_ids(0)
        for row in want["input_ids"]:
            assert ours.decode(row) == hf.decode(row)
            assert ours.decode(row, skip_special_tokens=True) == hf.decode(
                row, skip_special_tokens=True
            )


@pytest.mark.full
@pytest.mark.parametrize("name", FAMILIES)
def test_attributes_equal_transformers(name: str) -> None:
    ours, hf = Tokenizer.from_folder(folder(name)), theirs(name)
    for attribute in (
        "special_tokens_map all_special_tokens all_special_ids vocab_size model_max_length "
        "padding_side truncation_side model_input_names chat_template bos_token_id eos_token_id "
        "pad_token_id unk_token_id added_tokens_encoder clean_up_tokenization_spaces"
    ).split():
        assert getattr(ours, attribute) == getattr(hf, attribute), attribute
    assert len(ours) == len(hf) and ours.get_vocab() == hf.get_vocab()
    again = Tokenizer.from_transformers(ours.to_transformers())
    text = " Hello  wörld 你好 👩‍👧\n\n\tdon't <|im_end|></s> ▁x"
    assert again(text) == ours(text) and plain(ours(text)) == plain(hf(text))


# Rows of the models' embeddings, and what is wrong with the tokenizers beside them.
WRONG = {
    "llama3": (128256, "pad-missing template-ignores-generation-prompt end-of-turn-not-eos"),
    "llama3_1": (128256, "pad-missing double-bos"),
    "llama2": (32000, "pad-missing"),
    "qwen3": (151936, ""),
    "gemma3": (262144, "ids-out-of-range double-bos"),
    "gptoss": (201088, ""),
    "deepseek_v3": (129280, "pad-is-eos"),
}


@pytest.mark.full
@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_with_them_is_found(name: str) -> None:
    rows, kinds = WRONG[name]
    ours = Tokenizer.from_folder(folder(name))
    assert [finding.kind for finding in diagnose(ours, vocab_rows=rows)] == kinds.split()
    changes = repair(ours, vocab_rows=rows)
    assert bool(changes) == ("pad" in kinds) and not any(change.rows for change in changes)
    assert ours.pad_token_id not in (None, ours.eos_token_id, ours.bos_token_id)
    assert ours.pad_token_id < rows


TEMPLATES = {
    "qwen3": "qwen3_training",
    "llama3": "llama3_training",
    "gemma3": "gemma3_training",
    "gptoss": "gptoss_training",
    "deepseek_v3": "deepseekv3_training",
    "smollm2": "qwen2_5_training",
}


@pytest.mark.full
@pytest.mark.parametrize("name", TEMPLATES)
def test_generation_masks_equal_transformers(name: str) -> None:
    """A publisher's tokenizer with the marked form of its template: ids and the mask of each."""
    found = find_spec("trl")
    if found is None or not found.submodule_search_locations:
        pytest.skip("needs trl, which carries the templates")
    files = Path(found.submodule_search_locations[0]) / "chat_templates"
    template = (files / f"{TEMPLATES[name]}.jinja").read_text(encoding="utf-8")
    chat = [
        {"role": "user", "content": "wörld?  "},
        {"role": "assistant", "content": "It is 3 °C.\n"},
        {"role": "user", "content": "<|im_end|> 你好"},
        {"role": "assistant", "content": " bye 👩‍👧"},
    ]
    options = {"chat_template": template, "return_assistant_tokens_mask": True}
    ours, hf = tokenizer(name), theirs(name)
    made = ours.apply_chat_template(chat, return_dict=True, **options)
    want = hf.apply_chat_template(chat, return_dict=True, **options)
    assert made["input_ids"] == want["input_ids"] and 0 < sum(want["assistant_masks"])
    assert made["assistant_masks"] == want["assistant_masks"]
