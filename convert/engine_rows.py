"""The rows that the engine decodes together: their blocks and buffers, and the step over them.

A step is `nn.decode.decode` and the choice of every row's token, with all that differs from row to
row on the device. On a GPU it is captured once for each number of rows, length of tables (both as
powers of two) and set of sampling rules, and replayed. Where the model waits for the device
(`decode.waits_for`), and on the CPU, it runs as it is.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch

from ..errors import InputError
from ..nn import decode, pages, sample_rows
from ..nn.blocks import Blocks, Name, names
from ..nn.cache import Cache
from ..nn.graph import capture, replayable
from ..nn.pages import PAGE, Pages
from ..nn.sample_rows import Controls
from .bridge import CausalLM
from .engine_request import Event, Running, failed, next_token, not_finite
from .engine_whole import Whole
from .live_weights import LiveWeights

# Blocks that there is room for at first, and that tables are as long as at least.
FIRST = 32


@dataclass(slots=True)
class Launched:
    """A step under way: its rows, their tokens (on a GPU a copy to the host, done at `ready`), and
    the events of rows whose rules run on the host.
    """

    rows: list[Running]
    tokens: torch.Tensor
    ready: torch.cuda.Event | None
    on_host: dict[int, Event]


class EngineRows:
    """Up to `most` rows of a model, and at most `most_blocks` blocks of PAGE tokens (None: as many
    as all rows can fill), which are made as they are needed.

    columns: the dtype of keys and values (None: the embedding's).
    """

    def __init__(
        self,
        model: CausalLM,
        most: int,
        *,
        most_blocks: int | None = None,
        columns: torch.dtype | None = None,
        graphs: bool = True,
    ) -> None:
        self.model, self.most = model, most
        self.rows: list[Running] = []
        self.weights = LiveWeights(model)
        self.length = pages.shared_length(model.spec)
        full = most * -(-self.length // PAGE) + 1
        self.most_blocks = full if most_blocks is None else min(full, most_blocks)
        self.blocks = Blocks(1)
        # Of all prompts so far: their tokens, and how many of those were in the cache already.
        self.prompt_tokens = self.known_tokens = 0
        self.columns = columns
        self.graphs = graphs and replayable(model.device)
        # Padded alike with graphs and without, so that both give the same to the bit.
        self.pads = replayable(model.device)
        self.whole = Whole(self)
        self._shares = all(layer.recurrent is None for layer in model.spec.layers)
        self.pages: Pages | None = None
        self.controls: Controls | None = None
        # A step that ran once can be captured: None until then.
        self._replays: dict[object, Callable[[], torch.Tensor] | None] = {}

    def look(self, closely: bool = False) -> None:
        """Take note of the weights as they are now."""
        places = self.weights.places
        if self.weights.read(closely):
            self.blocks.forget()
        if places != self.weights.places:
            self._replays.clear()
            self.whole.forget()

    # A request's way in.

    def reserve(self, running: Running) -> bool:
        """Take the blocks of all tokens that the request may come to; False where it must wait.

        All at once, so that no running request ever waits for memory. Raises what making room
        raises, and InputError where there is no room to be made.
        """
        self.look(closely=True)
        known = self.blocks.match(self.names_of(running))
        need = -(-(len(running.ids) + running.request.max_new_tokens) // PAGE) - len(known)
        try:
            fresh = self.blocks.take(need)
            if fresh is None and self._make_room(need):
                fresh = self.blocks.take(need)
        except BaseException:
            self.blocks.release(known)
            raise
        if fresh is None:
            self.blocks.release(known)
            return False
        running.blocks, running.known = [*known, *fresh], len(known)
        running.content = self.weights.content
        self.known_tokens += len(known) * PAGE
        self.prompt_tokens += len(running.ids)
        return True

    def names_of(self, running: Running) -> list[Name]:
        """Of the blocks of a prompt that others may have run; its last token always is run."""
        if running.names is None:
            prompt = running.request.prompt
            running.names = names(prompt, PAGE)[: (len(prompt) - 1) // PAGE] if self._shares else []
        return running.names

    def _make_room(self, need: int) -> bool:
        """Whether there is room for so many more blocks now."""
        held = self.blocks.count
        wanted = min(self.most_blocks, max(2 * held, held + need - self.blocks.room, FIRST))
        if wanted - held + self.blocks.room < need:
            if not self.blocks.held:
                raise InputError(
                    f"the cache has {self.most_blocks - 1} blocks of {PAGE} tokens, the request "
                    f"needs {need}"
                )
            return False
        dtype = self.model.params["embed"]["weight"].dtype
        if self.pages is None:
            self.pages = pages.empty(
                self.model.spec,
                self.most,
                wanted,
                dtype=dtype,
                columns=self.columns or dtype,
                device=self.model.device,
            )
            self.controls = Controls.empty(self.most, self.model.device)
        else:
            self._replays.clear()
            pages.grow(self.pages, wanted)
        self.blocks.grow(wanted)
        return True

    def stage(self, group: Sequence[Running]) -> Cache:
        """A cache of their own for prompts, a row each, with what is known of all of them."""
        assert self.pages is not None
        known = [r.blocks[: r.known] for r in group]
        longest, padded = max(len(r.ids) for r in group), len({len(r.ids) for r in group}) > 1
        # Whole blocks from wherever the prompt of a row begins.
        capacity = -(-longest // PAGE) * PAGE + padded * PAGE
        dtype = self.model.params["embed"]["weight"].dtype
        spec = self.model.spec
        return pages.staged(spec, self.pages, known, capacity, dtype, padded=padded)

    def enter(self, running: Running, cache: Cache | None = None, at: int = 0) -> None:
        """The request takes a row: row `at` of `cache` has its prompt, or its blocks have it, and
        its first token is chosen.
        """
        assert self.pages is not None and self.controls is not None
        row = len(self.rows)
        ids = torch.tensor(running.ids)
        start, vocab = len(running.request.prompt), self.model.spec.vocab
        if self.controls.place(row, running.device_sampling(), ids, start, vocab):
            self._replays.clear()
        # The token that was chosen is one of its ids, and not in the cache.
        length = len(running.ids) - 1
        if cache is not None:
            begin = cache.length - length
            pages.unstage(self.pages, cache, at, begin, row, running.blocks, running.known)
        pages.place(self.pages, row, running.blocks, length, running.ids[-1])
        running.launched = 1
        self.rows.append(running)
        self._name(running)

    def _name(self, running: Running) -> None:
        """What the blocks hold may be used by others; the last token is in none yet."""
        if self._shares and running.content == self.weights.content:
            self.blocks.name(running.blocks, names(running.ids[:-1], PAGE))

    # And out.

    def leave(self, gone: Sequence[Running]) -> None:
        """These requests give up their rows and blocks; the last row moves to where one was."""
        for running in gone:
            row = self.rows.index(running)
            last = self.rows.pop()
            if last is not running:
                assert self.pages is not None and self.controls is not None
                self.rows[row] = last
                pages.move(self.pages, len(self.rows), row)
                self.controls.move(len(self.rows), row)
            self._name(running)
            self.release(running)
        if gone and self.pages is not None:
            pages.vacate(self.pages, len(self.rows))

    def release(self, running: Running) -> None:
        """A request gives up its blocks."""
        self.blocks.release(running.blocks)
        running.blocks = []

    def fail(self) -> list[Running]:
        """All rows end: a step broke off, and nobody knows what it has written."""
        gone, self.rows = self.rows, []
        for running in gone:
            self.release(running)
        self.blocks.forget()
        self._replays.clear()
        self.whole.forget()
        if self.pages is not None:
            pages.vacate(self.pages, 0)
        return gone

    # The step.

    def rows_of_step(self) -> int:
        """How many rows a step has, those that nobody stands in included."""
        return min(self.most, _power_of_two(len(self.rows)))

    def width_of_step(self, more: int = 0) -> int:
        """How many blocks of each row a step sees, with room for so many more tokens."""
        longest = max(len(r.request.prompt) + r.launched for r in self.rows) + more
        return self.width_of(-(-longest // PAGE))

    def width_of(self, blocks: int) -> int:
        """How many blocks of a row are seen where one has so many."""
        assert self.pages is not None
        return min(self.pages.table.shape[1], max(FIRST, _power_of_two(blocks)))

    def launch(self) -> Launched:
        """Begin one more token of every row."""
        assert self.pages is not None and self.controls is not None
        self.look()
        rows = list(self.rows)
        count, width = self.rows_of_step(), self.width_of_step()
        needs = frozenset[str]().union(*(r.rules() for r in rows))
        host = {r.id for r in rows if r.on_host()}
        if "draw" in needs:
            draws = [r.draw() if "draw" in r.rules() else 0.0 for r in rows]
            # Not blocking: a copy from pageable memory is staged before the call returns.
            uniform = torch.tensor(draws, dtype=torch.float64)
            self.controls.uniform[: len(rows)].copy_(uniform, non_blocking=True)
        logits = self._step(count, width, needs)
        on_host = {}
        for i, running in enumerate(rows):
            running.launched += 1
            if running.id in host:
                event = on_host[running.id] = next_token(running, logits[i : i + 1])
                self.pages.token[i] = event.token or 0
        tokens, ready = self.pages.chosen[: len(rows)], None
        if tokens.is_cuda:
            copy = torch.empty(len(rows), dtype=torch.int64, pin_memory=True)
            copy.copy_(tokens, non_blocking=True)
            ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            ready.record(torch.cuda.current_stream(tokens.device))
            tokens = copy
        return Launched(rows, tokens.clone() if ready is None else tokens, ready, on_host)

    def read(self, launched: Launched) -> list[Event]:
        """Wait for a step's tokens, and note them in the requests that go on."""
        if launched.ready is not None:
            launched.ready.synchronize()
        events = []
        for running, token in zip(launched.rows, launched.tokens.tolist(), strict=True):
            if running.ended:
                continue
            event = launched.on_host.get(running.id)
            if event is None:
                event = running.take(token) if token >= 0 else failed(running, not_finite())
            running.ended = event.finish is not None
            events.append(event)
        return events

    def _step(self, count: int, width: int, needs: sample_rows.Rules) -> torch.Tensor:
        """Run or replay a step; its logits [count, v], which the next of its kind overwrites."""
        own, controls = self.pages, self.controls
        assert own is not None and controls is not None
        params, adapters, spec = self.weights.params, self.weights.adapters, self.model.spec

        def step() -> torch.Tensor:
            cache = pages.view(own, count, width)
            logits, longer = decode.decode(
                params, spec, own.token[:count], cache, adapters=adapters
            )
            own.end[:count] = longer.end * own.active[:count]
            own.chosen[:count] = sample_rows.choose(logits, controls, needs)
            own.token[:count] = own.chosen[:count].clamp(min=0)
            return logits

        return self.replayed((count, width, needs), step)

    def replayed(self, key: Hashable, step: Callable[[], torch.Tensor]) -> torch.Tensor:
        """`step()`, from its second time on a replay of what it was then."""
        replay = self._replays.get(key)
        if replay is not None:
            return replay()
        if key in self._replays:
            replay = capture(step, self.model.device)
            if replay is None:
                self.graphs = False
                self._replays.clear()
            else:
                self._replays[key] = replay
                return replay()
        elif self.graphs and self._replayable():
            self._replays[key] = None
        return step()

    def _replayable(self) -> bool:
        params, adapters = self.weights.params, self.weights.adapters
        return decode.waits_for(params, self.model.spec, adapters) is None


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
