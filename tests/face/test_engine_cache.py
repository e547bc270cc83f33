"""The engine's cache and steps: prefixes, pieces of prompts, lagging reads, replays, weights."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import embedded_model
import pytest
import torch
from engines import WARM, alone, ready, recorded, stand_in, text
from hybrids import MIXERS
from hypothesis import given, settings
from hypothesis import strategies as st

from purelm import Engine, FastLanguageModel, Request, Sampling
from purelm.convert import engine_request, engine_rows
from purelm.convert.engine_whole import Whole
from purelm.convert.live_weights import LiveWeights
from purelm.errors import ArgumentError, InputError
from purelm.nn import decoder, prompt_pass, tree
from purelm.nn.pages import PAGE


@settings(max_examples=16, deadline=None)
@given(
    kind=st.sampled_from(list(MIXERS)),
    slots=st.integers(1, 4),
    piece=st.integers(1, 40) | st.integers(60, 200),
    lags=st.booleans(),
    replays=st.booleans(),
    lookup=st.sampled_from([0, 1, 5]),
    blocks=st.sampled_from([None, 5, 8]),
    shapes=st.lists(
        st.tuples(st.integers(0, 2), st.integers(1, 3 * PAGE), st.integers(1, 9), st.booleans()),
        min_size=1,
        max_size=6,
    ),
)
def test_equals_generate_whatever_is_beside(
    kind: str,
    slots: int,
    piece: int,
    lags: bool,
    replays: bool,
    lookup: int,
    blocks: int | None,
    shapes: list[tuple[int, int, int, bool]],
) -> None:
    """Of few texts, so that prefixes are shared; in little memory, so that requests wait."""
    model = stand_in(kind)
    lookup = lookup if MIXERS[kind][1] is None else 0
    requests = [
        Request(text(seed, n), new, sampling=WARM if warm else Sampling(), seed=i, eos_ids=(7,))
        for i, (seed, n, new, warm) in enumerate(shapes)
    ]
    engine = Engine(
        model, slots=slots, prefill_chunk=piece, cache_blocks=blocks, lookup_tokens=lookup
    )
    with pytest.MonkeyPatch.context() as patch:
        for module in (engine_rows, prompt_pass):
            patch.setattr(module, "capture", recorded)
        got = ready(engine, lags=lags and not lookup, replays=replays).run(requests)
    assert got == [alone(model, r) for r in requests]
    assert engine.held_blocks == 0 and not engine.busy


def test_shared_beginnings_are_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of prompts, and of answers when they come back as prompts; not where layers have states."""
    ran: list[int] = []
    run = decoder.extend

    def counting(params: Any, spec: Any, tokens: torch.Tensor, *rest: Any, **more: Any) -> Any:
        ran.append(tokens.shape[1])
        return run(params, spec, tokens, *rest, **more)

    monkeypatch.setattr(decoder, "extend", counting)
    for kind, again, turn in (("latent", 4, 3), ("mamba2", 2 * PAGE + 4, 3 * PAGE + 3)):
        model, prompt = stand_in(kind), text(0, 2 * PAGE)
        engine = Engine(model)
        first, second = Request((*prompt, 3, 4), PAGE + 1), Request((*prompt, 5, 6, 7, 8), 2)
        (answer,) = engine.run([first])
        ran.clear()
        assert engine.run([second]) == [alone(model, second)] and ran[0] == again
        follow = Request((*first.prompt, *answer)[: 3 * PAGE] + (1, 2, 3), 2)
        ran.clear()
        assert engine.run([follow]) == [alone(model, follow)] and ran[0] == turn


def passes(monkeypatch: pytest.MonkeyPatch, engine: Engine) -> list[tuple[int, int]]:
    """Of each pass over prompts, how many and how many tokens of each; filled as they are run."""
    ran: list[tuple[int, int]] = []
    prefill = engine._prompts._prefill

    def noted(group: Any, cache: Any, count: int) -> Any:
        ran.append((len(group), count))
        return prefill(group, cache, count)

    monkeypatch.setattr(engine._prompts, "_prefill", noted)
    return ran


def test_prompts_that_wait_are_run_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as fit into a piece with their padding, but not what others among them are to run;
    a long prompt alone."""
    model = stand_in()

    def run(prompts: list[tuple[int, ...]], **how: Any) -> list[tuple[int, int]]:
        engine = Engine(model, **{"slots": 8, "prefill_chunk": 96} | how)
        ran = passes(monkeypatch, engine)
        requests = [Request(prompt, 3) for prompt in prompts]
        assert engine.run(requests) == [alone(model, r) for r in requests]
        return ran

    assert run([text(i, 7 + i) for i in range(5)]) == [(5, 11)]
    assert run([text(i, 20) for i in range(6)]) == [(4, 20), (2, 20)]
    assert run([text(i, 9) for i in range(5)], slots=2) == [(2, 9), (2, 9), (1, 9)]
    assert run([text(0, 100), text(1, 5), text(2, 6)]) == [(1, 96), (1, 4), (2, 6)]
    # One text, and a longer and a shorter one that begin as it does.
    same = [text(0, 2 * PAGE + 3)] * 4
    assert run(same) == [(1, 2 * PAGE + 3), (3, 3)]
    longer = [*same[:2], (*same[0], 4), text(3, 5)]
    assert run(longer) == [(1, 2 * PAGE + 3), (1, 3), (1, 4), (1, 5)]


def test_where_nobody_waits_prompts_are_run_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, in one padded pass; beside a row that runs no more than a piece at once."""
    monkeypatch.setattr(prompt_pass, "capture", recorded)
    monkeypatch.setattr(engine_rows, "capture", recorded)
    model, passes = stand_in(), []
    run = Whole.run

    def noted(whole: Whole, group: Any) -> Any:
        passes.append([len(r.ids) for r in group])
        return run(whole, group)

    monkeypatch.setattr(Whole, "run", noted)
    engine = ready(Engine(model, slots=8, prefill_chunk=64), replays=True)
    requests = [Request(text(i, n), 9, eos_ids=()) for i, n in enumerate((300, 290, 20, 70))]
    assert engine.run(requests) == [alone(model, r) for r in requests]
    assert passes == [[300, 290, 20, 70]]
    passes.clear()
    first = engine.add(Request(text(9, 10), 30, eos_ids=()))
    engine.step()
    rest = [Request(text(10 + i, n), 9, eos_ids=()) for i, n in enumerate((50, 90, 20))]
    ids = [engine.add(r) for r in rest]
    events: list[Any] = []
    while engine.busy:
        events += engine.step()
    for i, request in zip(ids, rest, strict=True):
        assert [e.token for e in events if e.id == i] == alone(model, request)
    assert passes == [[10], [50], [20]] and any(e.id == first for e in events)


def test_what_goes_on_is_run_behind_what_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, of conversations, one or several: as a step over the blocks that are there."""
    monkeypatch.setattr(prompt_pass, "capture", recorded)
    monkeypatch.setattr(engine_rows, "capture", recorded)
    model, engine = stand_in(), ready(Engine(stand_in(), slots=4), replays=True)
    runs: list[int] = []
    run = engine._rows.whole.behind.run

    def noted(group: Any) -> torch.Tensor:
        runs.append(len(group))
        return run(group)

    monkeypatch.setattr(engine._rows.whole.behind, "run", noted)
    talks = [text(i, 2 * PAGE + 3) for i in range(2)]
    for turn in range(4):
        requests = [Request(talk, 6 + turn, eos_ids=()) for talk in talks]
        answers = engine.run(requests)
        assert answers == [alone(model, r) for r in requests]
        talks = [(*t, *a, *text(turn, 5)) for t, a in zip(talks, answers, strict=True)]
    assert runs == [2, 2, 2]
    # More than a step of 64 tokens has.
    long = Request((*talks[0], *text(9, 80)), 3, eos_ids=())
    assert engine.run([long]) == [alone(model, long)] and len(runs) == 3
    assert engine.held_blocks == 0


def test_a_pass_over_prompts_that_fails_is_run_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is not to blame gets the answer, and who is alone an error."""
    model = stand_in()
    engine = Engine(model, slots=4)
    requests = [Request(text(i, 5 + i), 4) for i in range(4)]
    prefill = engine._prompts._prefill

    def failing(group: Any, cache: Any, count: int) -> Any:
        if any(r.id == 2 for r in group):
            raise torch.OutOfMemoryError("no room")
        return prefill(group, cache, count)

    monkeypatch.setattr(engine._prompts, "_prefill", failing)
    for request in requests:
        engine.add(request)
    events: list[Any] = []
    while engine.busy:
        events += engine.step()
    for i, request in enumerate(requests):
        mine = [e for e in events if e.id == i]
        if i == 2:
            assert [e.finish for e in mine] == ["error"] and "no room" in str(mine[0].error)
        else:
            assert [e.token for e in mine] == alone(model, request)
    assert engine.held_blocks == 0


def test_no_memory_to_choose_for_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first tokens of prompts that were run together are then chosen one by one."""

    def fails(logits: torch.Tensor) -> list[int]:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(engine_request, "_likeliest", fails)
    model = stand_in()
    engine = Engine(model, slots=4)
    requests = [Request(text(i, 5 + i), 4) for i in range(4)]
    assert engine.run(requests) == [alone(model, r) for r in requests]
    assert engine.held_blocks == 0


def test_beginnings_that_end_with_a_block() -> None:
    """A prompt known to its last token still has one to run; an answer's last token, which no step
    has read, is in no block."""
    model = stand_in()
    engine = Engine(model)
    whole = Request(text(0, 2 * PAGE), PAGE)
    (answer,) = engine.run([whole])
    assert engine.run([whole]) == [answer] == [alone(model, whole)]
    follow = Request((*whole.prompt, *answer, 1, 2, 3), 4)
    known = engine._rows.known_tokens
    assert engine.run([follow]) == [alone(model, follow)]
    assert engine._rows.known_tokens - known == 2 * PAGE


def test_a_row_that_was_left_writes_to_nobodys_block() -> None:
    """Of seven rows two end, and their blocks go to one request: of eight places in a step, two
    are then empty."""
    model = stand_in()
    engine = Engine(model, slots=7, cache_blocks=11)
    requests = [Request(text(i, 6), 20) for i in range(5)]
    requests += [Request(text(i, 2), 3) for i in (5, 6)]
    requests.append(Request(text(7, 10), 6))
    assert engine.run(requests) == [alone(model, r) for r in requests]
    engine.run([Request(text(i, 6), 20) for i in range(3)])
    for request in requests[:3]:
        engine.add(request)
    for _ in range(5):
        engine.step()
    pages = engine._rows.pages
    assert pages is not None and pages.end.tolist() == [10, 10, 10, 0, 0, 0, 0]


def test_a_long_prompt_keeps_nobody_waiting() -> None:
    """While it is run in pieces, whoever runs gets a token at every step."""
    model = stand_in()
    engine = Engine(model, slots=2, prefill_chunk=8)
    short, long = Request(text(0, 5), 30), Request(text(1, 100), 3)
    first = engine.add(short)
    engine.step()
    second = engine.add(long)
    events: list[Any] = []
    for _ in range(12):  # of 13 pieces
        now = engine.step()
        assert [e.id for e in now] == [first]
        events += now
    assert engine.running == 2
    while engine.busy:
        events += engine.step()
    assert [e.token for e in events if e.id == first] == alone(model, short)[1:]
    assert [e.token for e in events if e.id == second] == alone(model, long)


def test_cancelled_in_the_middle_of_its_prompt() -> None:
    engine = Engine(stand_in(), slots=2, prefill_chunk=8)
    other = Request(text(0, 5), 9)
    ids = [engine.add(r) for r in (other, Request(text(1, 100), 3))]
    events = engine.step() + engine.step()
    engine.cancel(ids[1])
    while engine.busy:
        events += engine.step()
    assert [(e.token, e.finish) for e in events if e.id == ids[1]] == [(None, "cancelled")]
    assert [e.token for e in events if e.id == ids[0]] == alone(engine.model, other)
    assert engine.held_blocks == 0


def test_cancelled_while_a_step_is_under_way() -> None:
    engine = ready(Engine(stand_in(), slots=2), lags=True)
    requests = [Request(text(i, 5), 9) for i in range(2)]
    ids = [engine.add(r) for r in requests]
    events = engine.step() + engine.step()
    engine.cancel(ids[0])
    while engine.busy:
        events += engine.step()
    ends = [e.finish for e in events if e.id == ids[0]]
    assert ends[-1] == "cancelled" and ends.count(None) == len(ends) - 1
    assert [e.token for e in events if e.id == ids[1]] == alone(engine.model, requests[1])
    assert engine.held_blocks == 0


def test_rules_of_the_host_and_of_the_device_take_turns() -> None:
    """A least length bans ends for the first tokens only; others' draws are not touched."""
    model = stand_in()
    common = {"temperature": 1.3, "min_new_tokens": 4}
    requests = [
        Request(text(0, 5), 12, sampling=Sampling(**common), seed=1, eos_ids=tuple(range(25))),
        Request(text(1, 6), 12, sampling=WARM, seed=2),
        Request(
            text(2, 7),
            12,
            sampling=Sampling(**common, repetition_penalty=1.5),
            seed=3,
            eos_ids=tuple(range(25)),
        ),
    ]
    for lags in (False, True):
        engine = ready(Engine(model), lags=lags)
        assert engine.run(requests) == [alone(model, r) for r in requests]


def test_a_replayed_step_is_as_often_captured_as_its_shape_is_new(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    captures = []

    def noted(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
        captures.append(1)
        return step

    monkeypatch.setattr(engine_rows, "capture", noted)
    monkeypatch.setattr(prompt_pass, "capture", recorded)
    engine = ready(Engine(stand_in(), slots=4), replays=True)
    engine.run([Request(text(0, 5), 20)])
    assert len(captures) == 1
    engine.run([Request(text(i, 5 + i), 20) for i in range(2)])
    assert len(captures) == 2
    engine.run([Request(text(i, 9), 20, sampling=WARM, seed=i) for i in range(2)])
    assert len(captures) == 3
    plain = [Request(text(i, 5 + i), 20) for i in range(2)]
    engine.run(plain)
    assert len(captures) == 3
    # Over other memory, of the cache or of the weights, nothing is replayed that was captured.
    engine.run([Request(text(0, 5), 40 * PAGE)])
    before = len(captures)
    engine.run(plain)
    assert len(captures) == before + 1
    moved = tree.map(torch.clone, engine.model.params)
    engine.model.own_trees, engine.model.computed_params = lambda: (moved,), lambda: moved
    engine.run(plain)
    assert len(captures) == before + 2


def test_too_little_memory_for_a_request() -> None:
    engine = Engine(stand_in(), cache_blocks=3)
    with pytest.raises(InputError, match="take 4 blocks of the cache, which has 3"):
        engine.add(Request(text(0, 2 * PAGE), PAGE + 1))
    with pytest.raises(ArgumentError, match="cache_blocks"):
        Engine(stand_in(), cache_blocks=0)


@pytest.fixture(scope="module")
def model() -> Any:
    made, _ = embedded_model.load()
    return FastLanguageModel.get_peft_model(made, r=4, modules_to_save=["lm_head"])


@pytest.mark.parametrize("traceless", [False, True])
@pytest.mark.parametrize("replays", [False, True])
def test_trained_weights_are_seen_at_once(
    model: Any, traceless: bool, replays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adapters and whole trained copies, prefixes in the cache included, however they are written:
    a step by a kernel of some optimizer leaves no trace in torch. By what was captured too."""
    for module in (engine_rows, prompt_pass):
        monkeypatch.setattr(module, "capture", recorded)
    engine = ready(Engine(model), replays=replays)
    request = Request(text(0, 2 * PAGE + 3, 400), 6, eos_ids=())

    def wanted() -> list[int]:
        out = model.generate(torch.tensor([request.prompt]), max_new_tokens=6, eos_token_id=[])
        return [int(t) for t in out[0, len(request.prompt) :]]

    before = wanted()
    for _ in range(3):
        assert engine.run([request]) == [before]
    assert any(engine._rows._replays.values()) == replays
    g = torch.Generator().manual_seed(1)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        change = 0.3 * torch.randn(parameter.shape, generator=g)
        if traceless:
            parameter.data += change
        else:
            with torch.no_grad():
                parameter += change
    after = wanted()
    assert after != before
    assert engine.run([request]) == [after]


def test_a_little_change_of_bf16_weights_is_seen() -> None:
    """Less than what a norm in bf16 shows, and written without a trace."""
    weight = torch.ones(64, 64, dtype=torch.bfloat16).requires_grad_()
    params = {"weight": weight}
    of: Any = {"own_trees": lambda: (params,), "qat_scheme": None, "adapters": None}
    of |= {"derives": lambda: False, "computed_params": lambda: params}
    weights = LiveWeights(cast(Any, SimpleNamespace(**of)))
    assert weights.read(closely=True) and not weights.read(closely=True)
    weight.data[0, 0] = 1.0078125
    assert weights.read(closely=True) and not weights.read(closely=True)


def test_another_adapter_or_none_is_seen_at_once(model: Any) -> None:
    engine = Engine(model)
    request = Request(text(3, 2 * PAGE + 3, 400), 6, eos_ids=())

    def wanted() -> list[int]:
        out = model.generate(torch.tensor([request.prompt]), max_new_tokens=6, eos_token_id=[])
        return [int(t) for t in out[0, len(request.prompt) :]]

    worn = wanted()
    assert engine.run([request]) == [worn]
    with model.disable_adapter():
        bare = wanted()
        assert engine.run([request]) == [bare]
    assert bare != worn and engine.run([request]) == [worn]


@pytest.mark.gpu
@pytest.mark.parametrize("lookup", [0, 4])
@pytest.mark.parametrize("narrow", [False, True])
def test_replayed_steps_on_a_gpu_give_what_eager_ones_give(narrow: bool, lookup: int) -> None:
    """To the bit, with reads that lag, rows that come and go, and every rule of the device."""
    made, _ = FastLanguageModel.from_pretrained(
        "purelm/tiny", max_seq_length=None, dtype="bfloat16", device_map="cuda"
    )
    rules = (Sampling(), WARM, Sampling(repetition_penalty=1.2, presence_penalty=0.5))
    requests = [
        Request(text(i % 4, 5 + 7 * i, 400), 12 + 5 * i, sampling=rules[i % 3], seed=i, eos_ids=())
        for i in range(9)
    ]
    how: dict[str, Any] = {"cache_dtype": torch.float8_e4m3fn if narrow else None, "slots": 4}
    how["lookup_tokens"] = lookup
    replaying = Engine(made, **how)
    got = replaying.run(requests)
    assert any(replaying._rows._replays.values())
    assert got == Engine(made, graphs=False, **how).run(requests)
    assert replaying.held_blocks == 0
