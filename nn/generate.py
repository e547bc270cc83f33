"""Generation: the prompt in one pass, then one token at a time over the key-value cache."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from . import cache as kv
from . import sampling as rules
from . import tree
from .decode import decode, waits_for
from .graph import capture
from .prompt import Prompt, prepared, raise_if_broken, read, so_far, tokens_seen, unpadded
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
    ids are the same. On a GPU the host waits
    for the device every PAUSE tokens where there are eos_ids, to see whether all rows have ended,
    and every token where stop or on_token must know; else nothing waits. Draws come from
    `generator` alone.

    Raises ArgumentError for values that cannot be used; InputError for empty prompts, a mask that
    does not fit, ids outside of the vocabulary, more tokens than the model has positions, and
    logits that are not finite.
    """
    rules.check_generator(sampling, generator)
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
) -> torch.Tensor:
    """The new tokens [b, n] after prompts [b, s]."""
    (batch, start), device, real, eos = prompt.ids.shape, prompt.ids.device, prompt.real, prompt.eos
    end, limit = start, start + max_new_tokens
    ids = prompt.ids.new_full((batch, limit), prompt.pad_id, dtype=torch.int64)
    ids[:, :start] = prompt.ids
    ended = torch.zeros(batch, dtype=torch.bool, device=device)
    broken = torch.zeros_like(ended)
    seen = None
    if sampling.repetition_penalty != 1:
        seen = tokens_seen(unpadded(prompt.ids, real), spec.vocab)

    turns = {rope.original_positions for rope in spec.ropes() if rope.kind == "longrope"}
    logits, cache = read(
        params, spec, prompt.ids, real, limit=limit, adapters=adapters, columns=cache_dtype
    )

    def pick(logits: torch.Tensor) -> None:
        """Choose the tokens of the next column and note which rows they end."""
        scores = row_scores(
            logits,
            ids[:, :end],
            sampling,
            start=start,
            real=real,
            eos=eos,
            adjust=adjust,
            seen=seen,
        )
        if on_scores is not None:
            on_scores(logits, scores)
        top, best = scores.max(-1)
        broken.logical_or_(~(ended | top.isfinite()))
        token.copy_(best if uniform is None else rules.look_up(scores, uniform))
        shown.copy_(torch.where(ended, prompt.pad_id, token))
        ids.index_copy_(1, column, shown[:, None])
        column.add_(1)
        used.add_((~ended).any())
        ended.logical_or_(broken | (token[:, None] == eos).any(-1))
        if seen is not None:
            seen.scatter_(1, token[:, None], True)

    def step() -> None:
        """The tokens of one more column, from those of the last; changes tensors alone."""
        # An ended row goes on with what it drew: a pad id need not be one the model knows.
        logits, longer = decode(params, spec, token, cache, adapters=adapters)
        cache.end.copy_(longer.end)
        pick(logits)

    token = ids.new_zeros(batch)
    shown, column = torch.zeros_like(token), torch.full_like(token[:1], start)
    used = torch.zeros_like(token[0])
    uniform = None
    if sampling.temperature > 0:
        uniform = torch.empty(batch, dtype=torch.float64, device=device)
    can_end = stop is not None or eos.numel() > 0
    on_host = adjust is not None or on_scores is not None or sampling.reads_ids()
    graphs = (
        graphs
        and ids.is_cuda
        and not on_host
        and max_new_tokens >= WORTH_A_GRAPH
        and waits_for(params, spec, adapters) is None
    )
    # Whoever watches the tokens gets none after the end; else a look now and then is enough.
    pause = PAUSE if ids.is_cuda and stop is None and on_token is None else 1
    replay: Callable[[], None] | None = None
    warm = False
    fresh = True
    while True:
        if uniform is not None and generator is not None:
            uniform.copy_(rules.uniforms(batch, generator), non_blocking=True)
        if fresh:
            pick(logits)
            fresh = False
        else:
            if replay is None and graphs and warm:
                replay = capture(step, device)
                graphs = replay is not None
            (replay or step)()
            warm = True
            cache = replace(cache, length=cache.length + 1)
        end += 1
        if end - start == sampling.min_new_tokens:
            replay = None  # ends are allowed from here on
        if on_token is not None:
            on_token(shown.clone())
        if stop is not None:
            ended.logical_or_(stop(ids[:, :end]).to(ended.device))
        if end == limit or (can_end and (end - start) % pause == 0 and bool(ended.all())):
            break
        if end - 1 in turns:
            # Past here LongRoPE has other frequencies: the cached keys were turned by the old.
            replay, fresh = None, True
            whole, mask = so_far(ids[:, :end], real, spec.vocab)
            logits, cache = read(
                params, spec, whole, mask, limit=limit, adapters=adapters, columns=cache_dtype
            )
        elif cache.length == cache.capacity:
            cache, replay = kv.grow(cache, min(limit, cache.capacity + kv.CHUNK)), None
    if can_end and pause > 1:
        end = start + int(used)
    raise_if_broken(broken)
    return ids[:, start:end]
