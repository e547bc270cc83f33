"""A request to the engine, what it is told, and where it stands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import ArgumentError, InputError
from ..nn import sample_rows
from ..nn import sampling as rules
from ..nn.blocks import Name
from ..nn.sampling import GREEDY, Sampling
from .constraint import Constraint
from .grammar import Follower, Grammar
from .stop_strings import stop_strings as stop_at


@dataclass(frozen=True, slots=True)
class Request:
    """prompt: token ids. It ends after max_new_tokens, with a token of eos_ids (None: all that the
    model's files name), or with the token that completes one of stop_strings in the answer.
    seed: of its draws (None: a fresh one). logprobs: also give each token's log-probability under
    the model, and those of so many of the likeliest. constraint: what the answer's text keeps to.
    Raises ArgumentError.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = GREEDY
    seed: int | None = None
    eos_ids: tuple[int, ...] | None = None
    stop_strings: tuple[str, ...] = ()
    logprobs: int | None = None
    constraint: Constraint | None = None

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 1), ("logprobs", 0)):
            value = getattr(self, name)
            if name == "logprobs" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ArgumentError(f"{name} is {value!r}, expected a whole number from {least}")
        for name, kind, wanted in (
            ("prompt", int, "token ids"),
            ("eos_ids", int, "token ids or None"),
            ("stop_strings", str, "texts"),
        ):
            value = getattr(self, name)
            if name == "eos_ids" and value is None:
                continue
            if not isinstance(value, tuple | list) or any(type(one) is not kind for one in value):
                raise ArgumentError(f"{name} is {value!r:.100}, expected a tuple of {wanted}")
        seeded = isinstance(self.seed, int) and -(2**63) <= self.seed < 2**64
        if self.seed is not None and not seeded:
            raise ArgumentError(f"seed is {self.seed!r}, expected a whole number of 64 bits")
        if self.constraint is not None and not isinstance(self.constraint, Constraint):
            raise ArgumentError(f"constraint is {self.constraint!r:.100}, expected a Constraint")


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
    """A request under way; ids: its prompt and answer.

    blocks: what it holds of the cache, of which the first `known` held its tokens before; content:
    which weights those are of; names: of the blocks of its prompt, once they were asked for.
    launched: how many tokens were begun. guesser: of tokens to come, once they were guessed.
    """

    id: int
    request: Request
    eos: tuple[int, ...]
    generator: torch.Generator
    stop: Callable[[torch.Tensor], torch.Tensor] | None
    follower: Follower | None = None
    ids: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    known: int = 0
    content: int = 0
    names: list[Name] | None = None
    launched: int = 0
    ended: bool = False
    guesser: Any = None
    _drawn: list[float] = field(default_factory=list)

    @classmethod
    def start(
        cls, id: int, request: Request, eos: tuple[int, ...], tokenizer: Any, vocab: int
    ) -> Running:
        """Raises ArgumentError for stop strings and constraints that cannot be used."""
        generator = torch.Generator()
        if request.seed is None:
            generator.seed()
        else:
            generator.manual_seed(request.seed)
        strings = request.stop_strings
        stop = stop_at(strings, tokenizer) if strings else None
        follower = None
        if request.constraint is not None:
            follower = Follower(Grammar(request.constraint, tokenizer, vocab, eos))
        return cls(id, request, eos, generator, stop, follower, list(request.prompt))

    @property
    def answered(self) -> int:
        return len(self.ids) - len(self.request.prompt)

    def draw(self) -> float:
        """The number that its next token is drawn by."""
        self.draws(1)
        return self._drawn.pop()

    def draws(self, count: int) -> list[float]:
        """The numbers that its next tokens will be drawn by."""
        while len(self._drawn) < count:  # they are the same, drawn one by one or at once
            self._drawn[:0] = rules.uniforms(32, self.generator).tolist()[::-1]
        return self._drawn[: -count - 1 : -1]

    def on_host(self) -> bool:
        """Whether its next token is chosen by `next_token`, which waits for the logits."""
        least = self.request.sampling.min_new_tokens if self.eos else 0
        return not self._known_to_device() or self.launched < least

    def rules(self) -> sample_rows.Rules:
        """What `sample_rows.choose` must run for its next token."""
        needs = sample_rows.asked(self.device_sampling()) or frozenset()
        return needs - {"draw"} if self.on_host() else needs

    def device_sampling(self) -> Sampling:
        """Its sampling as far as the device knows it: greedy, where the host chooses them all."""
        return self.request.sampling if self._known_to_device() else GREEDY

    def _known_to_device(self) -> bool:
        sampling = self.request.sampling
        needs = sample_rows.asked(sampling)
        if needs is None or self.follower is not None or self.request.logprobs is not None:
            return False
        # Tokens that the host chose are not noted there.
        return not (sampling.min_new_tokens and self.eos and needs & {"seen", "counts"})

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
        return rules.scores(
            logits,
            sampling,
            seen=seen,
            ids=ids,
            start=start,
            banned=banned,
            adjust=None if self.follower is None else self._constrained,
        )

    def _constrained(self, scores: torch.Tensor) -> torch.Tensor:
        """Of the scores [1, v], those of tokens that the constraint allows."""
        assert self.follower is not None
        allowed = self.follower.allowed(self.ids[len(self.request.prompt) :])
        self.follower.turn()
        if allowed is None:
            return scores
        return scores.masked_fill(~allowed.to(scores.device), -torch.inf)

    def take(self, token: int, logprobs: TokenLogprobs | None = None) -> Event:
        """Note the next token, and whether it is the last."""
        self.ids.append(token)
        answered, finish = self.answered, None
        if token in self.eos:
            finish = "stop"
        elif self.stop is not None:
            answer = torch.tensor([self.ids[len(self.request.prompt) :]])
            finish = "stop" if bool(self.stop(answer)) else None
        if finish is None and answered == self.request.max_new_tokens:
            finish = "length"
        return Event(self.id, token, finish, logprobs)


def next_token(running: Running, logits: torch.Tensor) -> Event:
    """Choose the next token of one row from its logits [1, v]."""
    try:
        request, device = running.request, logits.device
        scores = running.scores(logits)
        if not bool(scores.amax().isfinite()):
            raise not_finite()
        if request.sampling.temperature == 0:
            chosen = scores.argmax(-1)
        else:
            uniform = torch.tensor([running.draw()], dtype=torch.float64, device=device)
            chosen = rules.look_up(scores, uniform)
        logprobs = None
        if request.logprobs is not None:
            logprobs = TokenLogprobs.of(logits, chosen, request.logprobs)
        return running.take(int(chosen), logprobs)
    except (RuntimeError, ValueError, IndexError) as problem:
        return failed(running, problem)


def next_tokens(group: Sequence[Running], logits: torch.Tensor) -> list[Event]:
    """`next_token` of each row of logits [b, v], waiting once for all that take the likeliest."""
    plain = [not running.on_host() and not running.rules() for running in group]
    found: list[int | None] = [None] * len(group)
    if sum(plain) > 1:
        with suppress(RuntimeError):  # of too little memory: one by one takes less
            likeliest = _likeliest(logits)
            found = [i if own and i >= 0 else None for i, own in zip(likeliest, plain, strict=True)]
    return [
        next_token(running, logits[at : at + 1]) if token is None else _taken(running, token)
        for at, (running, token) in enumerate(zip(group, found, strict=True))
    ]


def _likeliest(logits: torch.Tensor) -> list[int]:
    """Of each row, -1 where none is finite."""
    top, best = logits.float().max(-1)
    return torch.where(top.isfinite(), best, -1).tolist()


def _taken(running: Running, token: int) -> Event:
    try:
        return running.take(token)
    except (RuntimeError, ValueError, IndexError) as problem:
        return failed(running, problem)


def failed(running: Running, problem: Exception) -> Event:
    """The last event of a request that met a problem."""
    return Event(running.id, None, "error", error=problem)


def not_finite() -> InputError:
    """What a request is told whose next token cannot be chosen."""
    return InputError(
        "the model's logits for this request are not finite, or its rules leave no token"
    )
