"""Rows of different sampling together: each gets the token that the scalar rules give it alone."""

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from purelm.nn import sample_rows
from purelm.nn import sampling as rules
from purelm.nn.sample_rows import Controls
from purelm.nn.sampling import Sampling

SAMPLINGS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 3, 100]),
    top_p=st.sampled_from([0.0, 0.4, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.2]),
    repetition_penalty=st.sampled_from([0.8, 1.0, 1.3]),
    presence_penalty=st.sampled_from([0.0, 0.7]),
    frequency_penalty=st.sampled_from([0.0, -0.4]),
)


@given(samplings=st.lists(SAMPLINGS, min_size=1, max_size=4), seed=st.integers(0, 2**31))
def test_equals_the_rules_row_by_row(samplings: list[Sampling], seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    rows, vocab = len(samplings), 23
    controls = Controls.empty(rows, "cpu")
    texts = [torch.randint(0, vocab, (5,), generator=g) for _ in samplings]
    for i, (sampling, text) in enumerate(zip(samplings, texts, strict=True)):
        controls.place(i, sampling, text, 2, vocab)
    needs = frozenset[str]().union(*(sample_rows.asked(s) or () for s in samplings))
    for _ in range(3):
        logits = torch.randn(rows, vocab, generator=g) * 3
        controls.uniform.copy_(torch.rand(rows, dtype=torch.float64, generator=g))
        chosen = sample_rows.choose(logits, controls, needs)
        for i, sampling in enumerate(samplings):
            scores = _scores(logits[i : i + 1], sampling, texts[i])
            want = scores.argmax(-1)
            if sampling.temperature > 0:
                want = rules.look_up(scores, controls.uniform[i : i + 1])
            assert int(chosen[i]) == int(want)
            texts[i] = torch.cat([texts[i], want])


def _scores(logits: torch.Tensor, sampling: Sampling, text: torch.Tensor) -> torch.Tensor:
    seen = torch.zeros_like(logits, dtype=torch.bool)
    seen[0, text] = True
    return rules.scores(logits, sampling, seen=seen, ids=text[None], start=2)


def test_rows_move_and_broken_logits_are_told() -> None:
    controls = Controls.empty(2, "cpu")
    ids = torch.tensor([1, 1, 3])
    controls.place(1, Sampling(repetition_penalty=100.0, presence_penalty=50.0), ids, 1, 4)
    controls.move(1, 0)
    logits = torch.tensor([[2.0, 9.0, 1.0, 9.0], [float("nan"), 1.0, 1.0, 1.0]])
    needs = frozenset({"seen", "counts"})
    assert sample_rows.choose(logits, controls, needs).tolist() == [0, -1]


def test_rules_without_a_number_a_row_are_named() -> None:
    assert sample_rows.asked(Sampling()) == frozenset()
    others: list[dict[str, Any]] = [
        {"no_repeat_ngram_size": 2},
        {"typical_p": 0.5},
        {"bad_words_ids": ((1,),)},
        {"sequence_bias": (((1,), 2.0),)},
        {"suppress_tokens": (1,)},
    ]
    assert all(sample_rows.asked(Sampling(**more)) is None for more in others)
