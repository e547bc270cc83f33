"""Logits to tokens: each step bit for bit that of transformers; draws follow the softmax."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation import logits_process as hf

from purelm.errors import ArgumentError
from purelm.nn import sampling
from purelm.nn.sampling import GREEDY, Sampling

seeds = st.integers(0, 2**31)


def logits(seed: int, rows: int = 3, vocab: int = 40, ties: bool = False) -> torch.Tensor:
    drawn = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3
    return drawn.round() if ties else drawn


def same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.dtype == torch.float32
    assert torch.equal(ours, theirs)


@given(seed=seeds, value=st.floats(0.05, 5), ties=st.booleans())
def test_temperature(seed: int, value: float, ties: bool) -> None:
    x = logits(seed, ties=ties)
    same(sampling.temperature(x, value), hf.TemperatureLogitsWarper(value)(None, x))


@given(seed=seeds, k=st.integers(1, 60), ties=st.booleans())
def test_top_k(seed: int, k: int, ties: bool) -> None:
    x = logits(seed, ties=ties)
    same(sampling.top_k(x, k), hf.TopKLogitsWarper(k)(None, x))


@given(seed=seeds, p=st.floats(0, 1), ties=st.booleans())
def test_top_p(seed: int, p: float, ties: bool) -> None:
    x = logits(seed, ties=ties)
    same(sampling.top_p(x, p), hf.TopPLogitsWarper(p)(None, x))


@given(seed=seeds, p=st.floats(0, 1), ties=st.booleans())
def test_min_p(seed: int, p: float, ties: bool) -> None:
    x = logits(seed, ties=ties)
    same(sampling.min_p(x, p), hf.MinPLogitsWarper(p)(None, x))


@given(seed=seeds, mass=st.floats(0.01, 0.99), ties=st.booleans())
def test_typical_p(seed: int, mass: float, ties: bool) -> None:
    x = logits(seed, ties=ties)
    same(sampling.typical_p(x, mass), hf.TypicalLogitsWarper(mass)(None, x))


@given(seed=seeds, penalty=st.floats(0.2, 4), length=st.integers(1, 50))
def test_repetition_penalty(seed: int, penalty: float, length: int) -> None:
    x = logits(seed)
    ids = torch.randint(0, 40, (3, length), generator=torch.Generator().manual_seed(seed))
    seen = torch.zeros(3, 40, dtype=torch.bool).scatter_(1, ids, True)
    theirs = hf.RepetitionPenaltyLogitsProcessor(penalty)(ids, x)
    same(sampling.repetition_penalty(x, seen, penalty), theirs)


@given(seed=seeds, ids=st.lists(st.integers(0, 39), min_size=1, max_size=5))
def test_suppress(seed: int, ids: list[int]) -> None:
    x = logits(seed)
    same(sampling.suppress(x, torch.tensor(ids)), hf.SuppressTokensLogitsProcessor(ids)(None, x))


def test_suppressing_an_id_past_the_vocabulary_changes_nothing() -> None:
    x = logits(0)
    same(sampling.suppress(x, torch.tensor([40, 1000])), x)


@given(
    seed=seeds,
    temperature=st.floats(0.3, 3),
    top_k=st.integers(0, 45),
    top_p=st.floats(0.1, 1),
    min_p=st.floats(0, 0.5),
    typical_p=st.floats(0.3, 1),
    penalty=st.floats(0.5, 2),
)
def test_order_is_transformers(
    seed: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    typical_p: float,
    penalty: float,
) -> None:
    """All together, in the order of `GenerationMixin._get_logits_processor`."""
    x = logits(seed)
    ids = torch.randint(0, 40, (3, 9), generator=torch.Generator().manual_seed(seed))
    eos = torch.tensor([3, 7])
    steps: list[Any] = [hf.RepetitionPenaltyLogitsProcessor(penalty)]
    steps.append(hf.MinNewTokensLengthLogitsProcessor(9, 2, eos))
    steps.append(hf.TemperatureLogitsWarper(temperature))
    steps += [hf.TopKLogitsWarper(top_k)] if top_k else []
    steps += [hf.TopPLogitsWarper(top_p)] if top_p < 1 else []
    steps += [hf.MinPLogitsWarper(min_p)]
    steps += [hf.TypicalLogitsWarper(typical_p)] if typical_p < 1 else []
    settings = Sampling(temperature, top_k, top_p, min_p, typical_p, penalty)
    seen = torch.zeros(3, 40, dtype=torch.bool).scatter_(1, ids, True)
    ours = sampling.scores(x, settings, seen=seen, banned=eos)
    theirs = hf.LogitsProcessorList(steps)(ids, x)
    same(ours, theirs)


def test_greedy_leaves_the_warpers_out() -> None:
    x = logits(1)
    same(sampling.scores(x, Sampling(top_k=1, top_p=0.1, min_p=0.9)), x)
    assert torch.equal(sampling.choose(x, GREEDY, None), x.argmax(-1))


def test_low_precision_logits_are_warped_in_fp32() -> None:
    x = logits(2).bfloat16()
    same(sampling.scores(x, Sampling(temperature=0.7)), x.float() / 0.7)


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    expected = probabilities.double() * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


# The 1 - 1e-6 quantiles of chi-square with 7 and 2 degrees of freedom.
LIMIT_7, LIMIT_2 = 40.5, 27.7


def test_draws_follow_the_softmax() -> None:
    x = torch.tensor([[0.0, 1.0, -1.0, 2.0, 0.5, -2.0, 1.5, 0.2]])
    g = torch.Generator().manual_seed(1)
    drawn = torch.cat([sampling.draw(x.expand(500, 8), g) for _ in range(40)])
    assert chi_square(drawn.bincount(minlength=8), x[0].softmax(0)) < LIMIT_7
    # The same counts do not fit a slightly warmer softmax: the test can fail.
    assert chi_square(drawn.bincount(minlength=8), (x[0] / 1.2).softmax(0)) > LIMIT_7


def test_draws_follow_what_the_warpers_leave() -> None:
    x = torch.tensor([[0.0, 1.0, -1.0, 2.0, 0.5, -2.0, 1.5, 0.2]])
    settings = Sampling(temperature=0.8, top_k=3)
    g = torch.Generator().manual_seed(2)
    scores = sampling.scores(x.expand(20000, 8), settings)
    counts = sampling.choose(scores, settings, g).bincount(minlength=8)
    kept = torch.tensor([1, 3, 6])
    assert int(counts.sum() - counts[kept].sum()) == 0
    assert chi_square(counts[kept], (x[0, kept] / 0.8).softmax(0)) < LIMIT_2


def test_minus_infinity_is_never_drawn() -> None:
    x = torch.full((4000, 6), -torch.inf)
    x[:, 2] = 0.0
    assert bool((sampling.draw(x, torch.Generator().manual_seed(0)) == 2).all())


@pytest.mark.parametrize("seed", range(20))
def test_the_largest_uniform_number_draws_a_possible_token(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounding of a long cumulative sum must not lead past the last possible token."""
    x = logits(seed, rows=1, vocab=5000)
    x[:, 4000:] = -torch.inf
    largest = torch.full((1, 1), 1 - 2.0**-53, dtype=torch.float64)
    monkeypatch.setattr(torch, "rand", lambda *_, **__: largest)
    drawn = int(sampling.draw(x, torch.Generator()))
    assert drawn < 4000 and x[0, drawn + 1 : 4000].exp().sum() < 1e-6 * x.exp().sum()


def test_draws_come_from_the_given_generator_alone() -> None:
    x = logits(3)
    before = torch.get_rng_state()
    first = [sampling.draw(x, g) for g in [torch.Generator().manual_seed(5)] for _ in range(20)]
    again = [sampling.draw(x, g) for g in [torch.Generator().manual_seed(5)] for _ in range(20)]
    assert torch.equal(torch.stack(first), torch.stack(again))
    other = [sampling.draw(x, g) for g in [torch.Generator().manual_seed(6)] for _ in range(20)]
    assert not torch.equal(torch.stack(first), torch.stack(other))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", "1"),
        ("temperature", True),
        ("top_k", -1),
        ("top_k", 2.5),
        ("top_p", 1.01),
        ("top_p", -0.01),
        ("min_p", 2),
        ("typical_p", 0),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", None),
        ("min_new_tokens", -3),
    ],
)
def test_bad_values(name: str, value: Any) -> None:
    with pytest.raises(ArgumentError, match=name):
        Sampling(**{name: value})


def test_sampling_without_a_generator() -> None:
    with pytest.raises(ArgumentError, match="generator"):
        sampling.choose(logits(4), Sampling(temperature=1.0), None)
