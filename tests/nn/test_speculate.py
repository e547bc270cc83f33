"""Speculation: the ids of plain greedy, the distribution of plain sampling, whatever is guessed."""

from dataclasses import replace
from typing import Any

import hybrids
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from purelm.errors import ArgumentError, InputError
from purelm.nn import cache as kv
from purelm.nn import decoder, params, passes
from purelm.nn import tree as trees
from purelm.nn.draft import (
    Draft,
    Drafted,
    DraftModel,
    NGrams,
    Rows,
    by_model,
    by_ngrams,
    passes_of,
)
from purelm.nn.generate import generate
from purelm.nn.kept_steps import KeptSteps
from purelm.nn.prompt import layout_from, layout_of
from purelm.nn.sampling import GREEDY, Sampling
from purelm.nn.speculate import accepted, speculate

PAD = 0


def noisy(tree: Any, amount: float) -> Any:
    """A draft model that is often right: the same weights, disturbed."""
    g = torch.Generator().manual_seed(5)
    return trees.map(
        lambda t: t + amount * torch.randn(t.shape, generator=g, dtype=t.dtype) * t.std(), tree
    )


def drafts(kind: str, spec: Any, tree: Any) -> Draft:
    if kind == "ngrams":
        return NGrams(4, 2)
    amount = {"same": 0.0, "near": 0.15, "unsure": 0.15, "far": 3.0}[kind]
    confidence = 0.5 if kind == "unsure" else 0.0
    return DraftModel(noisy(tree, amount), spec, tokens=3, confidence=confidence)


def padded(lengths: list[int], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(lengths)
    ids, mask = torch.full((len(lengths), width), PAD), torch.zeros(len(lengths), width).long()
    for i, n in enumerate(lengths):
        # Few different tokens, so that n-grams come again.
        ids[i, width - n :] = hybrids.prompt(seed + i, 1, n)[0] % 4 + 1
        mask[i, width - n :] = 1
    return ids, mask


@settings(max_examples=30, deadline=None)
@given(
    mixer=st.sampled_from(["full", "window", "chunk", "latent"]),
    kind=st.sampled_from(["ngrams", "same", "near", "unsure", "far"]),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    seed=st.integers(0, 99),
    new=st.integers(1, 24),
    rules=st.sampled_from(
        [GREEDY, Sampling(repetition_penalty=1.2, no_repeat_ngram_size=3, min_new_tokens=4)]
    ),
    ends=st.integers(0, 6),
    replayed=st.booleans(),
    chunk=st.sampled_from([3, 512]),
)
def test_greedy_ids_are_those_of_plain_greedy(
    mixer: str,
    kind: str,
    lengths: list[int],
    seed: int,
    new: int,
    rules: Sampling,
    ends: int,
    replayed: bool,
    chunk: int,
) -> None:
    """With ends that come early in one row and late in another, a pad id nobody knows, caches that
    grow, and passes as a GPU replays them."""
    spec, tree = hybrids.small(mixer)
    ids, mask = padded(lengths, seed)
    how: dict[str, Any] = {"mask": mask, "max_new_tokens": new, "sampling": rules}
    how |= {"eos_ids": range(10, 10 + ends), "pad_id": 999}
    seen: list[torch.Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "replayable", lambda device: replayed)
        patch.setattr(passes, "capture", lambda step, device: step)
        patch.setattr(kv, "CHUNK", chunk)
        patch.setattr(kv, "ROUND", 8)
        kept, draft = KeptSteps(), drafts(kind, spec, tree)
        # Another call's caches and graphs are found, with that call's tokens in them.
        other = {**how, "mask": mask.flip(0), "kept": kept}
        speculate(tree, spec, ids.flip(0), draft, **other)
        out = speculate(tree, spec, ids, draft, on_token=seen.append, kept=kept, **how)
    assert torch.equal(out, generate(tree, spec, ids, **how))
    assert torch.equal(torch.stack(seen, 1), out[:, ids.shape[1] :])


def test_guesses_are_kept_and_save_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A draft that is always right: four tokens a pass of the target."""
    spec, tree = hybrids.small("full")
    widths = []
    extend = decoder.extend

    def noted(p: Any, s: Any, tokens: torch.Tensor, *rest: Any, **named: Any) -> Any:
        if p is tree:
            widths.append(tokens.shape[1])
        return extend(p, s, tokens, *rest, **named)

    monkeypatch.setattr(decoder, "extend", noted)
    draft = DraftModel(noisy(tree, 0.0), spec, tokens=3)
    speculate(tree, spec, hybrids.prompt(0, 1, 5), draft, max_new_tokens=21)
    assert widths == [5, 4, 4, 4, 4, 4]


def test_passes_are_captured_once_a_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one token and of all guesses; a draft model's of one and two."""
    spec, tree = hybrids.small("full")
    widths: list[int] = []

    def capture(step: Any, device: torch.device) -> Any:
        before = decode_of_passes

        def noted(p: Any, s: Any, token: torch.Tensor, *rest: Any, **named: Any) -> Any:
            widths.append(len(token))
            return before(p, s, token, *rest, **named)

        monkeypatch.setattr(passes, "decode", noted)
        step()
        monkeypatch.setattr(passes, "decode", before)
        return step

    decode_of_passes = passes.decode
    monkeypatch.setattr(passes, "replayable", lambda device: True)
    monkeypatch.setattr(passes, "capture", capture)
    ids = torch.tensor([[5, 6, 7, 8, 5, 6], [9, 6, 7, 8, 9, 6]])
    for kind, most in (("ngrams", {2 * 1, 2 * 5}), ("near", {2 * 1, 2 * 2, 2 * 4})):
        widths.clear()
        speculate(tree, spec, ids, drafts(kind, spec, tree), max_new_tokens=60)
        assert set(widths) <= most and max(widths) == max(most)
        # At most one of each for each of the two models.
        assert len(widths) <= 4
    # Other calls of the same kind capture what was run but once; with other weights, all anew.
    kept, draft = KeptSteps(), drafts("near", spec, tree)
    speculate(tree, spec, ids, draft, max_new_tokens=60, kept=kept)
    speculate(tree, spec, ids, draft, max_new_tokens=60, kept=kept)
    for weights, new in ((tree, False), (trees.map(torch.clone, tree), True)):
        widths.clear()
        out = speculate(weights, spec, ids, draft, max_new_tokens=60, kept=kept)
        assert bool(widths) == new
        assert torch.equal(out, generate(tree, spec, ids, max_new_tokens=60))
    monkeypatch.setattr(passes, "capture", lambda step, device: None)
    want = generate(tree, spec, ids, max_new_tokens=30)
    assert torch.equal(speculate(tree, spec, ids, NGrams(4), max_new_tokens=30), want)


def test_an_unsure_draft_model_says_no_more() -> None:
    """Nothing after a guess less likely than is asked for, in a row that still waits."""
    spec, tree = hybrids.small("full")
    ids = hybrids.prompt(0, 2, 5).repeat(1, 2)

    def width(confidence: float, waiting: list[bool]) -> int:
        draft = DraftModel(tree, spec, tokens=4, confidence=confidence)
        room = torch.cat([ids, torch.zeros(2, 8, dtype=torch.int64)], 1)
        rows = Rows(room, 10, 10, None, torch.empty(0, dtype=torch.int64), torch.tensor(waiting))
        seen = passes_of(draft, room, None)
        seen.begin(tree, spec, None, limit=18, graphs=False)
        how: dict[str, Any] = {"vocab": 50, "generator": None, "adjust": None}
        drafted = by_model(draft, seen, rows, draft.tokens, GREEDY, **how)
        return drafted.tokens.shape[1]

    x = ids.clone()
    chances = []
    for _ in range(4):
        p = decoder.forward(tree, spec, x)[:, -1].softmax(-1).max(-1)
        chances.append(p.values)
        x = torch.cat([x, p.indices[:, None]], 1)
    low = torch.stack(chances, 1)
    # Just over the least of row 0: it ends there at the latest, unless the row has ended.
    most = float(low[0].min()) * (1 + 1e-9)
    first = [int((row < most).long().argmax()) if bool((row < most).any()) else 3 for row in low]
    assert width(0.0, [True, True]) == 4
    assert width(most, [True, True]) == min(first) + 1
    assert width(most, [False, True]) == first[1] + 1
    assert width(most, [False, False]) == 4 and width(1.0, [True, True]) == 1


def test_hooks_and_stops_see_every_token() -> None:
    spec, tree = hybrids.small("full")
    ids = hybrids.prompt(0, 2, 5)
    lengths: list[int] = []

    def stop(now: torch.Tensor) -> torch.Tensor:
        lengths.append(now.shape[1])
        return torch.tensor([now.shape[1] >= 8, now.shape[1] >= 12])

    def even(now: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.masked_fill(torch.arange(50) % 2 == 1, -torch.inf)

    how: dict[str, Any] = {"max_new_tokens": 20, "adjust": even}
    want = generate(tree, spec, ids, stop=stop, **how)
    plain, lengths = lengths, []
    out = speculate(tree, spec, ids, drafts("near", spec, tree), stop=stop, **how)
    assert torch.equal(out, want) and lengths == plain == list(range(6, 13))


def chi_square_fits(counts: torch.Tensor, p: torch.Tensor) -> None:
    """Mean plus six standard deviations of chi-square, rare outcomes pooled."""
    n = counts.sum()
    common = p * n >= 5
    statistic = ((counts - p * n) ** 2 / (p * n))[common].sum()
    rest = p[~common].sum() * n
    if rest > 0:
        statistic = statistic + (counts[~common].sum() - rest) ** 2 / rest
    freedom = int(common.sum())
    assert freedom > 5 and statistic < freedom + 6 * (2 * freedom) ** 0.5, statistic


@pytest.mark.parametrize("drawn", [False, True])
def test_what_is_accepted_has_the_targets_distribution(drawn: bool) -> None:
    """Two rows whose guesses depend on nothing: each row's first token follows its own p."""
    g = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 3, 12, generator=g) * 1.5
    q = (torch.randn(2, 2, 12, generator=g) * 1.5).double().softmax(-1)
    firsts = []
    for _ in range(4000):
        guess = q.flatten(0, 1).multinomial(1, generator=g).view(2, 2)
        if not drawn:
            guess = torch.tensor([[3, 1], [4, 2]])
        kept = accepted(
            scores,
            Drafted(guess, q if drawn else None),
            Sampling(temperature=1.0),
            g,
            waiting=torch.tensor([True, True]),
        )
        firsts.append(kept[:, 0])
    for row in range(2):
        counts = torch.stack(firsts)[:, row].bincount(minlength=12).double()
        chi_square_fits(counts, scores[row, 0].double().softmax(-1))


@pytest.mark.parametrize("kind", ["ngrams", "near", "unsure", "far"])
def test_samples_follow_the_model(kind: str) -> None:
    """Three tokens each of a batch of two, over the tree of all that can come."""
    spec, tree = hybrids.small("full")
    rules = Sampling(temperature=1.5, top_k=3)
    ids = torch.tensor([[1, 2, 3, 1, 2]])

    def chances(row: torch.Tensor) -> torch.Tensor:
        logits = decoder.forward(tree, spec, row[None])[0, -1] / 1.5
        best = logits.topk(3)
        p = torch.zeros(50, dtype=torch.float64)
        p[best.indices] = best.values.double().softmax(0)
        return p

    outcomes: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(3):
        longer = {}
        for path, chance in outcomes.items():
            p = chances(torch.cat([ids[0], torch.tensor(path, dtype=torch.long)]))
            for token in p.nonzero()[:, 0].tolist():
                longer[(*path, token)] = chance * float(p[token])
        outcomes = longer
    index = {path: i for i, path in enumerate(outcomes)}
    counts = torch.zeros(len(index), dtype=torch.float64)
    g, draft = torch.Generator().manual_seed(0), drafts(kind, spec, tree)
    for _ in range(350):
        out = speculate(
            tree, spec, ids.expand(2, 5), draft, max_new_tokens=3, sampling=rules, generator=g
        )
        for row in out[:, 5:].tolist():
            counts[index[tuple(row)]] += 1
    chi_square_fits(counts, torch.tensor(list(outcomes.values()), dtype=torch.float64))


@pytest.mark.parametrize(
    ("row", "want"),
    [
        ([5, 6, 7, 8, 5, 6], [7, 8, 5]),
        ([5, 6, 7, 5, 6, 9, 5, 6], [9, 5, 6]),
        ([6, 7, 8, 9, 1, 6], [7, 8, 9]),
        ([1, 2, 3], [-1, -1, -1]),
        ([4, 4, 4], [4, -1, -1]),
        ([-1, -1, 4], [-1, -1, -1]),
        ([4], [-1, -1, -1]),
    ],
)
def test_ngrams_are_looked_up(row: list[int], want: list[int]) -> None:
    """The longest n-gram first, of its places the latest with all guesses after it."""
    assert by_ngrams(torch.tensor([row]), NGrams(3, 2), 9).tolist() == [want]


@pytest.mark.parametrize("vocab", [40, 64])
def test_a_draft_of_another_padded_vocabulary_and_a_short_context(vocab: int) -> None:
    spec, tree = hybrids.small("full")
    other = replace(spec, vocab=vocab, max_positions=12)
    drawn = params.init(other, generator=torch.Generator().manual_seed(8))
    draft = DraftModel(trees.map(torch.Tensor.double, drawn), other, tokens=3)
    ids = hybrids.prompt(1, 2, 6)
    out = speculate(tree, spec, ids, draft, max_new_tokens=20)
    assert torch.equal(out, generate(tree, spec, ids, max_new_tokens=20))


@pytest.mark.parametrize("mixer", ["full", "window"])
def test_a_cut_cache_goes_on_as_if_nothing_had_been_after(mixer: str) -> None:
    spec, tree = hybrids.small(mixer)
    ids, mask = padded([3, 7], 0)
    how: dict[str, Any] = {"padded": True, "dtype": torch.float64, "device": "cpu"}
    real = mask.bool()

    def after(wrong: int) -> torch.Tensor:
        cache = kv.empty(spec, 2, 16, **how)
        _, cache = decoder.extend(tree, spec, ids, cache, layout=layout_of(ids, real))
        if wrong:
            junk = torch.cat([ids, torch.full((2, wrong), 9)], 1)
            _, cache = decoder.extend(
                tree, spec, junk[:, 7:], cache, layout=layout_from(junk, real, 7)
            )
            cache = kv.cut(cache, 7)
        longer = torch.cat([ids, torch.tensor([[4, 5], [6, 7]])], 1)
        x, cache = decoder.extend(
            tree, spec, longer[:, 7:], cache, layout=layout_from(longer, real, 7)
        )
        assert cache.end.tolist() == [9, 9] and cache.first.tolist() == [4, 0]
        return x

    assert torch.equal(after(0), after(4))


@pytest.mark.parametrize("mixer", ["conv", "mamba2"])
def test_recurrent_layers_are_refused(mixer: str) -> None:
    spec, tree = hybrids.small(mixer)
    plain, weights = hybrids.small("full")
    ids = hybrids.prompt(0, 1, 4)
    with pytest.raises(ArgumentError, match="the model has recurrent layers"):
        speculate(tree, spec, ids, NGrams(), max_new_tokens=3)
    with pytest.raises(ArgumentError, match="the draft model has recurrent layers"):
        speculate(weights, plain, ids, DraftModel(tree, spec), max_new_tokens=3)
    cache = kv.empty(spec, 1, 4, padded=False, dtype=torch.float64, device="cpu")
    with pytest.raises(InputError, match="recurrent"):
        kv.cut(cache, 0)


def test_bad_input() -> None:
    spec, tree = hybrids.small("full")
    ids = hybrids.prompt(0, 1, 4)
    with pytest.raises(ArgumentError, match="generator"):
        speculate(tree, spec, ids, NGrams(), max_new_tokens=3, sampling=Sampling(temperature=1.0))
    with pytest.raises(ArgumentError, match="prompt_lookup_num_tokens is 0"):
        NGrams(0)
    with pytest.raises(ArgumentError, match="num_assistant_tokens is 1.5"):
        DraftModel(tree, spec, tokens=1.5)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="assistant_confidence_threshold is 1.5"):
        DraftModel(tree, spec, confidence=1.5)
    tree["norm"]["weight"][3] = float("nan")
    with pytest.raises(InputError, match="not finite"):
        speculate(tree, spec, ids, NGrams(), max_new_tokens=3)
    with pytest.raises(InputError, match="cannot be cut to 5"):
        kv.cut(kv.empty(spec, 1, 8, padded=False, dtype=torch.float64, device="cpu"), 5)
