"""Tokens that the engine guesses ahead: the same answers in fewer steps."""

from typing import Any

import pytest
import torch
from engines import WARM, alone, recorded, stand_in

from purelm import Engine, Request, Sampling
from purelm.convert import engine_rows
from purelm.convert.engine_guesses import REST, Guesser
from purelm.errors import ArgumentError
from purelm.nn import decode, prompt_pass
from purelm.nn.draft import NGrams

AGAIN = (5, 17, 40, 8) * 6
RULES = (
    Sampling(),
    WARM,
    Sampling(temperature=0.05),
    Sampling(repetition_penalty=1.3),
    Sampling(temperature=0.7, presence_penalty=0.4),
    Sampling(min_new_tokens=6),
    Sampling(no_repeat_ngram_size=4),
)


def steps(monkeypatch: pytest.MonkeyPatch, engine: Engine, requests: list[Request]) -> Any:
    """The answers, and how many rows each step had."""
    rows: list[int] = []
    step = decode.decode

    def noted(params: Any, spec: Any, token: torch.Tensor, *rest: Any, **how: Any) -> Any:
        rows.append(len(token))
        return step(params, spec, token, *rest, **how)

    with monkeypatch.context() as patch:
        patch.setattr(decode, "decode", noted)
        return engine.run(requests), rows


def test_every_rule_draws_what_it_draws_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside one another and alone, guesses and none, a stop in the midst of what was guessed."""
    model = stand_in()
    requests = [
        Request(AGAIN[i:], 21, sampling=rule, seed=i, eos_ids=(3 * i, 3 * i + 1))
        for i, rule in enumerate(RULES)
    ]
    want = [alone(model, r) for r in requests]
    for slots in (1, 3, 8):
        engine = Engine(model, slots=slots, lookup_tokens=4)
        assert steps(monkeypatch, engine, requests)[0] == want
        assert engine.held_blocks == 0


def test_guesses_save_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is always right takes eight tokens a step; many rows are not checked so at once."""
    model, request = stand_in(), Request(AGAIN, 42, sampling=WARM, seed=3)
    want = alone(model, request)

    def right(guesser: Guesser, ids: Any, most: int) -> list[int]:
        return want[len(ids) - len(AGAIN) :][:most]

    assert steps(monkeypatch, Engine(model), [request]) == ([want], [1] * 41)
    monkeypatch.setattr(Guesser, "guess", right)
    # The first token is the prompt's, and the last of 41 is alone.
    assert steps(monkeypatch, Engine(model, lookup_tokens=7), [request]) == ([want], [8] * 5 + [1])
    many = [request] * 16
    got, rows = steps(monkeypatch, Engine(model, slots=16, lookup_tokens=7), many)
    assert got == [want] * 16 and max(rows) <= 64


def test_prompts_that_come_back_find_what_was_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks written by steps that guessed are a beginning as good as any."""
    model = stand_in()
    engine = Engine(model, lookup_tokens=5)
    first = Request(AGAIN, 40)
    (answer,) = engine.run([first])
    again = Request((*AGAIN, *answer[:33]), 9)
    before = engine._rows.known_tokens
    assert engine.run([again]) == [alone(model, again)]
    assert engine._rows.known_tokens - before >= 48


def test_steps_that_guess_are_captured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, captures = stand_in(), []

    def capture(step: Any, device: torch.device) -> Any:
        captures.append(step)
        return step

    monkeypatch.setattr(engine_rows, "capture", capture)
    monkeypatch.setattr(prompt_pass, "capture", recorded)
    engine = Engine(model, lookup_tokens=3)
    engine._rows.graphs = True
    request = Request(AGAIN, 30)
    want = [alone(model, request)]
    for _ in range(4):
        assert engine.run([request]) == want
    # Once with guesses and once without.
    assert len(captures) == 2


def test_what_followed_is_looked_up() -> None:
    guesser = Guesser(NGrams(4, 3))
    assert guesser.guess([1, 2, 3, 9, 1, 2], 3) == [3, 9, 1]
    # The longest beginning decides, and of those the latest.
    assert guesser.guess([1, 2, 3, 9, 1, 2, 4, 1, 2], 2) == [4, 1]
    assert guesser.guess([1, 2, 3, 9, 1, 2, 4, 1, 2, 7, 9, 1, 2], 1) == [4]
    # What is guessed goes on as it began.
    assert Guesser(NGrams(9, 3)).guess([8, 5, 6, 5, 6], 7) == [5, 6, 5, 6, 5, 6, 5]
    assert Guesser(NGrams(4, 1)).guess([7, 1, 7], 2) == [1, 7]
    assert Guesser(NGrams(4, 3)).guess([7, 1, 7], 2) == []
    assert Guesser(NGrams(4, 3)).guess([7], 2) == []


def test_who_is_wrong_rests() -> None:
    guesser, text = Guesser(NGrams(2, 2)), [1, 2, 1, 2]
    waits = []
    for _ in range(6):
        guesser.learn(0)
        waits.append(0)
        while not guesser.guess(text, 2):
            waits[-1] += 1
    assert waits == [1, 3, 7, REST, REST, REST]
    guesser.learn(1)
    assert guesser.guess(text, 2) == [1, 2]


def test_who_cannot_guess() -> None:
    with pytest.raises(ArgumentError, match="recurrent layers"):
        Engine(stand_in("mamba2"), lookup_tokens=3)
    with pytest.raises(ArgumentError, match="lookup_tokens is -1"):
        Engine(stand_in(), lookup_tokens=-1)
