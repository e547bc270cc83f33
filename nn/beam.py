"""Beam search: the likeliest answers, several kept on the way (transformers' `_beam_search`).

At every step the continuations of all of a prompt's beams compete. The best that do not end go on
as beams; of those among the first that end, the best by score over length**penalty are kept.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch

from ..errors import ArgumentError
from . import cache as kv
from . import tree
from .decode import decode
from .generate import OnScores, Stop
from .prompt import Prompt, empty_cache, prepared, raise_if_broken, read, so_far
from .row_scores import Adjust, row_scores
from .sampling import GREEDY, Sampling, check_ids
from .spec import ModelSpec

# Lower than any score, as transformers has it, so that sums with it round alike.
NEVER = -1e9


@dataclass(frozen=True, slots=True)
class BeamSearch:
    """beams: how many are kept. answers: how many of a prompt's are given out, best first.

    length_penalty: scores are divided by length**it. early_stopping: True ends a prompt's search
    with `beams` ended answers, False once the best beam, were it to end now, would not beat the
    worst of them, "never" once it could not at the greatest length either. renormalize: what the
    rules leave of a step's probabilities is made to sum to 1 again. Raises ArgumentError.
    """

    beams: int
    answers: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    renormalize: bool = False

    def __post_init__(self) -> None:
        for name, value in (("num_beams", self.beams), ("num_return_sequences", self.answers)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ArgumentError(f"{name} is {value!r}, expected a whole number from 1")
        if self.answers > self.beams:
            raise ArgumentError(
                f"num_return_sequences is {self.answers}, more than the num_beams of {self.beams}"
            )
        penalty = self.length_penalty
        number = isinstance(penalty, int | float) and not isinstance(penalty, bool)
        if not number or not math.isfinite(penalty):
            raise ArgumentError(f"length_penalty is {penalty!r}, expected a finite number")
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise ArgumentError(
                f"early_stopping is {self.early_stopping!r}, expected True, False or 'never'"
            )


@dataclass(frozen=True, slots=True)
class Found:
    """The answers of a search, `answers` rows for each prompt, best first.

    sequences [b * answers, s + n], filled up after their ends; scores [b * answers] in fp32, over
    length**penalty; rows [b * answers, n]: of which row of the batch of beams (b * beams of them)
    each token is a continuation, -1 after the end.
    """

    sequences: torch.Tensor
    scores: torch.Tensor
    rows: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Beams:
    """n beams of every prompt: ids [b, n, limit], scores and ended [b, n], rows [b, n, new]."""

    ids: torch.Tensor
    scores: torch.Tensor
    ended: torch.Tensor
    rows: torch.Tensor

    def take(self, index: torch.Tensor) -> "_Beams":
        """The beams at index [b, k] of each prompt."""

        def taken(x: torch.Tensor) -> torch.Tensor:
            wide = index.reshape(*index.shape, *[1] * (x.ndim - 2))
            return torch.take_along_dim(x, wide, 1)

        return _Beams(*(taken(getattr(self, f.name)) for f in fields(self)))

    def and_(self, other: "_Beams") -> "_Beams":
        """Both, side by side."""
        pairs = ((getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return _Beams(*(torch.cat(pair, 1) for pair in pairs))


def search(
    params: tree.Tree,
    spec: ModelSpec,
    tokens: torch.Tensor,
    how: BeamSearch,
    *,
    max_new_tokens: int,
    mask: torch.Tensor | None = None,
    adapters: tree.Tree = None,
    sampling: Sampling = GREEDY,
    eos_ids: Sequence[int] = (),
    pad_id: int | None = None,
    adjust: Adjust | None = None,
    stop: Stop | None = None,
    on_scores: OnScores | None = None,
    cache_dtype: torch.dtype | None = None,
) -> Found:
    """Prompts tokens [b, s] -> `how.answers` answers each.

    The arguments and errors are those of `generate.generate`; the rules of `sampling`, which must
    have temperature 0, adjust log-probabilities. on_scores gets, for all beams, the logits
    [b * beams, v] and the adjusted log-probabilities.
    """
    check_ids(sampling, spec.vocab)
    if sampling.temperature > 0:
        raise ArgumentError("beams are searched, not sampled: the temperature must be 0")
    with torch.inference_mode():
        prompt = prepared(
            params,
            spec,
            tokens,
            mask,
            max_new_tokens=max_new_tokens,
            eos_ids=eos_ids,
            pad_id=pad_id,
        )
        best = _run(
            params,
            spec,
            prompt,
            how,
            adapters=adapters,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            adjust=adjust,
            stop=stop,
            on_scores=on_scores,
            cache_dtype=cache_dtype,
        )
        rows = best.rows[:, : how.answers].flatten(0, 1)
        length = int((rows >= 0).sum(-1).max())
        new = best.ids[:, : how.answers, prompt.ids.shape[1] :].flatten(0, 1)[:, :length]
        scores = best.scores[:, : how.answers].flatten()
    # Outside of inference mode, so that training may use the result.
    given = tokens.to(new.device).repeat_interleave(how.answers, 0)
    return Found(torch.cat([given, new], 1), scores.clone(), rows[:, :length].clone())


def _run(
    params: tree.Tree,
    spec: ModelSpec,
    prompt: Prompt,
    how: BeamSearch,
    *,
    adapters: tree.Tree,
    max_new_tokens: int,
    sampling: Sampling,
    adjust: Adjust | None,
    stop: Stop | None,
    on_scores: OnScores | None,
    cache_dtype: torch.dtype | None,
) -> _Beams:
    """The ended answers of each prompt [b, s], best first."""
    (batch, start), n, device = prompt.ids.shape, how.beams, prompt.ids.device
    real, eos = prompt.real, prompt.eos
    end, limit = start, start + max_new_tokens
    each = torch.arange(batch, device=device).repeat_interleave(n)
    wide_real = None if real is None else real[each]
    running = _started(prompt, how, max_new_tokens)
    finished = replace(running, scores=torch.full_like(running.scores, NEVER))
    # Only the first may be given out; the others see to it that n go on, whichever end.
    width = max(2, 1 + eos.numel()) * n
    open_ = torch.ones(batch, 1, dtype=torch.bool, device=device)
    turns = {rope.original_positions for rope in spec.ropes() if rope.kind == "longrope"}
    cache = empty_cache(params, spec, prompt, kv.room(start, limit), cache_dtype)
    logits, cache = read(params, spec, prompt.ids, real, cache, adapters=adapters)
    logits, cache = logits[each], kv.select(cache, each)
    while True:
        ids = running.ids[:, :, :end].flatten(0, 1)
        log_p = logits.float().log_softmax(-1)
        scores = row_scores(
            log_p, ids, sampling, start=start, real=wide_real, eos=eos, adjust=adjust
        )
        if how.renormalize:
            scores = scores.log_softmax(-1)
        if on_scores is not None:
            on_scores(logits, scores)
        total = (scores.view(batch, n, -1) + running.scores[..., None]).flatten(1)
        raise_if_broken(open_[:, 0] & ~total.amax(-1).isfinite())
        best, index = total.topk(min(width, total.shape[1]))
        parent, token = index // scores.shape[-1], index % scores.shape[-1]
        grown = running.take(parent)
        grown.ids[:, :, end] = token
        grown.rows[:, :, end - start] = parent + n * torch.arange(batch, device=device)[:, None]
        end += 1
        ended = (token[..., None] == eos).any(-1) | (end == limit)
        if stop is not None:
            ended |= stop(grown.ids[:, :, :end].flatten(0, 1)).to(device).view_as(ended)
        grown = replace(grown, scores=best + ended.float() * NEVER)
        running = grown.take(grown.scores.topk(n).indices)
        done = replace(grown, scores=best, ended=ended)
        finished = _kept(finished, done, open_, how, end - start)
        open_ = open_ & _may_improve(running, finished, how, end - start, max_new_tokens)
        full = how.early_stopping is True and bool(finished.ended.all())
        if full or not bool(open_.any()) or bool(ended.all()):
            return finished
        if cache.length == cache.capacity:
            cache = kv.grow(cache, kv.room(cache.capacity, limit))
        if end - 1 in turns:
            # Past here LongRoPE has other frequencies: the cached keys were turned by the old.
            whole, mask = so_far(running.ids[:, :, :end].flatten(0, 1), wide_real, spec.vocab)
            cache = kv.emptied(cache)
            logits, cache = read(params, spec, whole, mask, cache, adapters=adapters)
            continue
        parents = running.rows[:, :, end - 1 - start].flatten()
        if not torch.equal(parents, torch.arange(batch * n, device=device)):
            cache = kv.select(cache, parents)
        last = running.ids[:, :, end - 1].flatten()
        logits, cache = decode(params, spec, last, cache, adapters=adapters)


def _started(prompt: Prompt, how: BeamSearch, new: int) -> _Beams:
    """n beams of each prompt [b, s], of which one competes: they are all equal."""
    (batch, start), n = prompt.ids.shape, how.beams
    ids = prompt.ids.new_full((batch, n, start + new), prompt.pad_id, dtype=torch.int64)
    ids[:, :, :start] = prompt.ids[:, None]
    scores = torch.zeros(batch, n, device=ids.device)
    scores[:, 1:] = NEVER
    ended = torch.zeros_like(scores, dtype=torch.bool)
    return _Beams(ids, scores, ended, torch.full_like(ids[:, :, start:], -1))


def _kept(
    finished: _Beams, grown: _Beams, open_: torch.Tensor, how: BeamSearch, length: int
) -> _Beams:
    """The best answers among those kept and the first `beams` of `grown` that have ended."""
    first = torch.arange(grown.ended.shape[1], device=grown.ended.device) < how.beams
    ended = grown.ended & first
    scores = grown.scores / float(length**how.length_penalty)
    if how.early_stopping is True:
        scores = scores + finished.ended.all(-1, keepdim=True).float() * NEVER
    scores = scores + (~open_).float() * NEVER
    scores = scores + (~ended).float() * NEVER
    both = finished.and_(replace(grown, scores=scores, ended=ended))
    return both.take(both.scores.topk(how.beams).indices)


def _may_improve(
    running: _Beams, finished: _Beams, how: BeamSearch, length: int, longest: int
) -> torch.Tensor:
    """Could the best running beam of a prompt still be kept, as `early_stopping` sees it: [b, 1]"""
    if how.early_stopping == "never" and how.length_penalty > 0:
        length = longest
    best = running.scores[:, :1] / float(length**how.length_penalty)
    worst = finished.scores.amin(-1, keepdim=True)
    return (best > torch.where(finished.ended, worst, NEVER)).any(-1, keepdim=True)
