"""The conversation on the terminal or in a pipe, with an answerer that can be foreseen."""

import io
from pathlib import Path
from typing import Any

import pytest
from assets import shared

from purelm import chat
from purelm.errors import InputError


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Any:
    return chat.load(str(folder), device="cpu")


def talk(monkeypatch: pytest.MonkeyPatch, typed: str, **options: Any) -> tuple[str, list[Any]]:
    """What a conversation prints, and the prompts that the model was given."""
    prompts: list[Any] = []

    def answer(model: Any, tokenizer: Any, prompt: Any, *, write: Any, **keywords: Any) -> str:
        prompts.append(prompt)
        if prompt[-1]["content"] == "too long":
            raise InputError("the prompt has 999 tokens")
        write("so ")
        write("it is")
        return "so it is"

    monkeypatch.setattr(chat, "answer", answer)
    out = io.StringIO()
    chat.repl(None, None, io.StringIO(typed), out, **options)  # type: ignore[arg-type]
    return out.getvalue(), prompts


def contents(prompt: Any) -> list[str]:
    return [message["content"] for message in prompt]


def test_a_conversation_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    text, prompts = talk(monkeypatch, "one\n\ntwo\n")
    assert text == "so it is\nso it is\n"
    assert [contents(p) for p in prompts] == [["one"], ["one", "so it is", "two"]]


def test_reset_and_exit(monkeypatch: pytest.MonkeyPatch) -> None:
    _, prompts = talk(monkeypatch, "one\n/reset\ntwo\n/exit\nthree\n", system="Be brief.")
    assert [contents(p) for p in prompts] == [["Be brief.", "one"], ["Be brief.", "two"]]


def test_an_error_leaves_the_conversation_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    text, prompts = talk(monkeypatch, "one\ntoo long\nthree\n")
    assert "999 tokens" in text and "/reset" in text
    assert contents(prompts[-1]) == ["one", "so it is", "three"]


def test_an_answer_is_streamed_as_it_is_returned(loaded: Any) -> None:
    model, tokenizer = loaded
    pieces: list[str] = []
    asked = [{"role": "user", "content": "Where?"}]
    text = chat.answer(
        model, tokenizer, asked, max_new_tokens=12, write=pieces.append, do_sample=False
    )
    assert "".join(pieces) == text and len(pieces) > 1
    assert text == chat.answer(model, tokenizer, asked, max_new_tokens=12, do_sample=False)


def test_an_answer_ends_at_the_context(loaded: Any) -> None:
    model, tokenizer = loaded
    room = model.spec.max_positions
    text = "a" * (room - 2)
    ids = tokenizer(text)["input_ids"]
    assert room - 5 < len(ids) < room
    chat.answer(model, tokenizer, text, max_new_tokens=50)
    with pytest.raises(InputError, match="context"):
        chat.answer(model, tokenizer, text + "a" * 9)


def test_a_continued_text_keeps_its_first_space() -> None:
    """SentencePiece vocabularies drop the first space of whatever they decode."""
    model, tokenizer = chat.load(str(shared("assets/stories260K")), device="cpu")
    pieces: list[str] = []
    text = chat.answer(model, tokenizer, "Once upon a time", max_new_tokens=12, write=pieces.append)
    assert text.startswith(", there was a little girl named Lily.") and "".join(pieces) == text
    text = chat.answer(model, tokenizer, "Once upon a", max_new_tokens=6)
    assert text.startswith(" time, there")
