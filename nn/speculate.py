"""Speculative decoding: guesses verified several at once, with exactly the target's distribution.

Leviathan et al. 2023 (arXiv 2211.17192), over a batch: every row goes on by as many tokens as the
row that keeps fewest, so that all rows end at one column. A row's later guesses are dropped before
they are looked at, so each row still has the distribution it has alone.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from ..errors import ArgumentError
from . import cache as kv
from . import sampling as rules
from . import tree
from .draft import (
    Draft,
    Drafted,
    DraftModel,
    NGrams,
    Rows,
    by_model,
    by_ngrams,
    limit_of,
    passes_of,
)
from .generate import OnScores, OnToken, Stop
from .kept_steps import KeptSteps, places, with_room
from .pages import shared_length
from .passes import Passes
from .prompt import Prompt, empty_cache, prepared, raise_if_broken, unpadded
from .row_scores import Adjust, row_scores
from .sampling import GREEDY, Sampling
from .spec import ModelSpec


def speculate(
    params: tree.Tree,
    spec: ModelSpec,
    tokens: torch.Tensor,
    draft: Draft,
    *,
    max_new_tokens: int,
    mask: torch.Tensor | None = None,
    adapters: tree.Tree = None,
    sampling: Sampling = GREEDY,
    eos_ids: Sequence[int] = (),
    pad_id: int | None = None,
    generator: torch.Generator | None = None,
    adjust: Adjust | None = None,
    on_token: OnToken | None = None,
    stop: Stop | None = None,
    on_scores: OnScores | None = None,
    cache_dtype: torch.dtype | None = None,
    graphs: bool = True,
    kept: KeptSteps | None = None,
) -> torch.Tensor:
    """Prompts tokens [b, s] -> [b, s + n], n <= max_new_tokens, as `generate.generate` gives them.

    At temperature 0 the ids are those of `generate`; sampled ones have the same distribution, from
    other draws. The arguments and errors are those of `generate`; the hooks are called for every
    token that is kept. A `draft` is verified in one pass over its tokens, which with `graphs` a GPU
    captures and replays, where no model waits (`decode.waits_for`); `kept` as for `generate`.

    Raises ArgumentError too for models with recurrent layers, whose states cannot go back, and
    where a rope scaling would change its frequencies on the way.
    """
    rules.check_generator(sampling, generator)
    rules.check_ids(sampling, spec.vocab)
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
        _check_model(spec, draft, prompt.ids.shape[1] + max_new_tokens)
        new = _run(
            params,
            spec,
            prompt,
            draft,
            adapters=adapters,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            generator=generator,
            adjust=adjust,
            on_token=on_token,
            stop=stop,
            on_scores=on_scores,
            cache_dtype=cache_dtype,
            graphs=graphs,
            kept=kept,
        )
    # Outside of inference mode, so that training may use the result.
    return torch.cat([tokens.to(new.device), new], 1)


def _check_model(spec: ModelSpec, draft: Draft, longest: int) -> None:
    specs = [("the model", spec)]
    if isinstance(draft, DraftModel):
        specs.append(("the draft model", draft.spec))
    for name, one in specs:
        check_states(name, one)
    most = shared_length(spec)
    if longest > most:
        raise ArgumentError(
            f"{longest} tokens are more than the {most} up to which the model's rope scaling keeps "
            "its frequencies; generate so long an answer without speculation"
        )


def check_states(name: str, spec: ModelSpec) -> None:
    """Raise ArgumentError for a model that cannot take back what it has seen."""
    if any(layer.recurrent is not None for layer in spec.layers):
        raise ArgumentError(
            f"{name} has recurrent layers, whose states cannot go back to before a guess that "
            "was wrong; generate without speculation"
        )


def _run(
    params: tree.Tree,
    spec: ModelSpec,
    prompt: Prompt,
    draft: Draft,
    *,
    adapters: tree.Tree,
    max_new_tokens: int,
    sampling: Sampling,
    generator: torch.Generator | None,
    adjust: Adjust | None,
    on_token: OnToken | None,
    stop: Stop | None,
    on_scores: OnScores | None,
    cache_dtype: torch.dtype | None,
    graphs: bool,
    kept: KeptSteps | None,
) -> torch.Tensor:
    """The new tokens [b, n] after prompts [b, s]."""
    (batch, start), device, real, eos = prompt.ids.shape, prompt.ids.device, prompt.real, prompt.eos
    end, limit = start, start + max_new_tokens
    shown = prompt.ids.new_full((batch, limit), prompt.pad_id, dtype=torch.int64)
    shown[:, :start] = prompt.ids
    # Ended rows go on with what they drew: a pad id need not be one that the models know.
    ids = shown.clone()
    ended = torch.zeros(batch, dtype=torch.bool, device=device)
    broken = torch.zeros_like(ended)
    can_end = stop is not None or eos.numel() > 0
    capacity = kv.room(start, limit)
    how: tuple[Any, ...] = batch, real is None, draft.tokens, cache_dtype
    key = capacity, spec, places(params, adapters), *how
    passes = None if kept is None else kept.take(Passes, key)
    if passes is None:
        made = partial(empty_cache, params, spec, prompt, capacity, cache_dtype)
        passes = Passes(with_room(kept, made), widest=draft.tokens + 1)
    passes.begin(params, spec, real, limit=limit, adapters=adapters, graphs=graphs)
    guessing, draft_key = None, None
    if isinstance(draft, DraftModel):
        most = limit_of(draft, ids)
        draft_key = kv.room(1, most), draft.spec, places(draft.params, draft.adapters), *how
        guessing = None if kept is None else kept.take(Passes, draft_key)
        guessing = guessing or passes_of(draft, ids, real)
        drafting: dict[str, Any] = {"adapters": draft.adapters, "graphs": graphs}
        guessing.begin(draft.params, draft.spec, real, limit=most, **drafting)

    def keep() -> None:
        """What was captured may serve another call; not over caches that have grown."""
        for at, one in ((key, passes), (draft_key, guessing)):
            if one is not None:
                one.end()
                if kept is not None and at is not None and one.cache.capacity == at[0]:
                    kept.give(at, one)

    ahead, drafted = passes.run(ids, start, last=True), Drafted(ids[:, :0])
    wanted = draft.tokens
    rules_of_rows: dict[str, Any] = {"start": start, "real": real, "eos": eos, "adjust": adjust}
    while True:
        scores = _scores(ahead, ids, end, sampling, **rules_of_rows)
        taken = accepted(scores, drafted, sampling, generator, waiting=~ended)
        for i in range(taken.shape[1]):
            token = taken[:, i]
            ids[:, end], shown[:, end] = token, torch.where(ended, prompt.pad_id, token)
            broken |= ~(ended | scores[:, i].amax(-1).isfinite())
            ended |= broken | (token[:, None] == eos).any(-1)
            if on_scores is not None:
                on_scores(ahead[:, i], scores[:, i])
            if on_token is not None:
                on_token(shown[:, end].clone())
            end += 1
            if stop is not None:
                ended |= stop(shown[:, :end]).to(device)
            if end == limit or (can_end and bool(ended.all())):
                raise_if_broken(broken)
                keep()
                return shown[:, start:end]
        if isinstance(draft, DraftModel) and draft.adapts and drafted.tokens.shape[1]:
            right = taken.shape[1] > drafted.tokens.shape[1]
            wanted = wanted + 2 if right else max(1, wanted - 1)
            if wanted >= passes.widest:  # by so much that it is seldom captured anew
                passes.widest = 2 * wanted
        # What the last step saw after the tokens that were kept has not been.
        passes.cut(end - 1)
        most = limit - end - 1
        if guessing is None:
            assert isinstance(draft, NGrams)
            drafted = Drafted(by_ngrams(unpadded(ids[:, :end], real), draft, most))
        else:
            assert isinstance(draft, DraftModel)
            drafted = by_model(
                draft,
                guessing,
                Rows(ids, end, start, real, eos, ~ended),
                min(most, wanted),
                sampling,
                vocab=spec.vocab,
                generator=generator,
                adjust=adjust,
            )
        drafted = _narrowed(drafted, ~ended)
        guesses = drafted.tokens.shape[1]
        ids[:, end : end + guesses] = drafted.tokens
        ahead = passes.run(ids, end + guesses)


def _scores(
    ahead: torch.Tensor,
    ids: torch.Tensor,
    end: int,
    sampling: Sampling,
    *,
    start: int,
    real: torch.Tensor | None,
    eos: torch.Tensor,
    adjust: Adjust | None,
) -> torch.Tensor:
    """What each of the next columns is chosen from: logits ahead [b, c, v] of what follows columns
    end - 1, end ... of ids -> scores [b, c, v], fp32.
    """
    reads = sampling.reads_ids() or sampling.repetition_penalty != 1 or adjust is not None
    if not reads and end - start >= sampling.min_new_tokens:
        flat = row_scores(
            ahead.flatten(0, 1), ids[:, :end], sampling, start=start, real=None, eos=eos
        )
        return flat.view(ahead.shape)
    columns = [
        row_scores(
            ahead[:, i],
            ids[:, : end + i],
            sampling,
            start=start,
            real=real,
            eos=eos,
            adjust=adjust,
        )
        for i in range(ahead.shape[1])
    ]
    return torch.stack(columns, 1)


def _narrowed(drafted: Drafted, waiting: torch.Tensor) -> Drafted:
    """Without the columns that some waiting row has no guess for: no row would get past them.

    What is left are ids in every row, of ended ones too.
    """
    some = (drafted.tokens >= 0) | ~waiting[:, None]
    width = int(some.all(0).long().cumprod(0).sum())
    chances = None if drafted.chances is None else drafted.chances[:, :width]
    return Drafted(drafted.tokens[:, :width].clamp(min=0), chances)


def accepted(
    scores: torch.Tensor,
    drafted: Drafted,
    sampling: Sampling,
    generator: torch.Generator | None,
    *,
    waiting: torch.Tensor,
) -> torch.Tensor:
    """The tokens [b, m + 1] that every row goes on by, of scores [b, c + 1, v] and c guesses a row.

    Scores at column i are what the target draws from after i guesses. m: how many guesses the row
    of `waiting` [b] bool keeps that keeps fewest. A guess x drawn from q is kept with probability
    min(1, p(x) / q(x)); in place of the first that is not, one is drawn from max(0, p - q); where
    all are kept, one more from p. At temperature 0 a guess is kept if it is the likeliest token.
    """
    guesses = drafted.tokens.shape[1]
    if sampling.temperature == 0:
        best = scores.argmax(-1)
        kept = best[:, :guesses] == drafted.tokens
        return best[:, : _fewest(kept, waiting) + 1]
    rules.check_generator(sampling, generator)
    assert generator is not None
    batch, device = len(scores), scores.device
    p, q = scores.double().softmax(-1), drafted.chances
    if q is None:
        # A guess that was not drawn was certain.
        q = torch.zeros_like(p[:, :guesses])
        q.scatter_(2, drafted.tokens[..., None], 1.0)
    at = drafted.tokens[..., None]
    draws = rules.uniforms(batch * (guesses + 1), generator).view(batch, -1)
    draws = draws.to(device, non_blocking=True)
    kept = draws[:, :guesses] * q.gather(2, at)[..., 0] < p[:, :guesses].gather(2, at)[..., 0]
    m = _fewest(kept, waiting)
    if m == guesses:
        last = rules.look_up(p[:, m].log(), draws[:, -1])
    else:
        other = rules.look_up((p[:, m] - q[:, m]).clamp(min=0).log(), draws[:, -1])
        last = torch.where(kept[:, : m + 1].all(-1), drafted.tokens[:, m], other)
    return torch.cat([drafted.tokens[:, :m], last[:, None]], 1)


def _fewest(kept: torch.Tensor, waiting: torch.Tensor) -> int:
    """How many of kept [b, c] the waiting row keeps that keeps fewest, up to its first False."""
    return int((kept | ~waiting[:, None]).long().cumprod(-1).sum(-1).amin())
