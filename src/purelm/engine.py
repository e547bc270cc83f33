"""Continuous batching: requests come and go while the others are decoded."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence

import torch

from .convert.bridge import CausalLM
from .convert.end_ids import end_ids
from .convert.tokenizer import Tokenizer
from .engine_request import Event, Request, Running, TokenLogprobs
from .errors import ArgumentError, BusyError, InputError
from .nn import sampling as rules
from .nn import slots
from .nn.slots import Rows


class Engine:
    """Answers many requests at once on one model.

    slots: how many rows are decoded together. max_queue: how many requests may wait beyond those.
    Every request gets the tokens that `generate` gives it alone with the same sampling and seed:
    its draws come from its own generator. Adapters and trained weights are read from the model at
    every step, so updates are seen at once.

    `add` and `cancel` may be called from other threads than the one that calls `step`.
    """

    def __init__(
        self,
        model: CausalLM,
        tokenizer: Tokenizer | None = None,
        *,
        slots: int = 8,
        max_queue: int = 1024,
    ) -> None:
        for name, value, least in (("slots", slots, 1), ("max_queue", max_queue, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ArgumentError(f"{name} is {value!r}, expected a whole number from {least}")
        self.model = model
        self.tokenizer = model.tokenizer if tokenizer is None else tokenizer
        self.slots, self.max_queue = slots, max_queue
        self.eos_ids = tuple(end_ids(None, model.generation_config, model.config, self.tokenizer))
        self._ids = itertools.count()
        self._waiting: deque[Running] = deque()
        self._running: list[Running] = []
        self._rows = Rows()
        self._cancelled: deque[int] = deque()
        self._mail: dict[int, deque[Event]] = {}

    @property
    def busy(self) -> bool:
        """Is there anything for `step` to do?"""
        return bool(self._waiting or self._running or self._cancelled)

    @property
    def running(self) -> int:
        """How many slots are taken."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """How many requests wait for a slot."""
        return len(self._waiting)

    def add(self, request: Request) -> int:
        """Queue a request; its id, which its events bear.

        Raises InputError or ArgumentError for a request that cannot be run, BusyError where as many
        wait as may.
        """
        self._check(request)
        # The free slots take the first of those that wait at the next step.
        if len(self._waiting) >= self.max_queue + self.slots - len(self._running):
            raise BusyError(
                f"{len(self._running)} requests run and {len(self._waiting)} wait, of at most "
                f"{self.slots} and {self.max_queue}; come again later"
            )
        eos = self.eos_ids if request.eos_ids is None else request.eos_ids
        running = Running.start(next(self._ids), request, eos, self.tokenizer)
        self._waiting.append(running)
        return running.id

    def cancel(self, request_id: int) -> None:
        """End a request at the next step, which frees its slot; nothing where it has ended."""
        self._cancelled.append(request_id)

    def step(self) -> list[Event]:
        """One more token for every running request, then the first one for those that find a slot.

        Errors of one request become its last event and touch no other; where a step of all fails
        (out of memory), all that run end so, and those that wait go on.
        """
        with torch.inference_mode():
            events = [*self._drop_cancelled(), *self._decode(), *self._admit()]
        for event in events:
            if event.id in self._mail:
                self._mail[event.id].append(event)
        return events

    def stream(self, request: Request) -> Iterator[Event]:
        """The events of one request as they come; whoever reads drives the engine for all.

        It is queued when the first event is asked for, which raises what `add` does. Closing the
        iterator cancels the request.
        """
        request_id = self.add(request)
        mail = self._mail.setdefault(request_id, deque())
        finished = False
        try:
            while not finished:
                if not mail:
                    self.step()
                while mail:
                    event = mail.popleft()
                    finished = event.finish is not None
                    yield event
        finally:
            del self._mail[request_id]
            if not finished:
                self.cancel(request_id)

    def run(self, requests: Sequence[Request]) -> list[list[int]]:
        """The new tokens of each request; raises the first error that one of them meets, and then
        cancels the others."""
        ids: list[int] = []
        answers: dict[int, list[int]] = {}
        try:
            for request in requests:
                ids.append(self.add(request))
                answers[ids[-1]] = []
            going = set(ids)
            while going:
                for event in self.step():
                    if event.id not in going:
                        continue
                    if event.error is not None:
                        raise event.error
                    if event.token is not None:
                        answers[event.id].append(event.token)
                    if event.finish is not None:
                        going.remove(event.id)
        except BaseException:
            for request_id in ids:
                self.cancel(request_id)
            raise
        return [answers[i] for i in ids]

    def _check(self, request: Request) -> None:
        spec, prompt = self.model.spec, request.prompt
        if not prompt:
            raise InputError("the prompt has no tokens")
        low, high = min(prompt), max(prompt)
        if low < 0 or high >= spec.vocab:
            raise InputError(
                f"token ids lie in {low}..{high}, the vocabulary is 0..{spec.vocab - 1}"
            )
        total, most = len(prompt) + request.max_new_tokens, slots.shared_length(spec)
        if total > most:
            raise InputError(
                f"a prompt of {len(prompt)} tokens and {request.max_new_tokens} new ones make "
                f"{total}, more than the {most} that the engine runs with this model"
            )

    def _drop_cancelled(self) -> list[Event]:
        gone = set()
        while self._cancelled:
            gone.add(self._cancelled.popleft())
        if not gone:
            return []
        ended = [r for r in [*self._running, *self._waiting] if r.id in gone]
        self._waiting = deque(r for r in self._waiting if r.id not in gone)
        self._keep([r for r in self._running if r.id not in gone])
        return [Event(r.id, None, "cancelled") for r in ended]

    def _keep(self, running: list[Running]) -> None:
        if len(running) < len(self._running):
            still = [self._running.index(r) for r in running]
            self._rows = slots.keep(self.model.spec, self._rows, still)
            self._running = running

    def _decode(self) -> list[Event]:
        if not self._running:
            return []
        running, device = self._running, self.model.device
        try:
            tokens = torch.tensor([[r.ids[-1]] for r in running], device=device)
            logits, self._rows = slots.decode(
                self.model.computed_params(),
                self.model.spec,
                tokens,
                self._rows,
                adapters=self.model.adapters,
            )
        except (RuntimeError, ValueError) as problem:
            self._running, self._rows = [], Rows()
            return [_failed(r, problem) for r in running]
        events = [_next(r, logits[i : i + 1]) for i, r in enumerate(running)]
        self._keep([r for r, e in zip(running, events, strict=True) if e.finish is None])
        return events

    def _admit(self) -> list[Event]:
        events: list[Event] = []
        parts, started = [self._rows], list(self._running)
        while self._waiting and len(started) < self.slots:
            running = self._waiting.popleft()
            try:
                logits, row = slots.prefill(
                    self.model.computed_params(),
                    self.model.spec,
                    torch.tensor([running.ids], device=self.model.device),
                    adapters=self.model.adapters,
                )
            except (RuntimeError, ValueError) as problem:
                events.append(_failed(running, problem))
                continue
            event = _next(running, logits)
            events.append(event)
            if event.finish is None:
                parts.append(row)
                started.append(running)
        if len(parts) > 1:
            self._rows, self._running = slots.join(self.model.spec, parts), started
        return events


def _next(running: Running, logits: torch.Tensor) -> Event:
    """Choose the next token of one row from its logits [1, v]."""
    try:
        request, device = running.request, logits.device
        scores = running.scores(logits)
        if not bool(scores.amax().isfinite()):
            raise InputError(
                "the model's logits for this request are not finite, or its rules leave no token"
            )
        if request.sampling.temperature == 0:
            chosen = scores.argmax(-1)
        else:
            chosen = rules.look_up(scores, rules.uniforms(1, running.generator).to(device))
        logprobs = None
        if request.logprobs is not None:
            logprobs = TokenLogprobs.of(logits, chosen, request.logprobs)
        return running.take(int(chosen), logprobs)
    except (RuntimeError, ValueError, IndexError) as problem:
        return _failed(running, problem)


def _failed(running: Running, problem: Exception) -> Event:
    return Event(running.id, None, "error", error=problem)
