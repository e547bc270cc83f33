"""Requests that are cancelled, and passes that fail, wherever the engine is with them."""

from typing import Any

import pytest
import torch
from engines import WARM, alone, ready, recorded, stand_in, text
from hypothesis import given, settings
from hypothesis import strategies as st

from purelm import Engine, Request, Sampling
from purelm.convert import engine_rows
from purelm.convert.engine_request import Event
from purelm.nn import decode, decoder, prompt_pass
from purelm.nn.pages import PAGE

# A request: of which text, so many tokens of it, so many new ones, is it drawn?
ASKED = st.tuples(
    st.integers(0, 2), st.integers(1, 3 * PAGE), st.integers(1, 2 * PAGE), st.booleans()
)
# Between two steps: new requests, who is cancelled of the last, and does the next pass fail?
TURN = st.tuples(
    st.lists(ASKED, max_size=3), st.lists(st.integers(1, 6), max_size=1), st.booleans()
)


@settings(max_examples=20, deadline=None)
@given(
    turns=st.lists(TURN, min_size=1, max_size=12),
    piece=st.sampled_from([8, 64]),
    lookup=st.sampled_from([0, 3]),
    gpu=st.booleans(),
    blocks=st.sampled_from([None, 9]),
)
def test_nobody_else_is_harmed_and_no_block_stays(
    turns: list[tuple[list[Any], list[int], bool]],
    piece: int,
    lookup: int,
    gpu: bool,
    blocks: int | None,
) -> None:
    """Whole prompts, pieces of them, ends behind known beginnings, steps with guesses and without:
    what a request gets is what it gets alone, up to its end; errors are of passes that failed."""
    model = stand_in()
    how: dict[str, Any] = {"prefill_chunk": piece, "lookup_tokens": lookup, "cache_blocks": blocks}
    engine = ready(Engine(model, slots=4, **how), lags=gpu and not lookup, replays=gpu)
    requests: list[Request] = []
    events: list[Event] = []
    failing, failed = False, 0

    def unsteady(run: Any) -> Any:
        def one(*args: Any, **more: Any) -> Any:
            nonlocal failing, failed
            if failing:
                failing, failed = False, failed + 1
                raise torch.OutOfMemoryError("no room")
            return run(*args, **more)

        return one

    with pytest.MonkeyPatch.context() as patch:
        for module in (engine_rows, prompt_pass):
            patch.setattr(module, "capture", recorded)
        for module, name in ((decode, "decode"), (decoder, "extend")):
            patch.setattr(module, name, unsteady(getattr(module, name)))
        for asked, cancelled, fails in turns:
            for seed, n, new, warm in asked:
                sampling = WARM if warm else Sampling()
                request = Request(text(seed, n), new, sampling=sampling, seed=n, eos_ids=(7,))
                assert engine.add(request) == len(requests)
                requests.append(request)
            for i in cancelled:  # no matter whether it is there
                engine.cancel(len(requests) - i)
            failing = fails
            events += engine.step()
        failing = False
        while engine.busy:
            events += engine.step()
    errors = 0
    for i, request in enumerate(requests):
        mine = [e for e in events if e.id == i]
        assert [e.finish is None for e in mine] == [True] * (len(mine) - 1) + [False]
        tokens, want = [e.token for e in mine if e.token is not None], alone(model, request)
        assert tokens == want[: len(tokens)]
        if mine[-1].finish in ("stop", "length"):
            assert tokens == want
        errors += mine[-1].finish == "error"
    # A step takes all of its rows with it.
    assert errors <= 4 * failed
    assert engine.held_blocks == 0 and engine.running == engine.waiting == 0
    own = engine._rows.blocks
    assert len(own.take(own.room) or ()) == own.count - 1
