"""`model.fast_generate`: many prompts at once through the engine, called as vLLM's `generate`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import ArgumentError, InputError
from . import sampling_params as sp
from .engine_request import Event, Request
from .sampling_params import SamplingParams

if TYPE_CHECKING:
    from .bridge import CausalLM


@dataclass(frozen=True, slots=True)
class Logprob:
    """A token's log-probability under the model, and its text; rank from 1, None where unknown."""

    logprob: float
    rank: int | None
    decoded_token: str | None


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One answer. token_ids: with the end that came; text: without it and without a stop text.

    finish_reason: "stop" or "length"; stop_reason: the stop text or stop token that ended it, None
    for the model's own end. With logprobs: per token the chosen and the likeliest.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None
    stop_reason: int | str | None


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """A prompt and its answers."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = True


def fast_generate(
    model: "CausalLM",
    prompts: Any,
    sampling_params: Any = None,
    use_tqdm: bool = False,
    lora_request: None = None,
) -> list[RequestOutput]:
    """An output for each prompt, in order.

    prompts: a text or texts, token ids or lists of them, {"prompt": text} or {"prompt_token_ids":
    ids}. sampling_params: purelm's or vLLM's `SamplingParams`, a dict with such names, or one of
    these for each prompt (default: vLLM's). The weights are the model's own with the adapters that
    are active, as they are now. use_tqdm changes nothing.

    Raises ArgumentError, InputError, NotImplementedError.
    """
    if model.fast_inference is None:
        raise ArgumentError(
            "fast_generate needs fast_inference=True in from_pretrained; model.generate works in "
            "any case"
        )
    if lora_request is not None:
        raise ArgumentError(
            "lora_request: the active adapters are used as they are now; load others with "
            "model.load_adapter, choose with model.set_adapter"
        )
    engine, tokenizer = model.fast_inference.engine(model), model.tokenizer
    texts = _prompts(prompts, tokenizer)
    many = isinstance(sampling_params, Sequence) and not isinstance(sampling_params, str)
    every = [sp.read(one) for one in (sampling_params if many else [sampling_params] * len(texts))]
    if len(every) != len(texts):
        raise ArgumentError(f"{len(every)} sampling_params for {len(texts)} prompts")
    asked = [
        sp.requests(
            params, ids, tokenizer=tokenizer, eos_ids=engine.eos_ids, longest=engine.longest
        )
        for (_, ids), params in zip(texts, every, strict=True)
    ]
    answers = iter(engine.answers([request for some in asked for request in some]))
    outputs = []
    for i, ((text, ids), params, some) in enumerate(zip(texts, every, asked, strict=True)):
        found = [
            _output(j, next(answers), request, params, tokenizer, engine.eos_ids)
            for j, request in enumerate(some)
        ]
        outputs.append(RequestOutput(str(i), text, list(ids), found))
    return outputs


def _prompts(value: Any, tokenizer: Any) -> list[tuple[str | None, tuple[int, ...]]]:
    """Each prompt's text, where it is one, and its tokens."""

    def ids(one: Any) -> bool:
        return isinstance(one, Sequence) and bool(one) and all(type(i) is int for i in one)

    single = isinstance(value, str | dict) or ids(value)
    found: list[tuple[str | None, tuple[int, ...]]] = []
    for given in [value] if single else value:
        one = given
        if isinstance(one, dict):
            one = one.get("prompt_token_ids") or one.get("prompt")
        if hasattr(one, "tolist"):
            one = one.tolist()
        if isinstance(one, str) and tokenizer is not None:
            found.append((one, tuple(tokenizer(one, verbose=False)["input_ids"])))
        elif ids(one):
            found.append((None, tuple(one)))
        else:
            raise InputError(
                f"a prompt is {given!r:.100}, expected a text (of a model with a tokenizer), a "
                "list of token ids, or a dict with 'prompt' or 'prompt_token_ids'"
            )
    return found


def _output(
    index: int,
    events: list[Event],
    request: Request,
    params: SamplingParams,
    tokenizer: Any,
    eos_ids: tuple[int, ...],
) -> CompletionOutput:
    ids = [event.token for event in events if event.token is not None]
    finish = events[-1].finish
    shown: list[int] = ids
    reason: int | str | None = None
    by_token = finish == "stop" and ids[-1] in (request.eos_ids or ())
    if by_token:
        reason = None if ids[-1] in eos_ids and not params.ignore_eos else ids[-1]
        shown = ids if params.include_stop_str_in_output else ids[:-1]
    text = ""
    if params.detokenize and tokenizer is not None:
        text = tokenizer.decode(shown, skip_special_tokens=params.skip_special_tokens)
    places = [(text.find(stop), stop) for stop in request.stop_strings if stop in text]
    if finish == "stop" and not by_token and places:
        place, reason = min(places)
        text = text[: place + len(reason) if params.include_stop_str_in_output else place]
    logprobs = total = None
    if request.logprobs is not None:
        logprobs = [_logprobs(event, tokenizer) for event in events if event.logprobs is not None]
        total = sum(event.logprobs.logprob for event in events if event.logprobs is not None)
    return CompletionOutput(index, text, ids, total, logprobs, finish, reason)


def _logprobs(event: Event, tokenizer: Any) -> dict[int, Logprob]:
    assert event.logprobs is not None and event.token is not None

    def one(token: int, value: float, rank: int | None) -> Logprob:
        return Logprob(value, rank, None if tokenizer is None else tokenizer.decode([token]))

    top = {t: one(t, v, i) for i, (t, v) in enumerate(event.logprobs.top, 1)}
    chosen = {event.token: one(event.token, event.logprobs.logprob, None)}
    return {**chosen, **top}
