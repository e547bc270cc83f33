"""`SamplingParams` by vLLM's names, and the engine's requests that they mean."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from ..errors import ArgumentError
from ..nn.sampling import Sampling
from . import constraint
from .constraint import Constraint
from .engine_request import Request


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How answers are sampled; names, meanings and defaults are vLLM's.

    n: answers to each prompt. temperature 0: greedy. top_k 0 or -1: all. max_tokens None: up to
    the model's context. stop: texts that end an answer and are left out of its text;
    stop_token_ids: tokens that do. ignore_eos: the model's own ends do not. seed: of the draws, the
    i-th answer's is seed + i; None: fresh ones. logprobs: of the chosen token, and of so many of
    the likeliest. bad_words: texts that must not come. structured_outputs: what the
    answer's text keeps to, a `Constraint`, a dict or vLLM's, whose older `guided_decoding` is read
    as the same.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    seed: int | None = None
    logprobs: int | None = None
    logit_bias: dict[int, float] | None = None
    bad_words: Sequence[str] | None = None
    skip_special_tokens: bool = True
    detokenize: bool = True
    structured_outputs: Any = None


# What vLLM's have beyond these, and the values that ask for nothing.
_NOT_HERE: dict[str, tuple[Any, ...]] = {
    "prompt_logprobs": (None,),
    "logits_processors": (None, []),
    "truncate_prompt_tokens": (None,),
    "allowed_token_ids": (None, []),
    "best_of": (None, 1),
    "use_beam_search": (None, False),
}


def read(given: Any) -> SamplingParams:
    """Ours of ours, of vLLM's or another object with such attributes, of a dict, or of None.

    Raises ArgumentError, and NotImplementedError for what vLLM's ask for that is not there.
    """
    if given is None:
        return SamplingParams()
    if isinstance(given, SamplingParams):
        return given
    names = [field.name for field in fields(SamplingParams)]
    if isinstance(given, dict):
        unknown = sorted(set(given) - {*names, "guided_decoding", *_NOT_HERE})
        if unknown:
            raise ArgumentError(f"sampling_params has {unknown}, expected some of {names}")
        found = dict(given)
    else:
        read = (*names, "guided_decoding", *_NOT_HERE)
        found = {n: getattr(given, n) for n in read if hasattr(given, n)}
        if "temperature" not in found:
            raise ArgumentError(
                f"sampling_params is {given!r:.100}, expected purelm's or vLLM's SamplingParams, "
                "or a dict"
            )
    for name, idle in _NOT_HERE.items():
        if found.pop(name, None) not in idle:
            raise NotImplementedError(f"sampling_params' {name} is not implemented yet")
    older = found.pop("guided_decoding", None)
    if older is not None:
        found["structured_outputs"] = older
    return SamplingParams(**found)


def stops(params: SamplingParams) -> tuple[str, ...]:
    """The stop texts; raises ArgumentError."""
    given = params.stop
    if given is None or isinstance(given, str):
        return () if given is None else (given,)
    if not isinstance(given, Sequence):
        raise ArgumentError(f"stop is {given!r}, expected a text or texts")
    return tuple(given)


def requests(
    params: SamplingParams,
    prompt: tuple[int, ...],
    *,
    tokenizer: Any,
    eos_ids: tuple[int, ...],
    longest: int,
) -> list[Request]:
    """The n requests for one prompt; eos_ids: the model's own ends, longest: what fits with the
    answer. Raises ArgumentError.
    """
    if type(params.n) is not int or params.n < 1:
        raise ArgumentError(f"n is {params.n!r}, expected a whole number from 1")
    most = params.max_tokens
    if most is None:
        most = max(1, longest - len(prompt))
    own = () if params.ignore_eos else eos_ids
    wanted: Constraint | None = constraint.read(params.structured_outputs)
    heat, seed, bias = params.temperature, params.seed, params.logit_bias or {}
    # What is no number is said where the values are read.
    greedy = isinstance(heat, int | float) and 0 <= heat < 1e-5
    if not isinstance(bias, Mapping) or not all(_is_id(token) for token in bias):
        raise ArgumentError(
            f"logit_bias is {bias!r:.100}, expected a dict of token ids and numbers"
        )
    sampling = Sampling(
        temperature=0.0 if greedy else heat,
        top_k=max(0, params.top_k),
        top_p=params.top_p,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        min_new_tokens=params.min_tokens,
        sequence_bias=tuple(((int(token),), value) for token, value in bias.items()),
        bad_words_ids=_words(params.bad_words or (), tokenizer),
    )
    return [
        Request(
            prompt,
            most,
            sampling=sampling,
            seed=seed + i if isinstance(seed, int) else seed,
            eos_ids=tuple(dict.fromkeys((*own, *(params.stop_token_ids or ())))),
            stop_strings=stops(params),
            logprobs=params.logprobs,
            constraint=wanted,
        )
        for i in range(params.n)
    ]


def _is_id(token: Any) -> bool:
    """vLLM reads the ids of JSON too, which are texts."""
    return str(token).isdecimal()


def _words(words: Sequence[str], tokenizer: Any) -> tuple[tuple[int, ...], ...]:
    """The tokens of each word, at the beginning of a text and within one."""
    if isinstance(words, str) or not all(isinstance(w, str) and w.strip() for w in words):
        raise ArgumentError(f"bad_words is {words!r}, expected texts, none empty")
    if words and tokenizer is None:
        raise ArgumentError("bad_words needs a tokenizer, and this model carries none")
    found = (
        tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
        for word in words
        for text in (word, " " + word.lstrip())
    )
    return tuple(dict.fromkeys(ids for ids in found if ids))
