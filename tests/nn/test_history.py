"""Rules that read the row: those of transformers bit for bit, the penalties by their definition."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation import logits_process as hf

from purelm.errors import ArgumentError
from purelm.nn import history, sampling
from purelm.nn.sampling import Sampling

VOCAB = 12
EPS = 2.0**-23  # of fp32
seeds = st.integers(0, 2**31)
words = st.lists(
    st.lists(st.integers(0, 3), min_size=1, max_size=3), min_size=1, max_size=6, unique_by=tuple
)


def case(seed: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits over VOCAB tokens, and rows of few different ones, so that much repeats."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(3, VOCAB, generator=g) * 3, torch.randint(0, 4, (3, length), generator=g)


@given(seed=seeds, length=st.integers(1, 30), size=st.integers(1, 5))
def test_no_repeat_ngram(seed: int, length: int, size: int) -> None:
    x, ids = case(seed, length)
    theirs = hf.NoRepeatNGramLogitsProcessor(size)(ids, x.clone())
    assert torch.equal(history.no_repeat_ngram(x, ids, size), theirs)


@given(seed=seeds, length=st.integers(1, 30), sequences=words)
def test_sequence_bias(seed: int, length: int, sequences: list[list[int]]) -> None:
    x, ids = case(seed, length)
    biases = torch.randn(len(sequences), generator=torch.Generator().manual_seed(seed)).tolist()
    theirs = hf.SequenceBiasLogitsProcessor(
        {tuple(s): b for s, b in zip(sequences, biases, strict=True)}
    )(ids, x)
    ours = history.sequence_bias(x, ids, list(zip(sequences, biases, strict=True)))
    # Several sequences of one last token are summed in either order: each of the k additions rounds
    # by half an ulp of a sum that is at most what the magnitudes add up to. One alone is exact.
    magnitude, number = x.abs().double(), torch.zeros(VOCAB, dtype=torch.float64)
    for sequence, bias in zip(sequences, biases, strict=True):
        magnitude[:, sequence[-1]] += abs(bias)
        number[sequence[-1]] += 1
    limit = torch.where(number > 1, number * EPS * magnitude, 0.0)
    assert bool(((ours.double() - theirs.double()).abs() <= limit).all())


@given(seed=seeds, length=st.integers(1, 30), sequences=words)
def test_bad_words(seed: int, length: int, sequences: list[list[int]]) -> None:
    x, ids = case(seed, length)
    ours = sampling.scores(x, Sampling(bad_words_ids=tuple(map(tuple, sequences))), ids=ids)
    assert torch.equal(ours, hf.NoBadWordsLogitsProcessor(sequences)(ids, x))


@given(seed=seeds, length=st.integers(0, 20), start=st.integers(0, 20))
def test_presence_and_frequency_penalties(seed: int, length: int, start: int) -> None:
    """OpenAI's formula, token by token, over the answer alone."""
    x, ids = case(seed, length)
    settings = Sampling(presence_penalty=0.7, frequency_penalty=-0.3)
    ours = sampling.scores(x, settings, ids=ids, start=start)
    for row in range(3):
        answer = ids[row, start:].tolist()
        for token in range(VOCAB):
            n = answer.count(token)
            wanted = float(x[row, token]) + 0.3 * n - 0.7 * (n > 0)
            # Two constants, a product, two sums are rounded, each by half an ulp of at most this.
            most = abs(float(x[row, token])) + 0.3 * n + 0.7
            assert abs(float(ours[row, token]) - wanted) <= 2.5 * EPS * most


@given(seed=seeds, length=st.integers(1, 12), size=st.integers(1, 4), pads=st.integers(1, 6))
def test_padding_is_no_token(seed: int, length: int, size: int, pads: int) -> None:
    x, ids = case(seed, length)
    settings = Sampling(
        presence_penalty=0.5,
        frequency_penalty=0.2,
        no_repeat_ngram_size=size,
        sequence_bias=(((1, 2), 3.0), ((0,), -1.0)),
        bad_words_ids=((3, 3), (2,)),
    )
    padded = torch.cat([torch.full((3, pads), -1), ids], 1)
    alone = sampling.scores(x, settings, ids=ids)
    assert torch.equal(sampling.scores(x, settings, ids=padded), alone)


@given(seed=seeds, length=st.integers(5, 25), size=st.integers(2, 4), penalty=st.floats(0.5, 2))
def test_order_is_transformers(seed: int, length: int, size: int, penalty: float) -> None:
    """All of them together, in the order of `GenerationMixin._get_logits_processor`."""
    x, ids = case(seed, length)
    eos = torch.tensor([5])
    steps: list[Any] = [
        hf.SequenceBiasLogitsProcessor({(1,): 2.5, (0, 2): -1.25}),
        hf.RepetitionPenaltyLogitsProcessor(penalty),
        hf.NoRepeatNGramLogitsProcessor(size),
        hf.NoBadWordsLogitsProcessor([[3, 1], [7]]),
        hf.MinNewTokensLengthLogitsProcessor(length, 2, eos),
        hf.SuppressTokensLogitsProcessor([8, 9]),
        hf.TemperatureLogitsWarper(0.7),
        hf.TopKLogitsWarper(6),
    ]
    settings = Sampling(
        temperature=0.7,
        top_k=6,
        repetition_penalty=penalty,
        no_repeat_ngram_size=size,
        sequence_bias=(((1,), 2.5), ((0, 2), -1.25)),
        bad_words_ids=((3, 1), (7,)),
        suppress_tokens=(8, 9),
    )
    seen = torch.zeros(3, VOCAB, dtype=torch.bool).scatter_(1, ids, True)
    ours = sampling.scores(x, settings, seen=seen, ids=ids, banned=eos)
    assert torch.equal(ours, hf.LogitsProcessorList(steps)(ids, x))


def test_logprobs_are_the_log_softmax() -> None:
    x, _ = case(3, 1)
    tokens = torch.tensor([4, 0, 11])
    wanted = x.double().softmax(-1)[torch.arange(3), tokens].log()
    torch.testing.assert_close(sampling.logprobs(x, tokens).double(), wanted)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("presence_penalty", math.nan),
        ("frequency_penalty", "1"),
        ("no_repeat_ngram_size", -1),
        ("suppress_tokens", (-4,)),
        ("bad_words_ids", ((),)),
        ("bad_words_ids", ((1, 2.5),)),
        ("sequence_bias", (((), 1.0),)),
        ("sequence_bias", (((1,), math.nan),)),
    ],
)
def test_bad_values(name: str, value: Any) -> None:
    with pytest.raises(ArgumentError, match=name):
        Sampling(**{name: value})


def test_rules_that_read_the_row_need_it() -> None:
    with pytest.raises(ArgumentError, match="pass ids"):
        sampling.scores(case(0, 1)[0], Sampling(no_repeat_ngram_size=2))
