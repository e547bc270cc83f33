"""Beam search against transformers' own on the same weights: ids, scores, and which beam each token
continued."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from bridged import bridge, left_padded, same_logits
from family_cases import LONGROPE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from purelm.convert.bridge import CausalLM
from purelm.convert.generation import generate
from purelm.convert.streamer import TextStreamer
from purelm.errors import ArgumentError, InputError
from purelm.nn.beam import BeamSearch, search

# transformers takes a pad id of 0 for none and fills with the first end id.
PAD = 3
# Few enough tokens that beams often end, and that rows differ in when.
EOS = list(range(40, 52))
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma2": {},
    "qwen3_moe": {},
    "lfm2": {},
}
Pair = tuple[Any, CausalLM]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    """(transformers' model, ours) of each family."""
    made = {}
    for family, fields in FAMILIES.items():
        theirs = tiny.hf_model(family, eos_token_id=2, bos_token_id=1, pad_token_id=PAD, **fields)
        folder = tiny.save(theirs, tmp_path_factory.mktemp("beams") / family)
        made[family] = (theirs, bridge(folder))
    return made


def prompts(lengths: tuple[int, ...], seed: int = 0) -> dict[str, torch.Tensor]:
    return left_padded(lengths, seed, PAD)


def assert_same(pair: Pair, batch: dict[str, torch.Tensor], **keywords: Any) -> Any:
    theirs, ours = pair
    wanted_all = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    keywords = {"pad_token_id": PAD, "do_sample": False, **wanted_all, **keywords}
    got = generate(ours, **batch, **keywords)
    want = theirs.generate(
        **batch, **{**keywords, "eos_token_id": keywords["eos_token_id"] or None}
    )
    # Without end ids transformers fills up with -1; nothing is to be filled up then.
    assert torch.equal(got.sequences, want.sequences)
    assert torch.equal(got.beam_indices, want.beam_indices.long())
    torch.testing.assert_close(got.sequences_scores, want.sequences_scores)
    assert len(got.scores) == len(want.scores)
    for mine, other in ((got.scores[0], want.scores[0]), (got.logits[-1], want.logits[-1])):
        # What the rules forbid is at -inf; the rest as logits are.
        assert torch.equal(mine.isneginf(), other.isneginf())
        same_logits(*(t.nan_to_num(neginf=0.0) for t in (mine, other)))
    return got


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    family=st.sampled_from(sorted(FAMILIES)),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    seed=st.integers(0, 99),
    beams=st.integers(2, 5),
    ends=st.integers(0, len(EOS)),
    penalty=st.sampled_from([1.0, 0.0, -1.0, 2.0, 0.3]),
    early=st.sampled_from([True, False, "never"]),
    new=st.integers(1, 14),
    least=st.integers(0, 5),
    rules=st.sampled_from(
        [
            {},
            {"repetition_penalty": 1.3},
            {"no_repeat_ngram_size": 3, "repetition_penalty": 0.8},
            {"suppress_tokens": list(range(60, 90)), "renormalize_logits": True},
            {"sequence_bias": {(41,): 3.0, (70, 71): 5.0}, "bad_words_ids": [[80], [81, 82]]},
        ]
    ),
    data=st.data(),
)
def test_equals_transformers(
    pairs: dict[str, Pair],
    family: str,
    lengths: list[int],
    seed: int,
    beams: int,
    ends: int,
    penalty: float,
    early: bool | str,
    new: int,
    least: int,
    rules: dict[str, Any],
    data: st.DataObject,
) -> None:
    if "no_repeat_ngram_size" in rules:
        lengths = lengths[:1]  # transformers counts n-grams of padding
    assert_same(
        pairs[family],
        prompts(tuple(lengths), seed),
        num_beams=beams,
        num_return_sequences=data.draw(st.integers(1, beams)),
        eos_token_id=EOS[:ends],
        length_penalty=penalty,
        early_stopping=early,
        max_new_tokens=new,
        min_new_tokens=min(least, new),
        **rules,
    )


def test_stopping_criteria_and_processors(pairs: dict[str, Pair]) -> None:
    """They see every candidate's ids; a beam they end counts as ended."""

    def forties(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return (ids[:, -1] >= 40) & (ids[:, -1] < 50)

    def even(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.masked_fill(torch.arange(99) % 2 == 1, -torch.inf)

    out = assert_same(
        pairs["llama"],
        prompts((4, 7)),
        num_beams=3,
        num_return_sequences=3,
        eos_token_id=[90],
        max_new_tokens=12,
        early_stopping=True,
        length_penalty=-1.0,
        stopping_criteria=[forties],
        logits_processor=[even],
    )
    assert bool((out.sequences[:, 7:] % 2 == 0).logical_or(out.sequences[:, 7:] == PAD).all())
    assert out.beam_indices.shape[1] < 12 or bool((out.beam_indices == -1).any())


@pytest.mark.parametrize("early", [True, False, "never"])
def test_a_batch_equals_one_prompt_at_a_time(pairs: dict[str, Pair], early: bool | str) -> None:
    """Padding on either side, the cache grown on the way, adapters left out."""
    ours = pairs["gemma2"][1]
    lengths = (2, 9, 5)
    left = prompts(lengths)
    right = {
        name: torch.stack([row.roll(n - 9) for row, n in zip(rows, lengths, strict=True)])
        for name, rows in left.items()
    }
    how: dict[str, Any] = {"num_beams": 3, "eos_token_id": EOS, "max_new_tokens": 10}
    how |= {"pad_token_id": PAD, "early_stopping": early, "num_return_sequences": 2}
    outs = [generate(ours, **batch, **how) for batch in (left, right)]
    assert torch.equal(outs[0][:, 9:], outs[1][:, 9:])
    for i, n in enumerate(lengths):
        alone = generate(ours, left["input_ids"][i : i + 1, -n:], **how)[:, n:]
        both = outs[0][2 * i : 2 * i + 2, 9:]
        assert torch.equal(both[:, : alone.shape[1]], alone)
        assert bool((both[:, alone.shape[1] :] == PAD).all())


def test_the_cache_grows_and_beams_move_in_it(
    pairs: dict[str, Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("purelm.nn.cache.CHUNK", 3)
    assert_same(
        pairs["llama"], prompts((3, 8)), num_beams=4, eos_token_id=EOS[:2], max_new_tokens=20
    )


def test_one_beam_is_greedy_past_the_turn_of_longrope(tmp_path: Path) -> None:
    """Where the frequencies change, the keys of all beams are turned again."""
    switches = {"rope_parameters": LONGROPE, "original_max_position_embeddings": 16}
    ours = bridge(tiny.save(tiny.hf_model("phi3", **switches), tmp_path / "model"))
    ids = prompts((12, 12))["input_ids"]
    found = search(ours.computed_params(), ours.spec, ids, BeamSearch(1), max_new_tokens=12)
    assert torch.equal(
        found.sequences, generate(ours, ids, max_new_tokens=12, eos_token_id=[], do_sample=False)
    )


@pytest.mark.parametrize(
    ("keywords", "error", "says"),
    [
        ({"num_beams": 0}, ArgumentError, "num_beams is 0"),
        ({"num_beams": 2.0}, ArgumentError, "num_beams is 2.0"),
        ({"num_beams": 2, "num_return_sequences": 3}, ArgumentError, "3, more than .* 2"),
        ({"num_beams": 2, "early_stopping": "no"}, ArgumentError, "early_stopping is 'no'"),
        ({"num_beams": 2, "length_penalty": "x"}, ArgumentError, "length_penalty is 'x'"),
        ({"num_beams": 2, "do_sample": True}, NotImplementedError, "do_sample"),
        ({"num_beams": 2, "streamer": TextStreamer(None)}, ArgumentError, "streamer"),
        ({"num_beams": 2, "suppress_tokens": list(range(99))}, InputError, "row 0"),
    ],
)
def test_bad_input(
    pairs: dict[str, Pair], keywords: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        generate(pairs["llama"][1], **prompts((3, 5)), max_new_tokens=4, **keywords)
