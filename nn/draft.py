"""Cheap guesses at the tokens to come, for `speculate` to verify: by n-grams or by a smaller model.

No guess changes which answers are given, nor how often: only how many tokens a step verifies.
"""

from dataclasses import dataclass
from typing import Any

import torch

from ..errors import ArgumentError
from . import cache as kv
from . import sampling as rules
from . import tree
from .pages import shared_length
from .passes import Passes
from .row_scores import Adjust, row_scores
from .sampling import Sampling
from .spec import ModelSpec


@dataclass(frozen=True, slots=True)
class NGrams:
    """What followed where the row's last tokens stood before (prompt lookup decoding).

    tokens: at most so many are drafted. longest: so many last tokens are sought first, then fewer.
    """

    tokens: int = 10
    longest: int = 2

    def __post_init__(self) -> None:
        _require_whole("prompt_lookup_num_tokens", self.tokens)
        _require_whole("max_matching_ngram_size", self.longest)


@dataclass(frozen=True, slots=True)
class DraftModel:
    """What a smaller model of the same tokens draws by the same rules.

    tokens: at most so many are drafted. confidence: none after one that had less than this
    probability in some row. adapts: from one draft to the next two more where all were kept, else
    one fewer (transformers' "heuristic" schedule).
    """

    params: tree.Tree
    spec: ModelSpec
    adapters: tree.Tree = None
    tokens: int = 5
    confidence: float = 0.0
    adapts: bool = False

    def __post_init__(self) -> None:
        _require_whole("num_assistant_tokens", self.tokens)
        p = self.confidence
        if isinstance(p, bool) or not isinstance(p, int | float) or not 0 <= p <= 1:
            raise ArgumentError(f"assistant_confidence_threshold is {p!r}, expected one in 0..1")


Draft = NGrams | DraftModel


def _require_whole(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ArgumentError(f"{name} is {value!r}, expected a whole number from 1")


@dataclass(frozen=True, slots=True)
class Drafted:
    """tokens [b, c]: guesses, -1 from where a row has none. chances [b, c, v] in fp64: what they
    were drawn from; None: nothing was drawn.
    """

    tokens: torch.Tensor
    chances: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows under way, for whoever drafts: ids [b, limit], of which `end` columns are filled and the
    next may be written to; start and real as in `row_scores`; waiting [b] bool: who has not ended.
    """

    ids: torch.Tensor
    end: int
    start: int
    real: torch.Tensor | None
    eos: torch.Tensor
    waiting: torch.Tensor


def by_ngrams(ids: torch.Tensor, how: NGrams, count: int) -> torch.Tensor:
    """ids [b, m], -1 for padding -> up to min(count, how.tokens) guesses a row [b, c], -1: none.

    Of the places where the last tokens stood, the latest that has all the guesses after it, else
    the first.
    """
    b, m = ids.shape
    count = min(count, how.tokens)
    column = torch.arange(m, device=ids.device)
    # After these columns the guesses begin; 0: nowhere yet.
    begin = torch.zeros(b, dtype=torch.int64, device=ids.device)
    for size in range(min(how.longest, m - 1), 0, -1):
        last = ids[:, m - size :]
        grams = ids.unfold(1, size, 1)[:, :-1]
        found = (grams == last[:, None]).all(-1) & (last >= 0).all(-1, keepdim=True)
        after = column[size:]
        whole = found & (after + count <= m)
        latest = torch.where(whole, after, 0).amax(-1)
        first = torch.where(found, after, m).amin(-1) % m
        here = torch.where(latest > 0, latest, first)
        begin = torch.where(begin > 0, begin, here)
    at = begin[:, None] + torch.arange(count, device=ids.device)
    known = (begin > 0)[:, None] & (at < m)
    return ids.gather(1, at.clamp(max=m - 1)).masked_fill(~known, -1)


def passes_of(how: DraftModel, rows: torch.Tensor, real: torch.Tensor | None) -> Passes:
    """What the draft model runs over rows of ids [b, limit] with."""
    cache = kv.empty(
        how.spec,
        len(rows),
        kv.room(1, limit_of(how, rows)),
        padded=real is not None,
        dtype=how.params["embed"]["weight"].dtype,
        device=rows.device,
    )
    # It has not seen the last guess that was kept, and what came after that.
    return Passes(cache, widest=2)


def limit_of(how: DraftModel, rows: torch.Tensor) -> int:
    """How many tokens of rows [b, limit] the draft model may see."""
    return min(rows.shape[1], shared_length(how.spec))


def by_model(
    how: DraftModel,
    passes: Passes,
    rows: Rows,
    count: int,
    sampling: Sampling,
    *,
    vocab: int,
    generator: torch.Generator | None,
    adjust: Adjust | None,
) -> Drafted:
    """Up to `count` guesses a row by the draft model, whose `passes` run on.

    They are drawn by the rules of `sampling`, or the likeliest at temperature 0. What the passes
    have seen beyond `rows` is cut off first. None are drafted where the draft model has no
    positions left, or its rope scaling would change its frequencies.
    """
    ids, end = rows.ids, rows.end
    count = max(0, min(count, shared_length(how.spec) - end))
    if count == 0:
        return Drafted(ids[:, :0])
    passes.cut(end - 1)
    chances = []
    for i in range(count):
        known = ids[:, : end + i].clamp(max=how.spec.vocab - 1)
        logits = passes.run(known, end + i, last=True)[:, 0]
        scores = row_scores(
            _as_wide(logits, vocab),
            ids[:, : end + i],
            sampling,
            start=rows.start,
            real=rows.real,
            eos=rows.eos,
            adjust=adjust,
        )
        ids[:, end + i] = rules.choose(scores, sampling, generator)
        if sampling.temperature > 0:
            chances.append(scores.double().softmax(-1))
        if how.confidence > 0 and not _sure(scores, ids[:, end + i], how, rows.waiting):
            count = i + 1
            break
    return Drafted(ids[:, end : end + count].clone(), torch.stack(chances, 1) if chances else None)


def _sure(
    scores: torch.Tensor, token: torch.Tensor, how: DraftModel, waiting: torch.Tensor
) -> bool:
    """Did every waiting row's token [b] have the probability that is asked for?"""
    p = scores.softmax(-1).gather(-1, token[:, None])[:, 0]
    return bool(((p >= how.confidence) | ~waiting).all())


def _as_wide(logits: torch.Tensor, vocab: int) -> torch.Tensor:
    """Logits over as many ids as the target has: files pad the same vocabulary differently."""
    missing = vocab - logits.shape[-1]
    if missing <= 0:
        return logits[:, :vocab]
    return torch.nn.functional.pad(logits, (0, missing), value=-torch.inf)
