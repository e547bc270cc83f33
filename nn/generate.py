"""Generation: the prompt in one pass, then one token at a time over the key-value cache."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from functools import partial

import torch

from . import cache as kv
from . import prompt_pass, tree
from . import sampling as rules
from .decode import decode, waits_for
from .graph import capture, replayable
from .kept_steps import KeptSteps, Step, places, with_room
from .prompt import (
    Prompt,
    empty_cache,
    prepared,
    raise_if_broken,
    read,
    so_far,
    tokens_seen,
    unpadded,
)
from .row_scores import Adjust, row_scores
from .sampling import GREEDY, Sampling
from .spec import ModelSpec

# On a GPU the host looks every so many tokens whether all rows have ended.
PAUSE = 16
# Capturing a step costs the host about what running it does.
WORTH_A_GRAPH = 8

Stop = Callable[[torch.Tensor], torch.Tensor]
OnToken = Callable[[torch.Tensor], None]
OnScores = Callable[[torch.Tensor, torch.Tensor], None]


def generate(
    params: tree.Tree,
    spec: ModelSpec,
    tokens: torch.Tensor,
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
    """Prompts tokens [b, s] -> [b, s + n], n <= max_new_tokens, on the device of the params.

    mask [b, s]: 1 real, 0 padding, on either side. A row ends with a token of `eos_ids` or when
    `stop` says so, and is filled with `pad_id` (default: the first of eos_ids, else 0) until all
    have ended. The hooks get ids [b, m], every row's prompt without padding after it (padding, if
    any, stands before) and its answer so far: stop(ids) -> bool [b]; adjust(ids, logits [b, v]) ->
    logits. on_token([b]) gets each step's tokens, on_scores(logits [b, v], scores [b, v]) what the
    model gave and what they were chosen from. cache_dtype: what keys and values are kept in (None:
    the embedding's dtype); e4m3 halves what the cache takes.

    With `graphs` a GPU captures a step as a CUDA graph and replays it, unless adjust, on_scores or
    rules that read the row run on the host between, or the model waits (`decode.waits_for`); the
    ids are the same. `kept` holds the graphs of earlier calls, and then those of this one, with
    their caches: a call like an earlier one captures nothing. On a GPU the host waits for the
    device every PAUSE tokens where there are eos_ids, to see whether all rows have ended, and every
    token where stop or on_token must know; else nothing waits. Draws come from `generator` alone.

    Raises ArgumentError for values that cannot be used, rules' ids outside of the vocabulary too;
    InputError for empty prompts, a mask that does not fit, ids outside of the vocabulary, more
    tokens than the model has positions, and logits that are not finite.
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
        new = _run(
            params,
            spec,
            prompt,
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


def _run(
    params: tree.Tree,
    spec: ModelSpec,
    prompt: Prompt,
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
    (batch, start), device, real = prompt.ids.shape, prompt.ids.device, prompt.real
    end, limit = start, start + max_new_tokens
    ids = prompt.ids.new_full((batch, limit), prompt.pad_id, dtype=torch.int64)
    ids[:, :start] = prompt.ids
    can_end = stop is not None or prompt.eos.numel() > 0
    on_host = adjust is not None or on_scores is not None or sampling.reads_ids()
    may_replay = graphs and replayable(device)
    graphs = (
        may_replay
        and not on_host
        and max_new_tokens >= WORTH_A_GRAPH
        and waits_for(params, spec, adapters) is None
    )
    kind: Hashable = None
    pads = replayable(device) and prompt_pass.covers(params, spec, adapters)
    keeps = kept if may_replay else None
    where = None if keeps is None else places(params, adapters)
    if graphs and kept is not None:
        rules_of_it = sampling, tuple(prompt.eos.tolist()), prompt.pad_id, cache_dtype
        kind = spec, batch, real is None, rules_of_it, where
    turns = {rope.original_positions for rope in spec.ropes() if rope.kind == "longrope"}

    def step_of(capacity: int) -> Step:
        """The kept step of this kind and capacity, or a new one."""
        found = None if kept is None else kept.take(Step, (capacity, kind))
        if found is not None:
            found.begin()
        else:
            found = Step.empty(
                with_room(kept, partial(empty_cache, params, spec, prompt, capacity, cache_dtype)),
                prompt.eos,
                draws=sampling.temperature > 0,
                vocab=spec.vocab if sampling.repetition_penalty != 1 else None,
            )
        return found

    def keep() -> None:
        """What is done with may serve another call."""
        if graphs and kept is not None:
            kept.give((step.cache.capacity, kind), step)

    def pick(step: Step, logits: torch.Tensor) -> None:
        """Choose the tokens of the next column and note which rows they end."""
        scores = row_scores(
            logits,
            ids[:, :end],
            sampling,
            start=start,
            real=real,
            eos=step.eos,
            adjust=adjust,
            seen=step.seen,
        )
        if on_scores is not None:
            on_scores(logits, scores)
        top, best = scores.max(-1)
        ended, token = step.ended, step.token
        step.broken.logical_or_(~(ended | top.isfinite()))
        token.copy_(best if step.uniform is None else rules.look_up(scores, step.uniform))
        step.shown.copy_(torch.where(ended, prompt.pad_id, token))
        step.used.add_((~ended).any())
        ended.logical_or_(step.broken | (token[:, None] == step.eos).any(-1))
        if step.seen is not None:
            step.seen.scatter_(1, token[:, None], True)

    def advance(step: Step) -> None:
        """The tokens of one more column, from those of the last; changes tensors alone."""
        # An ended row goes on with what it drew: a pad id need not be one the model knows.
        logits, longer = decode(params, spec, step.token, step.cache, adapters=adapters)
        step.cache.end.copy_(longer.end)
        pick(step, logits)

    def read_all(ids: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
        """Run rows into the step's cache; the logits of what follows."""
        cache, width = kv.emptied(step.cache), ids.shape[1]
        # Padded alike with graphs and without, so that both give the same to the bit.
        if pads and prompt_pass.fits(spec, batch, width):
            how = {"adapters": adapters, "columns": cache_dtype, "kept": keeps, "where": where}
            logits, longer = prompt_pass.prefill(params, spec, ids, real, cache, **how)
        else:
            logits, longer = read(params, spec, ids, real, cache, adapters=adapters)
        cache.first.copy_(longer.first)
        cache.end.copy_(longer.end)
        step.cache = replace(cache, length=longer.length)
        return logits

    step = step_of(kv.room(start, limit))
    if step.seen is not None:
        step.seen.copy_(tokens_seen(unpadded(prompt.ids, real), spec.vocab))
    logits = read_all(prompt.ids, real)
    # Whoever watches the tokens gets none after the end; else a look now and then is enough.
    pause = PAUSE if ids.is_cuda and stop is None and on_token is None else 1
    warm, fresh = False, True
    while True:
        if step.uniform is not None and generator is not None:
            step.uniform.copy_(rules.uniforms(batch, generator), non_blocking=True)
        if fresh:
            pick(step, logits)
            fresh = False
        else:
            early = end - start < sampling.min_new_tokens
            replay = step.replays.get(early)
            if replay is None and graphs and warm:
                replay = capture(partial(advance, step), device)
                if replay is None:
                    graphs = False
                else:
                    step.replays[early] = replay
            (replay or partial(advance, step))()
            warm = True
            step.cache = replace(step.cache, length=step.cache.length + 1)
        ids[:, end] = step.shown
        end += 1
        if on_token is not None:
            on_token(step.shown.clone())
        if stop is not None:
            step.ended.logical_or_(stop(ids[:, :end]).to(device))
        if end == limit or (can_end and (end - start) % pause == 0 and bool(step.ended.all())):
            break
        if step.cache.length == step.cache.capacity:
            longer = step_of(kv.room(step.cache.capacity, limit))
            longer.go_on(step)
            keep()
            step = longer
        if end - 1 in turns:
            # Past here LongRoPE has other frequencies: the cached keys were turned by the old.
            fresh, logits = True, read_all(*so_far(ids[:, :end], real, spec.vocab))
    if can_end and pause > 1:
        end = start + int(step.used)
    raise_if_broken(step.broken)
    keep()
    return ids[:, start:end]
