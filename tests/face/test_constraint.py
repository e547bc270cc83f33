"""Answers that keep to a constraint: a schema, an expression, a choice, a grammar."""

import json
import re
from typing import Any

import pydantic
import pytest
import torch
import xgrammar
from assets import shared
from hypothesis import given, settings
from hypothesis import strategies as st

from purelm import Constraint, Engine, Request, Sampling, Tokenizer
from purelm.convert import sampling_params
from purelm.convert.grammar import SPACES, Follower, Grammar
from purelm.errors import ArgumentError

WORD = "(The|A) (cat|dog) (sat|ran), [0-9]{1,3} times\\."
SCHEMA = {
    "type": "object",
    "properties": {"animal": {"enum": ["cat", "dog"]}, "tame": {"type": "boolean"}},
    "required": ["animal", "tame"],
    "additionalProperties": False,
}


def answers(loaded: Any, prompt: str, **keywords: Any) -> list[str]:
    model, tokenizer = loaded
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    out = model.generate(ids, **{"max_new_tokens": 60} | keywords)
    return [tokenizer.decode(row[ids.shape[1] :], skip_special_tokens=True) for row in out]


@settings(max_examples=8)
@given(seed=st.integers(0, 2**31))
def test_samples_match_the_expression(loaded: Any, seed: int) -> None:
    found = answers(
        loaded, "Once", constraint=Constraint(regex=WORD), do_sample=True, temperature=3.0,
        top_k=0, num_return_sequences=4, seed=seed,
    )  # fmt: skip
    assert all(re.fullmatch(WORD, text) for text in found), found


def test_beams_and_greedy_match_too(loaded: Any) -> None:
    for how in ({"num_beams": 1}, {"num_beams": 4, "num_return_sequences": 4}):
        found = answers(loaded, "Once", constraint=Constraint(regex=WORD), do_sample=False, **how)
        assert all(re.fullmatch(WORD, text) for text in found)


def test_each_prompt_has_its_own(loaded: Any) -> None:
    model, tokenizer = loaded
    ids = torch.tensor([tokenizer("Once upon a time")["input_ids"]] * 3)
    wanted = [Constraint(choice=("yes, (1)", "no")), None, Constraint(regex="[0-9]{4}")]
    keywords: dict[str, Any] = {"max_new_tokens": 12, "do_sample": True, "seed": 0}
    out = model.generate(ids, constraint=wanted, **keywords)
    texts = [tokenizer.decode(row[ids.shape[1] :], skip_special_tokens=True) for row in out]
    assert texts[0] in ("yes, (1)", "no") and re.fullmatch("[0-9]{4}", texts[2])
    free = model.generate(ids, **keywords)[1, ids.shape[1] :]
    mine = out[1, ids.shape[1] :]
    assert torch.equal(free, mine[: len(free)])
    with pytest.raises(ArgumentError, match="2 constraints for 3 prompts"):
        model.generate(ids, constraint=wanted[:2], max_new_tokens=2)


class Animal(pydantic.BaseModel):
    """A schema as pydantic writes it."""

    animal: str
    age: int


@pytest.mark.parametrize(
    "constraint",
    [Constraint(json=json.dumps(SCHEMA)), Constraint(json=SCHEMA)],  # type: ignore[arg-type]
)
def test_json_keeps_to_its_schema(loaded: Any, constraint: Constraint) -> None:
    for text in answers(
        loaded, "Once", constraint=constraint, do_sample=True, num_return_sequences=3, seed=1,
        max_new_tokens=300,
    ):  # fmt: skip
        value = json.loads(text)
        assert set(value) == {"animal", "tame"} and value["animal"] in ("cat", "dog")
        assert isinstance(value["tame"], bool)


def test_a_class_gives_its_schema() -> None:
    schema = json.loads(Constraint(json=Animal).json or "")  # type: ignore[arg-type]
    assert schema["required"] == ["animal", "age"]


def test_special_tokens_stay_out_of_texts(loaded: Any) -> None:
    model, tokenizer = loaded
    special = set(tokenizer.all_special_ids)
    grammar = Grammar(
        Constraint(grammar='root ::= [^"]*'), tokenizer, model.spec.vocab, [tokenizer.eos_token_id]
    )
    allowed = grammar.allowed(grammar.begin()).nonzero()[:, 0].tolist()
    assert special & set(allowed) == {tokenizer.eos_token_id} and len(allowed) > 100


def check_as_xgrammar_reads(tokenizer: Tokenizer) -> None:
    """What may follow is what xgrammar finds through transformers' own tokenizer class."""
    theirs = tokenizer.to_transformers()
    vocab, eos = len(theirs) + 8, theirs.eos_token_id
    info = xgrammar.TokenizerInfo.from_huggingface(theirs, vocab_size=vocab, stop_token_ids=[eos])
    constraint = Constraint(json=SCHEMA)  # type: ignore[arg-type]
    compiled = xgrammar.GrammarCompiler(info, max_threads=1).compile_json_schema(
        json.dumps(SCHEMA), max_whitespace_cnt=SPACES
    )
    matcher, grammar = (
        xgrammar.GrammarMatcher(compiled),
        Grammar(constraint, tokenizer, vocab, [eos]),
    )
    follower, answer = Follower(grammar), []
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        words = xgrammar.allocate_token_bitmask(1, vocab)
        matcher.fill_next_token_bitmask(words)
        bits = (words[0, :, None] >> torch.arange(32) & 1).flatten()[:vocab].bool()
        allowed = follower.allowed(answer)
        follower.turn()
        assert allowed is not None and torch.equal(allowed, bits)
        choices = bits.nonzero()[:, 0]
        token = int(choices[torch.randint(len(choices), (), generator=generator)])
        assert matcher.accept_token(token)
        answer.append(token)
        if matcher.is_terminated():
            assert follower.allowed(answer) is None
            break


def test_tokens_are_read_as_xgrammar_reads_them(loaded: Any) -> None:
    check_as_xgrammar_reads(loaded[1])


@pytest.mark.parametrize("name", ["minimind", "smollm2"])
def test_real_tokens_are_read_as_xgrammar_reads_them(name: str) -> None:
    check_as_xgrammar_reads(Tokenizer.from_folder(shared(f"assets/tokenizers/{name}")))


def test_the_engine_gives_what_generate_gives(loaded: Any) -> None:
    model, tokenizer = loaded
    prompt = tuple(tokenizer("Once upon")["input_ids"])
    engine = Engine(model, tokenizer, slots=3)
    requests = [
        Request(prompt, 40, sampling=Sampling(temperature=1.0), seed=seed, constraint=one)
        for seed, one in enumerate((Constraint(regex=WORD), None, Constraint(choice=("a", "b"))))
    ]
    engine.prepare(requests)
    for request, found in zip(requests, engine.run(requests), strict=True):
        alone = model.generate(
            torch.tensor([prompt]), max_new_tokens=40, do_sample=True, top_k=0, seed=request.seed,
            constraint=request.constraint,
        )  # fmt: skip
        assert alone[0, len(prompt) :].tolist() == found
    assert engine.held_blocks == 0


def test_sampling_params_by_both_of_vllms_names(loaded: Any) -> None:
    model, tokenizer = loaded

    class Guided:
        json, regex, choice, grammar, json_object = None, "a+", None, None, None

    for given_ in (
        {"structured_outputs": {"regex": "a+"}}, {"guided_decoding": Guided()},
        sampling_params.SamplingParams(structured_outputs=Constraint(regex="a+")),
    ):  # fmt: skip
        params = sampling_params.read(given_)
        (request,) = sampling_params.requests(
            params, (1, 2), tokenizer=tokenizer, eos_ids=(0,), longest=9
        )
        assert request.constraint == Constraint(regex="a+")


def test_only_allowed_tokens_as_in_transformers(loaded: Any) -> None:
    model, tokenizer = loaded
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    seen = []

    def fn(prompt: int, row: torch.Tensor) -> list[int]:
        seen.append((prompt, row.tolist()[:3]))
        return [20 + prompt, 30 + len(row)]

    for how in ({}, {"num_beams": 2}):
        out = model.generate(
            ids, max_new_tokens=4, prefix_allowed_tokens_fn=fn, eos_token_id=[], do_sample=False,
            **how,
        )  # fmt: skip
        for i, row in enumerate(out[:, 3:].tolist()):
            assert all(t in (20 + i, 33 + n) for n, t in enumerate(row))
    assert {prompt: row for prompt, row in seen} == {0: [5, 6, 7], 1: [8, 9, 10]}
    with pytest.raises(ArgumentError, match="allows no token"):
        model.generate(ids, max_new_tokens=2, prefix_allowed_tokens_fn=lambda *_: [])


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({}, "has nothing, expected one of"),
        ({"regex": "a", "json_object": True}, "has regex and json_object"),
        ({"regex": ""}, "regex is ''"),
        ({"choice": "yes"}, "choice is 'yes', expected texts"),
        ({"choice": []}, "has no texts"),
        ({"json": "{"}, "is not JSON"),
        ({"json": {1, 2}}, "cannot be written as JSON"),
    ],
)
def test_constraints_that_cannot_be(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ArgumentError, match=re.escape(said)):
        Constraint(**wrong)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"regex": "(a"}, "cannot be read: .*parenthesis"),
        ({"grammar": "root ::= foo"}, 'cannot be read: .*"foo" is not defined'),
        ({"json": '{"type": "cat"}'}, "cannot be read: .*Unsupported type"),
        ({"json": "3"}, "cannot be read: .*object or bool"),
        ({"lark": "x"}, "has .'lark'., expected one of"),
        (5, "is 5, expected a purelm.Constraint"),
    ],
)
def test_what_the_grammar_cannot_read(loaded: Any, wrong: Any, said: str) -> None:
    with pytest.raises(ArgumentError, match=said):
        answers(loaded, "Once", constraint=wrong)


def test_what_a_constraint_needs(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArgumentError, match="needs eos_token_id"):
        answers(loaded, "Once", constraint=Constraint(regex="a"), eos_token_id=[])
    model, tokenizer = loaded
    with pytest.raises(ArgumentError, match="needs the tokenizer"):
        Grammar(Constraint(regex="a"), None, model.spec.vocab, [0])
    monkeypatch.setitem(__import__("sys").modules, "xgrammar", None)
    with pytest.raises(ArgumentError, match="purelm.constrained"):
        Grammar(Constraint(regex="ab"), tokenizer, model.spec.vocab, [0])


@pytest.mark.parametrize("how", [{}, {"do_sample": True, "seed": 3, "temperature": 3.0}])
def test_guesses_keep_to_it(loaded: Any, how: dict[str, Any]) -> None:
    model, tokenizer = loaded
    ids = torch.tensor([tokenizer("Once upon a time")["input_ids"]] * 2)
    wanted = [Constraint(regex="(ab, )+c"), Constraint(regex="(no )*yes")]
    for guess in ({"prompt_lookup_num_tokens": 4}, {"assistant_model": model}):
        out = model.generate(ids, max_new_tokens=40, constraint=wanted, **guess, **how)
        if not how:
            plain = model.generate(ids, max_new_tokens=40, constraint=wanted)
            assert torch.equal(out, plain)
        for row, one in zip(out, wanted, strict=True):
            text = tokenizer.decode(row[ids.shape[1] :], skip_special_tokens=True)
            partial = one.regex.startswith("(ab") and re.match("(ab, )*a?b?,? ?c?$", text)
            assert partial or re.match("(no )*(n|no|y|ye|yes)?$", text), text
