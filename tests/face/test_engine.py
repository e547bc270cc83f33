"""The engine: every request gets what `generate` gives it alone, whoever runs beside it."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import assert_rows

from purelm import Engine, Request, Sampling
from purelm.errors import ArgumentError, BusyError, InputError
from purelm.nn import decoder
from purelm.nn import tree as trees

WARM = Sampling(temperature=0.9, top_k=40, top_p=0.95, repetition_penalty=1.1)


@pytest.fixture(scope="module")
def model(loaded: Any) -> Any:
    return loaded[0]


def prompt(seed: int, length: int) -> tuple[int, ...]:
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(4, 400, (length,), generator=g).tolist())


def alone(model: Any, request: Request) -> list[int]:
    s = request.sampling
    keywords: dict[str, Any] = {"do_sample": False}
    if s.temperature > 0:
        keywords = {"do_sample": True, "temperature": s.temperature, "seed": request.seed}
        keywords |= {"top_k": s.top_k, "top_p": s.top_p}
    out = model.generate(
        torch.tensor([request.prompt]),
        max_new_tokens=request.max_new_tokens,
        repetition_penalty=s.repetition_penalty,
        no_repeat_ngram_size=s.no_repeat_ngram_size,
        presence_penalty=s.presence_penalty,
        eos_token_id=None if request.eos_ids is None else list(request.eos_ids),
        **keywords,
    )
    return [int(t) for t in out[0, len(request.prompt) :]]


@settings(max_examples=6, deadline=None)
@given(
    slots=st.integers(1, 4),
    shapes=st.lists(
        st.tuples(st.integers(1, 30), st.integers(1, 12), st.integers(0, 3)),
        min_size=1,
        max_size=7,
    ),
)
def test_equals_generate_one_at_a_time(
    model: Any, slots: int, shapes: list[tuple[int, int, int]]
) -> None:
    """Greedy and sampled, of any lengths, with rows that come and go."""
    rules = (Sampling(), WARM, Sampling(no_repeat_ngram_size=2, presence_penalty=1.5), WARM)
    requests = [
        Request(prompt(i, n), new, sampling=rules[kind], seed=i, eos_ids=(5, 6) if i % 2 else None)
        for i, (n, new, kind) in enumerate(shapes)
    ]
    assert Engine(model, slots=slots).run(requests) == [alone(model, r) for r in requests]


def test_a_batch_longer_than_its_cache(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from purelm.convert import engine_rows

    monkeypatch.setattr(engine_rows, "FIRST", 1)
    requests = [Request(prompt(i, 4 * i + 1), 15, eos_ids=()) for i in range(3)]
    assert Engine(model).run(requests) == [alone(model, r) for r in requests]


def test_draws_do_not_depend_on_the_batch_and_follow_the_softmax(model: Any) -> None:
    """Many seeds of one prompt: as alone, and in the proportions of the softmax."""
    ids = prompt(1, 6)
    requests = [
        Request(ids, 1, sampling=Sampling(temperature=1.0, top_k=3), seed=i) for i in range(600)
    ]
    drawn = torch.tensor([t for (t,) in Engine(model, slots=8).run(requests)])
    last = model(torch.tensor([ids])).logits[0, -1].detach().float()
    top = last.topk(3)
    counts = torch.stack([(drawn == i).sum() for i in top.indices])
    assert int(counts.sum()) == 600
    # The 1 - 1e-6 quantile of chi-square with 2 degrees of freedom.
    expected = top.values.double().softmax(0) * 600
    assert float(((counts - expected) ** 2 / expected).sum()) < 27.7
    assert [alone(model, r) for r in requests[:5]] == [[int(t)] for t in drawn[:5]]


def test_stop_strings_and_finish_reasons(loaded: Any) -> None:
    model, tokenizer = loaded
    ids = tuple(tokenizer("The capital of France is")["input_ids"])
    engine = Engine(model)
    free = list(engine.stream(Request(ids, 12, eos_ids=())))
    assert [e.finish for e in free] == [None] * 11 + ["length"]
    text = tokenizer.decode([e.token for e in free[:4]])
    stop = text[-2:]
    stopped = list(engine.stream(Request(ids, 12, eos_ids=(), stop_strings=(stop,))))
    assert stopped[-1].finish == "stop" and len(stopped) <= 4
    assert stop in tokenizer.decode([e.token for e in stopped])
    third = free[2].token
    ended = list(engine.stream(Request(ids, 12, eos_ids=(third,))))
    assert ended[-1].finish == "stop" and ended[-1].token == third


def test_cancelling_frees_the_slot_and_harms_no_other(model: Any) -> None:
    engine = Engine(model, slots=2, max_queue=2)
    requests = [Request(prompt(i, 5 + i), 10, eos_ids=()) for i in range(4)]
    ids = [engine.add(r) for r in requests]
    with pytest.raises(BusyError, match="of at most 2 and 2"):
        engine.add(requests[0])
    answers: dict[int, list[int]] = {i: [] for i in ids}
    ends: dict[int, str] = {}
    for n in range(40):
        if n == 3:
            engine.cancel(ids[0])  # runs
            engine.cancel(ids[3])  # waits
            engine.cancel(12345)  # never was
        for event in engine.step():
            if event.token is not None:
                answers[event.id].append(event.token)
            if event.finish is not None:
                ends[event.id] = event.finish
        assert engine.running <= 2
    wanted = {ids[0]: "cancelled", ids[1]: "length", ids[2]: "length", ids[3]: "cancelled"}
    assert ends == wanted and not engine.busy and engine.running == 0
    assert [answers[i] for i in ids[1:3]] == [alone(model, r) for r in requests[1:3]]
    assert answers[ids[0]] == alone(model, requests[0])[:3] and answers[ids[3]] == []
    assert engine.held_blocks == 0


def test_a_failing_request_harms_no_other(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One runs out of tokens to choose, one out of memory in its prefill."""
    from purelm.nn import decode

    vocab = model.spec.vocab
    everything = Sampling(suppress_tokens=tuple(range(vocab)))
    good = [Request(prompt(i, 6), 8, eos_ids=()) for i in range(2)]
    prefill = decode.prefill

    def short_of_memory(
        params: Any, spec: Any, tokens: torch.Tensor, *rest: Any, **more: Any
    ) -> Any:
        if tokens.shape[1] == 9:
            raise torch.OutOfMemoryError("no memory for 9 tokens")
        return prefill(params, spec, tokens, *rest, **more)

    monkeypatch.setattr(decode, "prefill", short_of_memory)
    engine = Engine(model)
    bad = [Request(prompt(1, 4), 8, sampling=everything), Request(prompt(2, 9), 8)]
    ids = [engine.add(r) for r in (good[0], *bad, good[1])]
    events = []
    while engine.busy:
        events += engine.step()
    errors = {e.id: e.error for e in events if e.finish == "error"}
    assert isinstance(errors.pop(ids[1]), InputError)
    assert isinstance(errors.pop(ids[2]), torch.OutOfMemoryError) and not errors
    for request, i in zip(good, (ids[0], ids[3]), strict=True):
        assert [e.token for e in events if e.id == i] == alone(model, request)


def test_a_failing_step_ends_those_that_run_and_no_more(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from purelm.nn import decode

    original, calls = decode.decode, []

    def once(*args: Any, **rest: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("no memory")
        return original(*args, **rest)

    monkeypatch.setattr(decode, "decode", once)
    engine = Engine(model, slots=1)
    requests = [Request(prompt(i, 6), 5, eos_ids=()) for i in range(2)]
    first, second = (engine.add(r) for r in requests)
    events = []
    while engine.busy:
        events += engine.step()
    assert [e.finish for e in events if e.id == first] == [None, None, "error"]
    assert [e.token for e in events if e.id == second] == alone(model, requests[1])


def test_closing_a_stream_cancels(model: Any) -> None:
    engine = Engine(model)
    stream = engine.stream(Request(prompt(0, 5), 50, eos_ids=()))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    engine.step()
    assert engine.running == 0 and not engine.busy


def test_logprobs_are_the_models(model: Any) -> None:
    vocab, exact_params = model.spec.vocab, trees.map_tensors(_double, model.params)
    request = Request(prompt(3, 7), 3, eos_ids=(), logprobs=vocab)
    ids = list(request.prompt)
    for event in Engine(model).stream(request):
        assert event.logprobs is not None and event.token is not None
        tokens = torch.tensor([ids])
        eager = model(tokens).logits[:, -1].detach().log_softmax(-1)
        with torch.no_grad():
            exact = decoder.forward(exact_params, model.spec, tokens)[:, -1].log_softmax(-1)
        found = dict(event.logprobs.top)
        assert_rows(torch.tensor([[found[i] for i in range(vocab)]]), eager, exact)
        assert event.logprobs.logprob == found[event.token]
        assert list(found.values()) == sorted(found.values(), reverse=True)
        ids.append(event.token)


def _double(x: torch.Tensor) -> torch.Tensor:
    return x.double() if x.is_floating_point() else x


@pytest.mark.parametrize(
    ("keywords", "error", "says"),
    [
        ({"prompt": ()}, InputError, "no tokens"),
        ({"prompt": (10**6,)}, InputError, "vocabulary"),
        ({"prompt": (-1,)}, InputError, "-1"),
        ({"max_new_tokens": 10**6}, InputError, "1000005"),
        ({"max_new_tokens": 0}, ArgumentError, "max_new_tokens"),
        ({"logprobs": -1}, ArgumentError, "logprobs"),
        ({"stop_strings": ("",)}, ArgumentError, "stop_strings"),
        ({"stop_strings": (3,)}, ArgumentError, "expected a tuple of texts"),
        ({"prompt": (1.5, 2)}, ArgumentError, "prompt is"),
        ({"prompt": "abc"}, ArgumentError, "prompt is"),
        ({"eos_ids": 5}, ArgumentError, "eos_ids is 5"),
        ({"eos_ids": ("a",)}, ArgumentError, "eos_ids is"),
        ({"seed": 1.5}, ArgumentError, "seed is 1.5"),
        ({"seed": 2**70}, ArgumentError, "64 bits"),
        ({"constraint": {"regex": "a"}}, ArgumentError, "expected a Constraint"),
        ({"sampling": Sampling(sequence_bias=(((10**6,), 1.0),))}, ArgumentError, "sequence_bias"),
    ],
)
def test_bad_requests(model: Any, keywords: Any, error: type[Exception], says: str) -> None:
    engine = Engine(model)
    with pytest.raises(error, match=says):
        engine.add(Request(**{"prompt": prompt(0, 5), "max_new_tokens": 4, **keywords}))
    assert not engine.busy


def test_bad_engine(model: Any) -> None:
    with pytest.raises(ArgumentError, match="slots"):
        Engine(model, slots=0)


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.full)])
def test_requests_leave_no_block_behind(model: Any, count: int) -> None:
    """Of random lengths, many with the same beginnings, some cancelled as they wait or run."""
    g = torch.Generator().manual_seed(0)
    engine = Engine(model, slots=16, max_queue=count, cache_blocks=40, prefill_chunk=32)
    lengths = torch.randint(1, 40, (count, 2), generator=g).tolist()
    ids = [
        engine.add(Request(prompt(i % 5, n), 1 + new // 4, sampling=WARM, seed=i))
        for i, (n, new) in enumerate(lengths)
    ]
    for request_id in ids[::7]:
        engine.cancel(request_id)
    ended = most = 0
    while engine.busy:
        events = engine.step()
        if events and events[-1].id % 11 == 0:
            engine.cancel(events[-1].id)
        ended += sum(event.finish is not None for event in events)
        most = max(most, engine.held_blocks)
    assert ended == count and engine.held_blocks == 0 and not engine._mail
    assert 20 < most <= 40
    # Every block can be had again, whatever is known of it.
    assert len(engine._rows.blocks.take(engine._rows.blocks.count - 1) or ()) <= 40
    assert engine._rows.blocks.room == 0
