"""Guesses behind `generate`: by transformers' names, with its ids and those of plain generation."""

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from bridged import bridge, left_padded, same_logits

from purelm import FastLanguageModel
from purelm.convert.bridge import CausalLM
from purelm.convert.generation import generate
from purelm.errors import ArgumentError
from purelm.nn import decoder
from purelm.nn import tree as trees

PLAIN: dict[str, Any] = {"max_new_tokens": 30, "eos_token_id": list(range(60, 64))}


def saved(folder: Path, seed: int, **switches: Any) -> tuple[Any, CausalLM]:
    """(transformers' model, ours) of one folder."""
    theirs = tiny.hf_model("llama", seed=seed, eos_token_id=2, pad_token_id=None, **switches)
    return theirs, bridge(tiny.save(theirs, folder))


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, CausalLM]:
    return saved(tmp_path_factory.mktemp("target") / "model", 0)


@pytest.fixture(scope="module")
def assistant(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, CausalLM]:
    return saved(tmp_path_factory.mktemp("assistant") / "model", 1, num_hidden_layers=1)


@pytest.fixture
def ours(target: tuple[Any, CausalLM]) -> CausalLM:
    return target[1]


def again(row: list[int], times: int) -> torch.Tensor:
    """A prompt in which n-grams come again."""
    return torch.tensor([row * times])


@pytest.mark.parametrize("rules", [{}, {"repetition_penalty": 1.3, "no_repeat_ngram_size": 4}])
@pytest.mark.parametrize("model", [False, True])
def test_greedy_ids_are_transformers(
    target: tuple[Any, CausalLM],
    assistant: tuple[Any, CausalLM],
    model: bool,
    rules: dict[str, Any],
) -> None:
    theirs, ours = target
    ids = again([5, 17, 40, 8], 4)
    asked = PLAIN | rules
    guess: tuple[dict[str, Any], dict[str, Any]]
    guess = {"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 3}, {}
    guess = (guess[0], guess[0])
    if model:
        guess = {"assistant_model": assistant[0]}, {"assistant_model": assistant[1]}
    want = theirs.generate(ids, attention_mask=torch.ones_like(ids), **asked, **guess[0])
    out = generate(ours, ids, **asked, **guess[1])
    assert torch.equal(out, want) and torch.equal(out, generate(ours, ids, **asked))


@pytest.mark.parametrize("model", [False, True])
def test_padded_rows_copies_streams_and_scores(
    ours: CausalLM, assistant: tuple[Any, CausalLM], model: bool
) -> None:
    """What else is asked for is as without guesses."""
    guess: dict[str, Any] = {"prompt_lookup_num_tokens": 3}
    if model:
        guess = {"assistant_model": assistant[1], "num_assistant_tokens": 4}
    asked = {**left_padded((3, 9, 6), 0, 0), **PLAIN}
    assert torch.equal(generate(ours, **asked, **guess), generate(ours, **asked))
    full = {**asked, "return_dict_in_generate": True, "output_scores": True}
    out, want = generate(ours, **full, **guess), generate(ours, **full)
    assert torch.equal(out["sequences"], want["sequences"])
    for x, y in zip(out["scores"], want["scores"], strict=True):
        same_logits(x, y)
    several = {"do_sample": True, "top_k": 1, "num_return_sequences": 2}
    assert torch.equal(
        generate(ours, **asked, **several, **guess), generate(ours, **asked, **several)
    )


def passes(monkeypatch: pytest.MonkeyPatch, model: CausalLM, **asked: Any) -> list[int]:
    """How many tokens each pass of `model` took that took several."""
    widths = []
    extend = decoder.extend

    def noted(params: Any, spec: Any, tokens: torch.Tensor, *rest: Any, **named: Any) -> Any:
        if spec is model.spec:
            widths.append(tokens.shape[1])
        return extend(params, spec, tokens, *rest, **named)

    with monkeypatch.context() as patch:
        patch.setattr(decoder, "extend", noted)
        generate(model, **asked)
    return widths[1:]


def test_guesses_save_passes(monkeypatch: pytest.MonkeyPatch, ours: CausalLM) -> None:
    """A model that assists itself is always right, and guesses as many as are asked for."""
    twin = copy.deepcopy(ours)
    twin.spec = copy.copy(ours.spec)
    ids = {"input_ids": again([5, 17, 40, 8], 2)}
    asked: dict[str, Any] = {"max_new_tokens": 31, "eos_token_id": [], "assistant_model": twin}
    sure = {**ids, **asked, "assistant_confidence_threshold": 0.0}
    assert passes(monkeypatch, ours, **sure, num_assistant_tokens=4) == [5] * 6
    # 20 by default, and as many as the assistant's own settings say.
    assert passes(monkeypatch, ours, **sure) == [21, 9]
    twin.generation_config = type(twin.generation_config)({"num_assistant_tokens": 9})
    assert passes(monkeypatch, ours, **sure) == [10] * 3
    # More and more while it is right, in every call anew.
    grows = {**sure, "num_assistant_tokens": 3, "num_assistant_tokens_schedule": "heuristic"}
    assert (
        passes(monkeypatch, ours, **grows) == passes(monkeypatch, ours, **grows) == [4, 6, 8, 10, 2]
    )
    # Of an unsure assistant one guess is checked at a time.
    assert passes(monkeypatch, ours, **ids, **asked) == [2] * 15
    assert passes(monkeypatch, ours, **ids, max_new_tokens=31, eos_token_id=[]) == []


def test_who_is_wrong_guesses_less(
    monkeypatch: pytest.MonkeyPatch, ours: CausalLM, assistant: tuple[Any, CausalLM]
) -> None:
    ids = {"input_ids": again([5, 17, 40, 8], 2)}
    asked: dict[str, Any] = {"max_new_tokens": 31, "eos_token_id": []}
    other = {"assistant_model": assistant[1], "assistant_confidence_threshold": 0.0}
    shrinks = {"num_assistant_tokens": 4, "num_assistant_tokens_schedule": "heuristic_transient"}
    want = generate(ours, **ids, **asked)
    assert torch.equal(generate(ours, **ids, **asked, **other, **shrinks), want)
    widths = passes(monkeypatch, ours, **ids, **asked, **other, **shrinks)
    assert widths[:4] == [5, 4, 3, 2]


def test_its_adapters_guess_too(ours: CausalLM) -> None:
    """What an assistant wears is what guesses, and no other weights of the model's."""
    ids = again([5, 17, 40, 8], 2)
    twin = FastLanguageModel.get_peft_model(copy.deepcopy(ours), r=4)
    for leaf in trees.leaves(twin.adapters):
        torch.nn.init.normal_(leaf.b)
    want = generate(ours, ids, **PLAIN)
    assert not torch.equal(generate(twin, ids, **PLAIN), want)
    assert torch.equal(generate(ours, ids, assistant_model=twin, **PLAIN), want)


def test_samples_repeat_with_their_seed(ours: CausalLM, assistant: tuple[Any, CausalLM]) -> None:
    ids = again([5, 17, 40, 8], 2)
    asked: dict[str, Any] = {**PLAIN, "do_sample": True, "assistant_model": assistant[1]}
    one, same, other = (generate(ours, ids, seed=s, **asked) for s in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_what_cannot_guess(ours: CausalLM, assistant: tuple[Any, CausalLM], tmp_path: Path) -> None:
    ids, theirs, helper = again([5, 17], 2), assistant[0], assistant[1]
    _, narrow = saved(tmp_path / "narrow", 2, vocab_size=64)
    first, _ = FastLanguageModel.from_pretrained("purelm/tiny", device_map="cpu")
    second, tokens = FastLanguageModel.from_pretrained("purelm/tiny", device_map="cpu")
    tokens.add_tokens(["moremore"])
    for model, keywords, says in (
        (ours, {"prompt_lookup_num_tokens": 3, "assistant_model": helper}, "both given"),
        (ours, {"prompt_lookup_num_tokens": 3, "num_beams": 2}, "num_beams=1"),
        (ours, {"assistant_model": helper, "num_beams": 2}, "assistant_model guesses"),
        (ours, {"assistant_model": theirs}, "assistant_model is a LlamaForCausalLM"),
        (ours, {"assistant_model": narrow}, "has 64 tokens, the model 99"),
        (ours, {"prompt_lookup_num_tokens": 0}, "prompt_lookup_num_tokens is 0"),
        (ours, {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1.5}, "is 1.5"),
        (ours, {"assistant_model": helper, "num_assistant_tokens": -1}, "num_assistant_tokens"),
        (ours, {"assistant_model": helper, "assistant_confidence_threshold": 2}, "in 0..1"),
        (
            ours,
            {"assistant_model": helper, "num_assistant_tokens_schedule": "x"},
            "schedule is 'x'",
        ),
        (first, {"assistant_model": second}, f"has {len(tokens)} tokens, not {len(tokens) - 1}"),
    ):
        with pytest.raises(ArgumentError, match=says):
            generate(model, ids, max_new_tokens=3, **keywords)
    # As long, and another text for one token.
    first.tokenizer.add_tokens(["lessless"])
    with pytest.raises(ArgumentError, match="'moremore' for token .*, not 'lessless'"):
        generate(first, ids, max_new_tokens=3, assistant_model=second)
    with pytest.raises(NotImplementedError, match="assistant_tokenizer"):
        generate(ours, ids, max_new_tokens=3, assistant_model=helper, assistant_tokenizer=tokens)
