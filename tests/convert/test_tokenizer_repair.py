"""What diagnose finds in tokenizers with one fault each, and the pad token that repair picks."""

import json

import pytest
from assets import shared
from tiny_tokenizers import CHATML, byte_level, sentencepiece

from purelm.convert.tokenizer import Tokenizer
from purelm.convert.tokenizer_repair import NEW_PAD, PAD_NAMES, diagnose, repair


@pytest.fixture
def sound(tmp_path):
    return Tokenizer.from_folder(byte_level(tmp_path / "a"))


def kinds(tokenizer, **given):
    return [finding.kind for finding in diagnose(tokenizer, **given)]


def test_a_sound_tokenizer_is_left_alone(sound):
    before = sound.to_json(), sound.special_tokens_map
    assert diagnose(sound, vocab_rows=len(sound)) == []
    assert repair(sound, vocab_rows=len(sound)) == []
    assert (sound.to_json(), sound.special_tokens_map) == before


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (lambda t: setattr(t, "pad_token", None), "pad-missing"),
        (lambda t: setattr(t, "pad_token", t.eos_token), "pad-is-eos"),
        (lambda t: setattr(t, "pad_token_id", 399), "pad-out-of-range"),
        (lambda t: setattr(t, "eos_token", None), "eos-missing"),
        (lambda t: setattr(t, "chat_template", "{{ nothing.at.all }}"), "template-fails"),
        (lambda t: setattr(t, "eos_token", "<|im_start|>"), "end-of-turn-not-eos"),
        (
            lambda t: setattr(t, "chat_template", CHATML.partition("{% if")[0]),
            "template-ignores-generation-prompt",
        ),
    ],
)
def test_each_fault_is_found(sound, spoil, found):
    assert found not in kinds(sound, vocab_rows=380)
    spoil(sound)
    before = sound.to_json(), sound.special_tokens_map
    assert found in kinds(sound, vocab_rows=380)
    assert (sound.to_json(), sound.special_tokens_map) == before


def test_an_eos_of_the_configuration_counts(sound):
    assert kinds(sound, eos_ids=[sound.pad_token_id]) == ["pad-is-eos"]
    sound.eos_token = "<|im_start|>"
    assert kinds(sound, eos_ids=[sound.convert_tokens_to_ids("<|im_end|>")]) == []


def test_ids_beyond_the_embedding(sound):
    (finding,) = diagnose(sound, vocab_rows=len(sound) - 1)
    assert finding.kind == "ids-out-of-range" and "'[x]' (401)" in finding.message


def test_double_bos(tmp_path):
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    tokenizer = Tokenizer.from_folder(sentencepiece(tmp_path / "a", chat_template=template))
    assert "double-bos" in kinds(tokenizer)
    tokenizer.chat_template = template.replace("{{ bos_token }}", "")
    assert "double-bos" not in kinds(tokenizer)


@pytest.mark.parametrize("pad", [None, "<|im_end|>"])
def test_a_reserved_token_becomes_the_pad_token(sound, pad):
    sound.pad_token = pad
    size = len(sound)
    (change,) = repair(sound, vocab_rows=size)
    assert (change.field, change.before, change.after) == ("pad_token", pad, "<|endoftext|>")
    assert sound.pad_token == "<|endoftext|>" != sound.eos_token and len(sound) == size
    assert repair(sound, vocab_rows=size) == []
    assert sound(["a", "b c d"], padding=True)["input_ids"][0][-1] == sound.pad_token_id


def test_the_order_of_choice(sound):
    """Names in their order, prefixes by id, brackets, unk; never eos, bos, or beyond the rows."""
    sound.unk_token = "a"
    sound.eos_token = "<|endoftext|>"
    extra = ["<|vision_pad|>", "<|reserved_7|>", "<|reserved_2|>", "[control_1]", "[MASK]", "<pad>"]
    sound.add_tokens(extra, special_tokens=True)
    rows = len(sound)
    chosen = []
    taken = []
    while True:
        sound.pad_token = None
        repair(sound, vocab_rows=rows, eos_ids=taken)
        if sound.pad_token in (None, "a"):
            break
        chosen.append(sound.pad_token)
        taken.append(sound.pad_token_id)
    reserved = ["<|reserved_7|>", "<|reserved_2|>", "[control_1]", "<|vision_pad|>"]
    assert chosen == ["<pad>", "<|fim_pad|>", "[MASK]", *reserved]
    assert sound.pad_token == "a"
    sound.pad_token = None
    sound.bos_token = "<pad>"
    assert repair(sound, vocab_rows=rows)[0].after == "<|fim_pad|>"
    sound.pad_token = sound.bos_token = None
    assert repair(sound, vocab_rows=sound.convert_tokens_to_ids("<pad>"))[0].after == "<|fim_pad|>"
    assert len(set(PAD_NAMES)) == len(PAD_NAMES)


def test_a_spare_row_or_the_rows_that_are_needed(tmp_path):
    def bare():
        folder = sentencepiece(tmp_path / "a", unk_token=None)
        data = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        data["added_tokens"] = data["added_tokens"][1:]
        (folder / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
        return Tokenizer.from_folder(folder)

    tokenizer = bare()
    size = len(tokenizer)
    (change,) = repair(tokenizer, vocab_rows=size + 8)
    assert change.after == tokenizer.pad_token == NEW_PAD and change.rows == 0
    assert tokenizer.pad_token_id == size and len(tokenizer) == size + 1
    for rows, missing in ((size, 1), (size - 2, 3), (None, 1)):
        tokenizer = bare()
        tokenizer.pad_token = "</s>"
        (change,) = repair(tokenizer, vocab_rows=rows)
        assert change.after is None and change.rows == missing and "resize" in change.why
        assert tokenizer.pad_token is None and len(tokenizer) == size


def test_real_tokenizers():
    smollm = Tokenizer.from_folder(shared("assets/tokenizers/smollm2"))
    assert kinds(smollm, vocab_rows=49_152) == ["pad-is-eos"]
    assert repair(smollm, vocab_rows=49_152)[0].after == "<|endoftext|>"
    assert kinds(smollm, vocab_rows=49_152) == []
    assert kinds(Tokenizer.from_folder(shared("assets/tokenizers/minimind"))) == []
    stories = Tokenizer.from_folder(shared("assets/stories260K"))
    assert kinds(stories, vocab_rows=512) == ["pad-missing"]
    assert repair(stories, vocab_rows=512)[0].after == "<unk>"


TEXTS = [
    "Hello world",
    "  two  spaces\n\n\ttab",
    "\u65e5\u672c e\u0301 \U0001f642 123",
    "<|im_end|></s>",
    "",
]


def test_a_repair_changes_no_ids():
    """Of every published tokenizer that is there, known ones or not."""
    folders = [f for f in shared("assets/tokenizers").iterdir() if (f / "tokenizer.json").is_file()]
    assert folders
    for folder in [*folders, shared("assets/stories260K")]:
        tokenizer = Tokenizer.from_folder(folder)
        rows = max(tokenizer.get_vocab().values()) + 1
        before = [tokenizer(text)["input_ids"] for text in TEXTS]
        settled = {k: v for k, v in tokenizer.special_tokens_map.items() if k != "pad_token"}
        others = [f for f in diagnose(tokenizer, vocab_rows=rows) if not f.kind.startswith("pad")]
        changes = repair(tokenizer, vocab_rows=rows)
        assert [change.field for change in changes] in ([], ["pad_token"]), folder.name
        assert [tokenizer(text)["input_ids"] for text in TEXTS] == before, folder.name
        now = {k: v for k, v in tokenizer.special_tokens_map.items() if k != "pad_token"}
        assert now == settled
        # Nothing else is found than before, and a second repair has nothing to do.
        assert diagnose(tokenizer, vocab_rows=rows) == others, folder.name
        assert repair(tokenizer, vocab_rows=rows) == []
        assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
        assert tokenizer.pad_token_id < rows
