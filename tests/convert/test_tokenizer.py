"""The tokenizer against transformers' fast one on the same folders, and against bad folders."""

import copy
import json
import pickle
import re
import threading
import time

import pytest
import torch
import transformers
from assets import shared
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizers import CHATML, CHATML_TOKENS, MARKED, byte_level, sentencepiece

from purelm.convert.tokenizer import Tokenizer
from purelm.errors import ArgumentError, InputError, SaveError, TemplateError, TokenizerError

KINDS = {"byte_level": byte_level, "sentencepiece": sentencepiece}
REAL = ["tokenizers/smollm2"]
EVERYTHING = {
    "return_offsets_mapping": True,
    "return_special_tokens_mask": True,
    "return_token_type_ids": True,
    "return_length": True,
}
PIECES = st.sampled_from(
    [" ", "  ", "\n", "\t", "don't", " .", "<s>", "</s>", "<unk>", "▁", "<0x0A>", "[x]", " [x]"]
    + [
        *CHATML_TOKENS,
        "<tool>",
        "<|im_",
        "é",
        "e\u0301",
        "👨‍👩‍👧",
        "\u202e",
        "\x00",
        "\ufffd",
        "ﷺ",
        "zalgo̸̢͌",
    ]
)
TEXTS = st.lists(
    st.one_of(PIECES, st.text(max_size=8), st.text(alphabet="ab .,1", max_size=6)), max_size=8
).map("".join)


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    folder = KINDS[request.param](tmp_path_factory.mktemp("tokenizer") / request.param)
    hf = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    return Tokenizer.from_folder(folder), hf


def same(ours, theirs):
    assert {k: _plain(v) for k, v in ours.items()} == {k: _plain(v) for k, v in theirs.items()}


def _plain(value):
    return value.tolist() if hasattr(value, "tolist") else value


ATTRIBUTES = (
    "special_tokens_map all_special_tokens all_special_ids extra_special_tokens vocab_size "
    "model_max_length padding_side truncation_side model_input_names chat_template bos_token "
    "bos_token_id eos_token eos_token_id pad_token pad_token_id unk_token unk_token_id "
    "added_tokens_encoder clean_up_tokenization_spaces is_fast"
).split()


def agree(ours, hf):
    for name in ATTRIBUTES:
        assert getattr(ours, name) == getattr(hf, name), name
    assert len(ours) == len(hf) and ours.get_vocab() == hf.get_vocab()
    assert str(ours.added_tokens_decoder) == str(dict(sorted(hf.added_tokens_decoder.items())))


def test_attributes_equal_transformers(pair):
    agree(*pair)


@given(texts=st.lists(TEXTS, min_size=1, max_size=3), specials=st.booleans())
def test_ids_offsets_and_masks_equal_transformers(pair, texts, specials):
    ours, hf = pair
    options = {**EVERYTHING, "add_special_tokens": specials}
    same(ours(texts, **options), hf(texts, **options))
    same(ours(texts[0], texts[-1], **options), hf(texts[0], texts[-1], **options))
    for text in texts:
        ids = hf.encode(text, add_special_tokens=specials)
        assert ours.encode(text, add_special_tokens=specials) == ids
        assert ours.tokenize(text) == hf.tokenize(text)
        assert ours.convert_ids_to_tokens(ids) == hf.convert_ids_to_tokens(ids)
        for skip in (True, False):
            expected = hf.decode(ids, skip_special_tokens=skip)
            assert ours.decode(ids, skip_special_tokens=skip) == expected
    # The library splits special tokens or not by a switch that a call must not leave behind.
    same(ours(texts, split_special_tokens=True), hf(texts, split_special_tokens=True))
    same(ours(texts), hf(texts))


@given(
    texts=st.lists(TEXTS, min_size=1, max_size=3),
    seconds=st.booleans(),
    truncation=st.sampled_from([True, False, "only_first", "longest_first", None]),
    max_length=st.sampled_from([None, 6, 12]),
    stride=st.integers(0, 1),
    side=st.sampled_from(["left", "right"]),
    overflow=st.booleans(),
)
def test_truncation_equals_transformers(
    pair, texts, seconds, truncation, max_length, stride, side, overflow
):
    ours, hf = copy.copy(pair[0]), pair[1]
    ours._lock = threading.RLock()
    ours.truncation_side = hf.truncation_side = side
    options = {
        "truncation": truncation,
        "max_length": max_length,
        "stride": stride,
        "return_overflowing_tokens": overflow,
        **EVERYTHING,
    }
    more = [[text + " more" for text in texts]] if seconds else []
    try:
        expected = hf(texts, *more, **options)
    except Exception as problem:
        # "only_first" cannot reach the length where the second text alone is longer.
        with pytest.raises(InputError, match=re.escape(str(problem))):
            ours(texts, *more, **options)
    else:
        same(ours(texts, *more, **options), expected)
    finally:
        hf.truncation_side = "right"


@given(
    texts=st.lists(TEXTS, min_size=1, max_size=4),
    padding=st.sampled_from([True, "longest", "max_length", False]),
    multiple=st.sampled_from([None, 8]),
    side=st.sampled_from(["left", "right", None]),
)
def test_padding_equals_transformers(pair, texts, padding, multiple, side):
    ours, hf = pair
    if hf.pad_token is None:
        with pytest.raises(ArgumentError, match="pad token"):
            ours(texts, padding=True)
        hf = copy.deepcopy(hf)
        hf.pad_token = "<unk>"
        ours = copy.deepcopy(ours)
        ours.pad_token = "<unk>"
    options = {"padding": padding, "pad_to_multiple_of": multiple, "padding_side": side}
    options |= {"max_length": 16, "truncation": True}
    same(ours(texts, **EVERYTHING, **options), hf(texts, **EVERYTHING, **options))
    options.pop("truncation")
    options["verbose"] = False
    rows = [dict(hf(text + "a", max_length=9, truncation=True)) for text in texts]
    before = copy.deepcopy(rows)
    same(ours.pad(rows, **options), hf.pad(copy.deepcopy(rows), **options))
    assert rows == before
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    same(ours.pad(columns, **options), hf.pad(copy.deepcopy(columns), **options))
    same(ours.pad(rows[0], **options), hf.pad(copy.deepcopy(rows[0]), **options))


def test_words_pairs_and_tensors(pair):
    ours, hf = pair
    words = [["hello", "wörld", "<s>"], ["a"]]
    options = {"is_split_into_words": True, **EVERYTHING}
    same(ours(words, **options), hf(words, **options))
    same(ours(words[0], words[1], **options), hf(words[0], words[1], **options))
    texts = ["hello world", "hello there"]
    for kind in ("pt", "np"):
        a = ours(texts, max_length=4, truncation=True, return_tensors=kind)
        b = hf(texts, max_length=4, truncation=True, return_tensors=kind)
        assert type(a["input_ids"]) is type(b["input_ids"])
        assert a["input_ids"].dtype == b["input_ids"].dtype
        same(a, b)
    with pytest.raises(InputError, match="padding"):
        ours(["a", "b much longer text"], return_tensors="pt")


def test_batch_encoding_knows_its_text(pair):
    ours, hf = pair
    a, b = ours("hello wörld  again"), hf("hello wörld  again")
    for char in range(18):
        assert a.char_to_token(char) == b.char_to_token(char)
    for token in range(len(a.input_ids)):
        chars = b.token_to_chars(token)
        assert a.token_to_chars(token) == (None if chars is None else tuple(chars))
        assert a.token_to_word(token) == b.token_to_word(token)
        assert a.token_to_sequence(token) == b.token_to_sequence(token)
    assert a.tokens() == b.tokens() and a.word_ids() == b.word_ids()
    assert a.sequence_ids() == b.sequence_ids() and a.n_sequences == b.n_sequences
    assert a[0].ids == a["input_ids"] and isinstance(a, dict)
    assert a.to("cpu") is a
    with pytest.raises(AttributeError, match="labels"):
        _ = a.labels
    with pytest.raises(ArgumentError, match="does not know"):
        ours.pad(dict(a), padding=False).tokens()


def test_decode_shapes_and_ids_nobody_has(pair):
    ours, hf = pair
    rows = [hf.encode("hello"), hf.encode("wide world")]
    assert ours.batch_decode(rows) == hf.batch_decode(rows) == ours.decode(rows)
    tensor = torch.tensor(rows[0])
    assert ours.decode(tensor) == hf.decode(tensor) == ours.batch_decode([tensor])[0]
    assert ours.decode(rows[0][0]) == hf.decode(rows[0][0])
    assert ours.decode([*rows[0], 10**6]) == hf.decode([*rows[0], 10**6])
    assert ours.decode([]) == ""
    for bad in (-1, 1 << 40):
        with pytest.raises(ArgumentError, match="token's id"):
            ours.decode([bad])


@pytest.mark.parametrize("kind", KINDS)
def test_save_round_trip(kind, tmp_path):
    ours = Tokenizer.from_folder(KINDS[kind](tmp_path / "a"))
    ours.add_tokens(["<new>"])
    ours.add_special_tokens({"pad_token": "<mypad>", "extra_special_tokens": ["<one>", "<two>"]})
    ours.padding_side, ours.model_max_length = "left", 77
    paths = ours.save_pretrained(tmp_path / "b" / "c")
    assert sorted(paths) == sorted(str(path) for path in (tmp_path / "b" / "c").iterdir())
    again = Tokenizer.from_folder(tmp_path / "b" / "c")
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "b" / "c")
    agree(again, auto)
    text = "<new><mypad> hello <one>wörld 你<two>"
    assert ours(text) == again(text)
    same(again(text, **EVERYTHING), auto(text, **EVERYTHING))
    assert again.init_kwargs.get("of_somebody") == ours.init_kwargs.get("of_somebody")
    assert again.model_max_length == 77 and again.padding_side == "left"
    assert again.special_tokens_map == ours.special_tokens_map
    once, twice = ours.to_json(), again.to_json()
    assert json.loads(once) == json.loads(twice)


def test_saving_over_an_older_tokenizer_leaves_nothing_of_it(tmp_path):
    folder = byte_level(tmp_path / "a")
    (folder / "special_tokens_map.json").write_text('{"eos_token": "<|endoftext|>"}')
    (folder / "added_tokens.json").write_text('{"<ghost>": 9}')
    (folder / "README.md").write_text("mine")
    other = Tokenizer.from_folder(sentencepiece(tmp_path / "b"))
    other.save_pretrained(folder)
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert transformers.AutoTokenizer.from_pretrained(folder).eos_token == "</s>"
    with pytest.raises(SaveError):
        other.save_pretrained(folder / "README.md")


def test_padding_and_truncation_of_the_file_are_kept(tmp_path):
    folder = byte_level(tmp_path / "a")
    data = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    data["truncation"] = {
        "max_length": 5,
        "stride": 0,
        "strategy": "LongestFirst",
        "direction": "Left",
    }
    (folder / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    ours = Tokenizer.from_folder(folder)
    hf = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    text = "one two three four five six seven"
    assert ours(text).input_ids == hf(text).input_ids and len(ours(text).input_ids) > 5
    assert ours.truncation_side == hf.truncation_side == "left"
    assert json.loads(ours.to_json())["truncation"] == data["truncation"]
    assert ours(text).input_ids == hf(text).input_ids


def test_to_and_from_transformers(pair):
    ours, hf = pair
    there = ours.to_transformers()
    assert isinstance(there, transformers.PreTrainedTokenizerFast)
    agree(ours, there)
    agree(Tokenizer.from_transformers(hf), hf)
    agree(Tokenizer.from_transformers(there), hf)
    text = "hello <|im_end|></s> wörld"
    same(ours(text, **EVERYTHING), there(text, **EVERYTHING))
    with pytest.raises(ArgumentError, match="fast tokenizer"):
        Tokenizer.from_transformers("no")


def test_adding_tokens_equals_transformers(pair):
    ours, hf = copy.deepcopy(pair[0]), copy.deepcopy(pair[1])
    for tokenizer in (ours, hf):
        assert tokenizer.add_tokens(["<new>", "hello", "<new>"]) >= 1
        assert (
            tokenizer.add_special_tokens({"extra_special_tokens": ["<q>"], "cls_token": "<c>"}) == 2
        )
        tokenizer.pad_token_id = tokenizer.convert_tokens_to_ids("<q>")
        tokenizer.sep_token = "<c>"
    agree(ours, hf)
    assert ours.encode("<new> hello <q><c>") == hf.encode("<new> hello <q><c>")
    ours.pad_token = None
    assert ours.pad_token_id is None
    with pytest.raises(ArgumentError, match="add_special_tokens"):
        ours.pad_token = "<absent>"
    with pytest.raises(ArgumentError, match="no token has the id"):
        ours.pad_token_id = 10**6
    with pytest.raises(ArgumentError, match="no special token"):
        ours.add_special_tokens({"end_token": "x"})
    with pytest.raises(ArgumentError):
        ours.add_tokens([""])


def test_model_specific_tokens_are_attributes(tmp_path):
    ours = Tokenizer.from_folder(byte_level(tmp_path / "a"))
    assert ours.image_token == "<|fim_pad|>"
    assert ours.image_token_id == ours.convert_tokens_to_ids("<|fim_pad|>")
    assert ours.convert_tokens_to_ids(["<|im_end|>", "nothing"]) == [ours.eos_token_id, None]
    assert ours.additional_special_tokens == ours.extra_special_tokens
    with pytest.raises(AttributeError, match="audio_token"):
        _ = ours.audio_token


def test_one_call_leaves_nothing_for_the_next(pair):
    ours = pair[0]
    expected = ours("hello world again and again").input_ids
    done = []

    def work(length):
        for _ in range(50):
            assert (
                len(ours("hello world again", max_length=length, truncation=True)["input_ids"])
                <= length
            )
        done.append(length)

    threads = [threading.Thread(target=work, args=(n,)) for n in (2, 3, 4)]
    for thread in threads:
        thread.start()
    for _ in range(50):
        assert ours("hello world again and again").input_ids == expected
    for thread in threads:
        thread.join()
    assert sorted(done) == [2, 3, 4]
    again = pickle.loads(pickle.dumps(ours))
    assert again("hello").input_ids == ours("hello").input_ids


# -- chat


CHAT = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": " wörld\n"},
    {"role": "user", "content": "again"},
]


def test_apply_chat_template_equals_transformers(tmp_path):
    folder = byte_level(tmp_path / "a")
    ours = Tokenizer.from_folder(folder)
    hf = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    for options in (
        {},
        {"add_generation_prompt": True},
        {"tokenize": False},
        {"return_dict": False},
        {"return_tensors": "pt", "add_generation_prompt": True},
        {"continue_final_message": True},
        {"max_length": 5, "truncation": True},
        {"padding": "max_length", "max_length": 60, "truncation": True},
    ):
        for chat in (CHAT, [CHAT[:1], CHAT]):
            if chat is not CHAT and "return_tensors" in options:
                options = options | {"padding": True}
            a, b = (
                ours.apply_chat_template(chat, **options),
                hf.apply_chat_template(chat, **options),
            )
            if isinstance(a, dict):
                same(a, b)
            else:
                assert a == b
    with pytest.raises(TemplateError, match="empty|found"):
        ours.apply_chat_template([])
    with pytest.raises(TemplateError, match="generation"):
        ours.apply_chat_template(CHAT, return_assistant_tokens_mask=True)


@given(contents=st.lists(TEXTS.filter(lambda t: t.strip()), min_size=1, max_size=3))
def test_assistant_masks_equal_transformers(pair, contents):
    ours, hf = pair
    chat = []
    for content in contents:
        chat += [{"role": "user", "content": "q"}, {"role": "assistant", "content": content}]
    options = {"chat_template": MARKED, "return_assistant_tokens_mask": True}
    a = ours.apply_chat_template(chat, **options)
    b = hf.apply_chat_template(chat, **options)
    assert a["input_ids"] == b["input_ids"]
    assert a["assistant_masks"] == b["assistant_masks"]


def test_named_templates(tmp_path):
    named = [
        {"name": "default", "template": CHATML},
        {"name": "tool_use", "template": "T{{ tools|length }}"},
    ]
    ours = Tokenizer.from_folder(byte_level(tmp_path / "a", chat_template=named))
    assert ours.get_chat_template() == CHATML
    assert ours.apply_chat_template(CHAT, tools=[{}], tokenize=False) == "T1"
    assert (
        ours.apply_chat_template(CHAT, chat_template="tool_use", tools=[], tokenize=False) == "T0"
    )
    ours.save_pretrained(tmp_path / "b")
    assert (tmp_path / "b" / "additional_chat_templates" / "tool_use.jinja").exists()
    assert Tokenizer.from_folder(tmp_path / "b").chat_template == ours.chat_template
    assert (
        transformers.AutoTokenizer.from_pretrained(tmp_path / "b").chat_template
        == ours.chat_template
    )
    ours.chat_template = {"../../evil": "x"}
    with pytest.raises(SaveError, match="evil"):
        ours.save_pretrained(tmp_path / "c")
    assert not (tmp_path / "c").exists()
    with pytest.raises(TemplateError, match="evil"):
        ours.apply_chat_template(CHAT)


# -- bad input


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (3, "int"),
        (None, "NoneType"),
        (["a", 3], "text 1 has a int"),
        ([], "empty"),
        (["a\ud800"], "surrogate"),
        ("\udfff", "surrogate"),
    ],
)
def test_what_is_no_text(pair, bad, said):
    with pytest.raises(InputError, match=said):
        pair[0](bad)
    assert pair[0]("a").input_ids == pair[1]("a").input_ids


@pytest.mark.parametrize(
    "options",
    [
        {"padding": "longst"},
        {"truncation": "first"},
        {"truncation": True, "max_length": -1},
        {"truncation": True, "max_length": 3, "padding": "longest", "pad_to_multiple_of": 2},
        {"padding_side": "up", "padding": True},
        {"return_tensors": "tf"},
    ],
)
def test_options_that_cannot_be_used(tmp_path_factory, options):
    ours = Tokenizer.from_folder(byte_level(tmp_path_factory.mktemp("t") / "a"))
    with pytest.raises(ArgumentError):
        ours("hello", **options)
    with pytest.raises(TypeError, match="max_lenght"):
        ours("hello", max_lenght=3)


def test_a_stride_that_the_library_panics_on(tmp_path):
    ours = Tokenizer.from_folder(sentencepiece(tmp_path / "a"))
    with pytest.raises(InputError, match="stride"):
        ours("a b c d e f g", max_length=3, truncation=True, stride=2)


def _edit(name, change):
    def spoil(folder):
        path = folder / name
        data = json.loads(path.read_text(encoding="utf-8"))
        change(data)
        path.write_text(json.dumps(data), encoding="utf-8")

    return spoil


def _config(**fields):
    return _edit("tokenizer_config.json", lambda data: data.update(fields))


SPOILERS = {
    "absent": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json"),
    "empty": (lambda f: (f / "tokenizer.json").write_text(""), "tokenizer.json"),
    "garbage": (lambda f: (f / "tokenizer.json").write_bytes(b"\xff\xfe\x00"), "tokenizer.json"),
    "cut": (
        lambda f: (f / "tokenizer.json").write_bytes((f / "tokenizer.json").read_bytes()[:900]),
        "tokenizer.json",
    ),
    "no model": (_edit("tokenizer.json", lambda d: d.pop("model")), "tokenizer.json"),
    "bad merge": (
        _edit("tokenizer.json", lambda d: d["model"]["merges"].append(["zzz", "yyy"])),
        "tokenizer.json",
    ),
    "config garbage": (lambda f: (f / "tokenizer_config.json").write_text("{"), "tokenizer_config"),
    "config list": (lambda f: (f / "tokenizer_config.json").write_text("[]"), "tokenizer_config"),
    "eos number": (_config(eos_token=3), "eos_token"),
    "eos list": (_config(eos_token=["a"]), "eos_token"),
    "eos without content": (_config(eos_token={"__type": "AddedToken"}), "eos_token"),
    "flag": (_config(eos_token={"content": "a", "lstrip": "no"}), "lstrip"),
    "decoder ids": (_config(added_tokens_decoder={"-1": {"content": "a"}}), "added_tokens_decoder"),
    "decoder list": (_config(added_tokens_decoder=[1]), "added_tokens_decoder"),
    "extra": (_config(additional_special_tokens="abc"), "additional_special_tokens"),
    "extra item": (_config(additional_special_tokens=[None]), "additional_special_tokens"),
    "side": (_config(padding_side="middle"), "padding_side"),
    "length": (_config(model_max_length="long"), "model_max_length"),
    "template number": (_config(chat_template=3), "chat_template"),
    "template item": (_config(chat_template=[{"name": "a"}]), "chat_template"),
    "template bytes": (lambda f: (f / "chat_template.jinja").write_bytes(b"\xff"), "chat_template"),
    "link out": (
        lambda f: (f / "chat_template.jinja").symlink_to("/etc/hostname"),
        "chat_template.jinja",
    ),
    "sentencepiece": (
        lambda f: (f / "tokenizer.json").rename(f / "tokenizer.model"),
        "not a SentencePiece model",
    ),
}


@pytest.mark.parametrize("name", SPOILERS)
def test_bad_folders(name, tmp_path):
    spoil, said = SPOILERS[name]
    folder = byte_level(tmp_path / "a")
    spoil(folder)
    with pytest.raises(TokenizerError, match=said) as caught:
        Tokenizer.from_folder(folder)
    assert str(folder) in str(caught.value)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return byte_level(tmp_path_factory.mktemp("sound") / "a")


@given(data=st.data(), name=st.sampled_from(["tokenizer.json", "tokenizer_config.json"]))
def test_damaged_files_load_or_raise(sound, data, name):
    path = sound / name
    original = path.read_bytes()
    content = bytearray(original)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(content) - 1))
        how = data.draw(st.sampled_from(["flip", "cut", "copy", "digit"]))
        if how == "flip":
            content[place] ^= 1 << data.draw(st.integers(0, 7))
        elif how == "cut":
            del content[place : place + data.draw(st.integers(1, 40))]
        elif how == "copy":
            content[place:place] = content[place : place + 20]
        else:
            content[place] = ord(data.draw(st.sampled_from('0919-[]{},:"nt')))
        if not content:
            break
    path.write_bytes(bytes(content))
    try:
        tokenizer = Tokenizer.from_folder(sound)
        tokenizer.decode(tokenizer("hello <|im_end|> wörld").input_ids)
    except (TokenizerError, InputError):
        pass
    finally:
        path.write_bytes(original)


def test_no_folder(tmp_path):
    with pytest.raises(TokenizerError, match="does not exist"):
        Tokenizer.from_folder(tmp_path / "nothing")


# -- real tokenizers


@pytest.mark.parametrize("name", REAL)
def test_real_tokenizers(name):
    folder = shared(f"assets/{name}")
    ours = Tokenizer.from_folder(folder)
    hf = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    agree(ours, hf)
    text = " Hello  wörld 你好 👩‍👧\n\n\tdon't <|im_end|></s> ▁x" * 3
    same(ours(text, text, **EVERYTHING), hf(text, text, **EVERYTHING))
    ids = hf.encode(text)
    assert ours.decode(ids) == hf.decode(ids)
    if ours.chat_template:
        for prompt in (True, False):
            options = {"add_generation_prompt": prompt}
            same(ours.apply_chat_template(CHAT, **options), hf.apply_chat_template(CHAT, **options))


def test_what_tokenizing_adds(tmp_path):
    assert not Tokenizer.from_folder(byte_level(tmp_path / "a")).add_bos_token
    ours = Tokenizer.from_folder(sentencepiece(tmp_path / "b"))
    assert ours.add_bos_token and not ours.add_eos_token


def test_long_texts_take_linear_time(pair):
    ours = pair[0]
    began = time.thread_time()
    for text in ("a" * 100_000, "hello wörld\n" * 20_000, "\U0001f600" * 50_000, " " * 100_000):
        assert ours.decode(ours.encode(text, add_special_tokens=False)).strip() == text.strip()
    assert time.thread_time() - began < 10
