"""A request to the engine, what it is told, and where it stands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from .convert.stop_strings import stop_strings as stop_at
from .errors import ArgumentError
from .nn import sampling as rules
from .nn.sampling import GREEDY, Sampling


@dataclass(frozen=True, slots=True)
class Request:
    """prompt: token ids. It ends after max_new_tokens, with a token of eos_ids (None: all that the
    model's files name), or with the token that completes one of stop_strings in the answer.
    seed: of its draws (None: a fresh one). logprobs: also give each token's log-probability under
    the model, and those of so many of the likeliest. Raises ArgumentError.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = GREEDY
    seed: int | None = None
    eos_ids: tuple[int, ...] | None = None
    stop_strings: tuple[str, ...] = ()
    logprobs: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 1), ("logprobs", 0)):
            value = getattr(self, name)
            if name == "logprobs" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ArgumentError(f"{name} is {value!r}, expected a whole number from {least}")


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """logprob: of the chosen token; top: the likeliest tokens with theirs, best first."""

    logprob: float
    top: tuple[tuple[int, float], ...]

    @classmethod
    def of(cls, logits: torch.Tensor, chosen: torch.Tensor, count: int) -> TokenLogprobs:
        """From the model's logits [1, v] and the chosen token [1]."""
        own = float(rules.logprobs(logits, chosen))
        best = logits[0].float().log_softmax(-1).topk(min(count, logits.shape[-1]))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return cls(own, tuple(pairs))


@dataclass(frozen=True, slots=True)
class Event:
    """A new token of request `id`, its end, or both.

    finish: None while it goes on; "stop" (an end token or a stop string), "length", "cancelled" or
    "error", whose exception is `error`.
    """

    id: int
    token: int | None
    finish: str | None = None
    logprobs: TokenLogprobs | None = None
    error: Exception | None = None


@dataclass(eq=False, slots=True)
class Running:
    """A request under way; ids: its prompt and answer."""

    id: int
    request: Request
    eos: tuple[int, ...]
    generator: torch.Generator
    stop: Callable[[torch.Tensor], torch.Tensor] | None
    ids: list[int] = field(default_factory=list)

    @classmethod
    def start(cls, id: int, request: Request, eos: tuple[int, ...], tokenizer: Any) -> Running:
        """Raises ArgumentError for stop strings that cannot be used."""
        generator = torch.Generator()
        if request.seed is None:
            generator.seed()
        else:
            generator.manual_seed(request.seed)
        strings = request.stop_strings
        stop = stop_at(strings, tokenizer) if strings else None
        return cls(id, request, eos, generator, stop, list(request.prompt))

    @property
    def answered(self) -> int:
        return len(self.ids) - len(self.request.prompt)

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        """What the next token is chosen from, of the model's logits [1, v]."""
        sampling, device = self.request.sampling, logits.device
        needs_seen = sampling.repetition_penalty != 1
        ids = seen = banned = None
        if needs_seen or sampling.reads_ids():
            ids = torch.tensor([self.ids], device=device)
        if needs_seen and ids is not None:
            seen = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, ids, True)
        if self.eos and self.answered < sampling.min_new_tokens:
            banned = torch.tensor(self.eos, device=device)
        start = len(self.request.prompt)
        return rules.scores(logits, sampling, seen=seen, ids=ids, start=start, banned=banned)

    def take(self, token: int, logprobs: TokenLogprobs | None) -> Event:
        """Note the next token, and whether it is the last."""
        self.ids.append(token)
        answer = self.ids[len(self.request.prompt) :]
        finish = None
        if token in self.eos or (self.stop is not None and bool(self.stop(torch.tensor([answer])))):
            finish = "stop"
        elif len(answer) == self.request.max_new_tokens:
            finish = "length"
        return Event(self.id, token, finish, logprobs)
