"""Continuous batching: requests come and go while the others are decoded."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence

import torch

from ..errors import ArgumentError, BusyError, InputError
from ..nn.draft import NGrams
from ..nn.pages import PAGE
from ..nn.sampling import check_ids
from ..nn.speculate import check_states
from .bridge import CausalLM
from .end_ids import end_ids
from .engine_guesses import GuessedSteps
from .engine_prompts import Prompts
from .engine_request import Event, Request, Running, failed
from .engine_rows import EngineRows, Launched
from .engine_stats import Stats
from .grammar import Grammar
from .tokenizer import Tokenizer

# Of how many last tokens the engine looks up what followed.
LONGEST = 3


class Engine:
    """Answers many requests at once on one model.

    slots: how many rows are decoded together. max_queue: how many requests may wait beyond those.
    cache_blocks: how many blocks of 16 tokens the cache may grow to; a request waits until there
    are enough for its prompt and all of max_new_tokens (None: as many as the slots can fill).
    cache_dtype: of keys and values; torch.float8_e4m3fn halves them. prefill_chunk: how many tokens
    of prompts are run between two steps of those that run, short ones together, and a long one in
    pieces, which so never keeps the others waiting for long; where none runs, a GPU takes more.
    lookup_tokens: while few rows run, check up to so many tokens a row at once that followed where
    its last ones stood before (prompt lookup decoding); not of models with recurrent layers.
    graphs: on a GPU replay steps from CUDA graphs. log_stats: while there is work, tell the logger
    "purelm.engine" every 10 seconds, as INFO, how it goes.

    Every request gets the tokens that `generate` gives it alone with the same sampling and seed:
    its draws come from its own generator, and no guess changes them. Beginnings that prompts share
    with earlier ones are not run again. Adapters and trained weights are read from the model at
    every step, so updates are seen at once. On a GPU a request's tokens come a step late where none
    are guessed, so that no step waits for the host.

    `add` and `cancel` may be called from other threads than the one that calls `step`. Raises
    ArgumentError.
    """

    def __init__(
        self,
        model: CausalLM,
        tokenizer: Tokenizer | None = None,
        *,
        slots: int = 8,
        max_queue: int = 1024,
        cache_blocks: int | None = None,
        cache_dtype: torch.dtype | None = None,
        prefill_chunk: int = 1024,
        lookup_tokens: int = 0,
        graphs: bool = True,
        log_stats: bool = False,
    ) -> None:
        for name, value, least in (
            ("slots", slots, 1),
            ("max_queue", max_queue, 0),
            ("cache_blocks", 1 if cache_blocks is None else cache_blocks, 1),
            ("prefill_chunk", prefill_chunk, 1),
            ("lookup_tokens", lookup_tokens, 0),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ArgumentError(f"{name} is {value!r}, expected a whole number from {least}")
        self.model = model
        self.tokenizer = model.tokenizer if tokenizer is None else tokenizer
        self.slots, self.max_queue = slots, max_queue
        self.eos_ids = tuple(end_ids(None, model.generation_config, model.config, self.tokenizer))
        self._ids = itertools.count()
        self._rows = EngineRows(
            model,
            slots,
            most_blocks=None if cache_blocks is None else cache_blocks + 1,
            columns=cache_dtype,
            graphs=graphs,
        )
        self._prompts = Prompts(self._rows, prefill_chunk)
        self._launched: Launched | None = None
        self._device = model.device
        self._guessed = None
        if lookup_tokens:
            check_states("the model", model.spec)
            how = NGrams(lookup_tokens, LONGEST)
            self._guessed = GuessedSteps(self._rows, how)
        # What is guessed follows from what was read.
        self._lags = model.device.type == "cuda" and not lookup_tokens
        self._stats = Stats() if log_stats else None
        self._cancelled: deque[int] = deque()
        self._mail: dict[int, deque[Event]] = {}

    @property
    def busy(self) -> bool:
        """Is there anything for `step` to do?"""
        return bool(self._prompts.waiting or self.running or self._cancelled)

    @property
    def running(self) -> int:
        """How many slots are taken."""
        return self._prompts.running

    @property
    def device(self) -> torch.device:
        """Where its cache is."""
        return self._device

    @property
    def longest(self) -> int:
        """How many tokens prompt and answer may have together."""
        return self._rows.length

    @property
    def held_blocks(self) -> int:
        """How many blocks of the cache requests hold."""
        return self._rows.blocks.held

    @property
    def waiting(self) -> int:
        """How many requests wait for a slot."""
        return len(self._prompts.waiting)

    def add(self, request: Request) -> int:
        """Queue a request; its id, which its events bear.

        Raises InputError or ArgumentError for a request that cannot be run, BusyError where as many
        wait as may.
        """
        self._check(request)
        # The free slots take the first of those that wait at the next step.
        if len(self._prompts.waiting) >= self.max_queue + self.slots - self.running:
            raise BusyError(
                f"{self.running} requests run and {len(self._prompts.waiting)} wait, of at most "
                f"{self.slots} and {self.max_queue}; come again later"
            )
        eos = self.eos_ids if request.eos_ids is None else request.eos_ids
        vocab = self.model.spec.vocab
        running = Running.start(next(self._ids), request, eos, self.tokenizer, vocab)
        self._prompts.waiting.append(running)
        return running.id

    def prepare(self, requests: Sequence[Request]) -> None:
        """Compile the requests' constraints, which may take a while: `add` finds them then.

        May be called from any thread. Raises ArgumentError for one that cannot be used.
        """
        for constraint, eos in {(r.constraint, r.eos_ids) for r in requests}:
            if constraint is not None:
                ends = self.eos_ids if eos is None else eos
                Grammar(constraint, self.tokenizer, self.model.spec.vocab, ends)

    def cancel(self, request_id: int) -> None:
        """End a request at the next step, which frees its slot; nothing where it has ended."""
        self._cancelled.append(request_id)

    def step(self) -> list[Event]:
        """One more token for every running request, then prompts of those that find a slot, up to
        `prefill_chunk` tokens, each with its first token at its end.

        Errors of one request become its last event and touch no other; where a step of all fails
        (out of memory), all that run end so, and those that wait go on.
        """
        with torch.inference_mode():
            events = [*self._drop_cancelled(), *self._decode(), *self._prompts.admit()]
        for event in events:
            if event.id in self._mail:
                self._mail[event.id].append(event)
        if self._stats is not None:
            blocks = self._rows.blocks
            self._stats.note(
                tokens=sum(event.token is not None for event in events),
                running=self.running,
                waiting=self.waiting,
                held=blocks.held / max(1, self._rows.most_blocks - 1),
                known=self._rows.known_tokens,
                prompts=self._rows.prompt_tokens,
            )
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
        """The new tokens of each request; raises as `answers`."""
        answers = self.answers(requests)
        return [[event.token for event in one if event.token is not None] for one in answers]

    def answers(self, requests: Sequence[Request]) -> list[list[Event]]:
        """The events of each request; raises the first error that one of them meets, and then
        cancels the others."""
        found: dict[int, list[Event]] = {}
        try:
            for request in requests:
                found[self.add(request)] = []
            going = set(found)
            while going:
                for event in self.step():
                    if event.id not in going:
                        continue
                    if event.error is not None:
                        raise event.error
                    found[event.id].append(event)
                    if event.finish is not None:
                        going.remove(event.id)
        except BaseException:
            for request_id in found:
                self.cancel(request_id)
            raise
        return list(found.values())

    def _check(self, request: Request) -> None:
        spec, prompt = self.model.spec, request.prompt
        if not prompt:
            raise InputError("the prompt has no tokens")
        low, high = min(prompt), max(prompt)
        if low < 0 or high >= spec.vocab:
            raise InputError(
                f"token ids lie in {low}..{high}, the vocabulary is 0..{spec.vocab - 1}"
            )
        check_ids(request.sampling, spec.vocab)
        total, most = len(prompt) + request.max_new_tokens, self._rows.length
        if total > most:
            raise InputError(
                f"a prompt of {len(prompt)} tokens and {request.max_new_tokens} new ones make "
                f"{total}, more than the {most} that the engine runs with this model"
            )
        blocks = -(-total // PAGE)
        if blocks >= self._rows.most_blocks:
            raise InputError(
                f"a prompt of {len(prompt)} tokens and {request.max_new_tokens} new ones take "
                f"{blocks} blocks of the cache, which has {self._rows.most_blocks - 1}; ask for "
                "fewer tokens, or give the cache more memory"
            )

    def _drop_cancelled(self) -> list[Event]:
        gone = set()
        while self._cancelled:
            gone.add(self._cancelled.popleft())
        if not gone:
            return []
        ended = [r for r in self._rows.rows if r.id in gone]
        self._rows.leave(ended)
        ended = [*ended, *self._prompts.drop(gone)]
        for running in ended:
            running.ended = True
        return [Event(r.id, None, "cancelled") for r in ended]

    def _decode(self) -> list[Event]:
        """Begin a step, and read the one before it, or the same where nothing may lag."""
        last, self._launched, events = self._launched, None, []
        try:
            begun = None
            if any(r.launched < r.request.max_new_tokens for r in self._rows.rows):
                guessed = None if self._guessed is None else self._guessed.step()
                if guessed is None:
                    begun = self._rows.launch()
                else:
                    events += guessed
            if last is not None:
                events += self._rows.read(last)
            if begun is not None and self._lags and not begun.on_host:
                self._launched = begun
            elif begun is not None:
                events += self._rows.read(begun)
        except (RuntimeError, ValueError) as problem:
            gone = [r for r in self._rows.fail() if not r.ended]
            return [*events, *(failed(r, problem) for r in gone)]
        self._rows.leave([r for r in self._rows.rows if r.ended])
        return events
