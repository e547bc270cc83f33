"""Rows from files to ids: what is learned, what is refused, with which words."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from purelm import Tokenizer
from purelm.errors import DataError
from purelm.row_files import read_rows
from purelm.rows import Row, collate, digest, encode, pack, split


def jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def chat(*turns: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": t} for i, t in enumerate(turns)]}


def learned(tokenizer: Tokenizer, row: Row) -> str:
    return str(tokenizer.decode([i for i in row.labels if i != -100]))


def encoded(tmp_path: Path, tokenizer: Tokenizer, *rows: Any, **options: Any) -> tuple[Row, ...]:
    raw = read_rows(jsonl(tmp_path / "rows.jsonl", *rows))
    return encode(raw, tokenizer, **{"max_length": 100, **options}).rows


def test_a_conversation_learns_the_assistants_words(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (row,) = encoded(tmp_path, tokenizer, chat("Who?", "Me.", "Why?", "Because."))
    whole = tokenizer.decode(list(row.ids))
    assert whole.count("<|im_start|>") == 4 and whole.startswith("<|im_start|>user\nWho?<|im_end|>")
    assert learned(tokenizer, row) == "Me.<|im_end|>Because.<|im_end|>"
    assert all(label in (-100, i) for i, label in zip(row.ids, row.labels, strict=True))


def test_a_template_without_marks_gives_the_same_spans(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    rows = (chat("Who?", "Me.", "Why?", "Because."), chat("And?", "So."))
    marked = encoded(tmp_path, tokenizer, *rows)
    template = str(tokenizer.chat_template)
    for mark in ("{% generation %}", "{% endgeneration %}"):
        assert mark in template
        template = template.replace(mark, "")
    plain = Tokenizer.from_folder(tokenizer_folder(tmp_path, tokenizer))
    plain.chat_template = template
    assert encoded(tmp_path, plain, *rows) == marked


def tokenizer_folder(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def test_a_completion_is_learned_and_its_prompt_is_not(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    (row,) = encoded(tmp_path, tokenizer, {"prompt": "One, two,", "completion": " three."})
    assert learned(tokenizer, row) == " three.<|im_end|>"
    assert tokenizer.decode(list(row.ids)) == "One, two, three.<|im_end|>"
    # A token on both sides of the border is learned: the answer begins in it.
    (row,) = encoded(tmp_path, tokenizer, {"prompt": "One, two, ", "completion": "three."})
    assert learned(tokenizer, row) == " three.<|im_end|>"


def test_a_text_is_learned_whole_and_ends(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = encoded(tmp_path, tokenizer, {"text": "Hello there."}, {"text": "Bye.<|im_end|>"})
    assert [learned(tokenizer, row) for row in rows] == ["Hello there.<|im_end|>", "Bye.<|im_end|>"]
    assert rows[0].labels == rows[0].ids
    # Nothing predicts the first token.
    assert rows[0].learned == len(rows[0].ids) - 1


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"text": "a"}, {"texts": "b"}], ["line 2", "texts", '{"texts": "b"}']),
        ([{}], ["line 1", "no keys"]),
        ([{"text": "a", "prompt": "b"}], ["prompt, text", "only one"]),
        ([{"prompt": "a"}], ["no completion"]),
        (
            [{"text": "a"}, chat("b", "c")],
            ["line 2", "the rows before have text, this one messages"],
        ),
        ([{"text": 3}], ["text is a int"]),
        ([{"prompt": "a", "completion": ["b"]}], ["completion is a list"]),
        ([{"messages": []}], ["at least one message"]),
        ([{"messages": "hi"}], ["not a list"]),
        ([{"messages": [{"content": "a"}]}], ["message 1", "role"]),
        ([{"messages": [{"role": "user", "content": 1}]}], ["content of message 1 is a int"]),
        ([chat("only a question")], ["nothing is left to learn", "only a question"]),
        ([{"prompt": "abc", "completion": "d" * 200}], ["max_seq_length 100", "--truncate"]),
    ],
)
def test_a_bad_row_is_shown_with_its_place(
    tmp_path: Path, tokenizer: Tokenizer, rows: list[Any], words: list[str]
) -> None:
    with pytest.raises(DataError) as caught:
        encoded(tmp_path, tokenizer, *rows)
    for word in [*words, "rows.jsonl"]:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["no rows"]),
        (b"\n  \n", ["no rows"]),
        (b'{"text": "a"}\n{"text": \n', ["line 2", "not valid JSON"]),
        (b'{"text": "a"}\n[1]\n', ["line 2", "found list"]),
        (b'{"text": "\xff"}\n', ["line 1", "not valid JSON"]),
        (b'{"text": NaN}\n', ["line 1", "NaN"]),
        (b'{"text": "a", "text": "b"}\n', ["line 1", "twice"]),
    ],
)
def test_a_bad_file_is_named_with_the_line(
    tmp_path: Path, content: bytes, words: list[str]
) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_rows(path)
    for word in [*words, "broken.jsonl"]:
        assert word in str(caught.value)


def test_what_is_no_data_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text\na\n")
    for path in (tmp_path / "absent.jsonl", tmp_path / "rows.csv", tmp_path):
        with pytest.raises(DataError, match=path.name):
            read_rows(path)


def test_long_rows_are_cut_or_left_out_only_when_asked(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    raw = read_rows(jsonl(tmp_path / "rows.jsonl", {"text": "a" * 200}, {"text": "b"}))
    with pytest.raises(DataError, match="201 tokens"):
        encode(raw, tokenizer, max_length=50)
    cut = encode(raw, tokenizer, max_length=50, too_long="truncate")
    assert [len(row.ids) for row in cut.rows] == [50, 2] and cut.truncated == 1
    kept = encode(raw, tokenizer, max_length=50, too_long="skip")
    assert [len(row.ids) for row in kept.rows] == [2] and kept.skipped == 1
    with pytest.raises(DataError, match="all 1 rows"):
        encode(raw[:1], tokenizer, max_length=50, too_long="skip")


def test_a_row_cut_before_its_answer_has_nothing_left(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="nothing is left to learn"):
        encoded(tmp_path, tokenizer, chat("q" * 90, "yes"), max_length=20, too_long="truncate")


def test_datasets_folders_and_parquet_read_like_json_lines(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [chat("Who?", "Me."), chat("Why?", "Because.", "So?", "Yes.")]
    made = datasets.Dataset.from_list(rows)
    made.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": made, "test": made}).save_to_disk(tmp_path / "splits")
    made.to_parquet(tmp_path / "rows.parquet")
    expected = encoded(tmp_path, tokenizer, *rows)
    for name in ("saved", "splits", "rows.parquet", "splits/test"):
        found = encode(read_rows(tmp_path / name), tokenizer, max_length=100)
        assert found.rows == expected, name
    datasets.DatasetDict({"test": made}).save_to_disk(tmp_path / "other")
    with pytest.raises(DataError, match="'train'"):
        read_rows(tmp_path / "other")


def test_a_datasets_folder_cannot_name_a_file_outside(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "saved").mkdir()
    (tmp_path / "secret.arrow").write_bytes(b"")
    for name in ("../secret.arrow", str(tmp_path / "secret.arrow"), "absent.arrow", None):
        state = {"_data_files": [{"filename": name}]}
        (tmp_path / "saved" / "state.json").write_text(json.dumps(state))
        with pytest.raises(DataError, match="state.json"):
            read_rows(tmp_path / "saved")
    (tmp_path / "saved" / "cut.arrow").write_bytes(b"\xff\xff\xff\xff")
    (tmp_path / "saved" / "state.json").write_text('{"_data_files": [{"filename": "cut.arrow"}]}')
    with pytest.raises(DataError, match="cut.arrow"):
        read_rows(tmp_path / "saved")


def test_without_pyarrow_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match="pip install datasets"):
        read_rows(tmp_path / "rows.parquet")


_ROW = st.lists(st.tuples(st.integers(4, 99), st.booleans()), min_size=1, max_size=9).map(
    lambda pairs: Row(tuple(i for i, _ in pairs), tuple(i if on else -100 for i, on in pairs))
)


@given(st.lists(_ROW, min_size=1, max_size=5))
def test_a_batch_holds_its_rows_and_padding(rows: list[Row]) -> None:
    batch = collate(rows, pad_id=3)
    for i, row in enumerate(rows):
        length = len(row.ids)
        assert batch["attention_mask"][i].tolist() == [1] * length + [0] * (
            batch["input_ids"].shape[1] - length
        )
        assert tuple(batch["input_ids"][i, :length].tolist()) == row.ids
        assert tuple(batch["labels"][i, :length].tolist()) == row.labels
        assert set(batch["input_ids"][i, length:].tolist()) <= {3}
        assert set(batch["labels"][i, length:].tolist()) <= {-100}
    # What the loss counts: labels after the first place.
    assert int((batch["labels"][:, 1:] != -100).sum()) == sum(row.learned for row in rows)


@given(st.lists(_ROW, min_size=1, max_size=5))
def test_packed_rows_lie_behind_one_another(rows: list[Row]) -> None:
    packed = pack(rows)
    ends = packed["cu_seqlens"].tolist()
    assert packed["input_ids"].shape == packed["labels"].shape == (1, ends[-1])
    for row, start, end in zip(rows, ends, ends[1:], strict=False):
        assert tuple(packed["input_ids"][0, start:end].tolist()) == row.ids
        assert tuple(packed["labels"][0, start:end].tolist()) == row.labels
    assert len(ends) == len(rows) + 1 and ends[0] == 0


@given(st.lists(_ROW, min_size=2, max_size=6), st.data())
def test_the_digest_sees_every_change(rows: list[Row], draw: st.DataObject) -> None:
    place = draw.draw(st.integers(0, len(rows) - 1))
    changed = list(rows)
    ids = rows[place].ids
    changed[place] = Row((ids[0] + 1, *ids[1:]), rows[place].labels)
    assert digest(rows) == digest(list(rows)) != digest(changed)
    assert digest(rows[:-1]) != digest(rows)


@given(st.integers(2, 60), st.floats(0.01, 0.49), st.integers(0, 2**31))
def test_a_split_loses_and_repeats_nothing(count: int, fraction: float, seed: int) -> None:
    train, held_out = split(range(count), fraction, seed)
    assert sorted([*train, *held_out]) == list(range(count)) and held_out
    assert (train, held_out) == split(range(count), fraction, seed)
