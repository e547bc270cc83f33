"""Steps that outlive a call of generate: the same ids, fewer captures, never over other weights.

What a GPU replays, the memory of a step as it was captured, is played by the step as it was then.
"""

import copy
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import hybrids
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from purelm.errors import InputError
from purelm.nn import cache as kv
from purelm.nn import generate as generation
from purelm.nn import kept_steps, lora, prompt_pass
from purelm.nn import tree as trees
from purelm.nn.generate import generate
from purelm.nn.kept_steps import KeptSteps, Step
from purelm.nn.sampling import GREEDY, Sampling

WARM = Sampling(temperature=0.9, top_k=20, repetition_penalty=1.3)
Run = Callable[..., Any]


@pytest.fixture(scope="module")
def captures() -> Any:
    """As on a GPU; which steps were captured, those of prompts aside."""
    made: list[Any] = []

    def capture(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
        made.append(step)
        return step

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "capture", capture)
        patch.setattr(prompt_pass, "capture", lambda step, device: step)
        patch.setattr(generation, "replayable", lambda device: True)
        yield made


def prompts(seed: int, lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor | None]:
    width = max(lengths)
    ids, mask = torch.zeros((2, len(lengths), width), dtype=torch.int64).unbind(0)
    for i, n in enumerate(lengths):
        ids[i, width - n :] = hybrids.prompt(seed + i, 1, n)[0]
        mask[i, width - n :] = 1
    return ids, None if min(lengths) == width else mask


@settings(max_examples=15, deadline=None)
@given(
    mixer=st.sampled_from(sorted(hybrids.MIXERS)),
    calls=st.lists(
        st.tuples(
            st.lists(st.integers(1, 20), min_size=1, max_size=2),
            st.integers(8, 30),
            st.sampled_from([GREEDY, WARM]),
            st.sampled_from([(), tuple(range(10, 16))]),
        ),
        min_size=2,
        max_size=5,
    ),
    seed=st.integers(0, 99),
    chunk=st.sampled_from([5, 512]),
)
def test_calls_give_what_they_give_alone(
    captures: Any, mixer: str, calls: list[Any], seed: int, chunk: int
) -> None:
    """Whatever stands in the memory that they find, and however often they grow."""
    spec, params = hybrids.small(mixer)
    kept = KeptSteps()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kv, "CHUNK", chunk)
        patch.setattr(kv, "ROUND", 4)
        for i, (lengths, new, sampling, eos) in enumerate([*calls, calls[0]]):
            ids, mask = prompts(seed + i, lengths)
            how: dict[str, Any] = {"mask": mask, "max_new_tokens": new, "eos_ids": eos}
            eager, replayed = (
                generate(
                    params,
                    spec,
                    ids,
                    sampling=sampling,
                    generator=torch.Generator().manual_seed(seed),
                    **how,
                    **which,
                )
                for which in ({"graphs": False}, {"kept": kept})
            )
            assert torch.equal(eager, replayed)


def steps(kept: KeptSteps) -> int:
    return sum(kind is Step for kind, _ in kept._steps)


def count(captures: list[Any], run: Callable[[], Any]) -> int:
    before = len(captures)
    run()
    return len(captures) - before


def test_only_a_step_of_a_new_kind_is_captured(captures: Any) -> None:
    spec, params = hybrids.small("full")
    kept = KeptSteps()

    def captured(rows: int = 2, length: int = 5, new: int = 20, **how: Any) -> int:
        g = torch.Generator().manual_seed(0)
        ids = hybrids.prompt(1, rows, length)
        how = {"max_new_tokens": new, "generator": g, "kept": kept} | how
        return count(captures, lambda: generate(params, spec, ids, **how))

    assert captured() == 1
    assert [captured(), captured(length=9), captured(new=30)] == [0, 0, 0]
    assert [captured(rows=3), captured(sampling=WARM), captured(eos_ids=(3,))] == [1, 1, 1]
    assert captured(mask=torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])) == 1
    assert captured(cache_dtype=torch.float8_e4m3fn) == 1
    # Until answers may end, another step; both are kept.
    least = {"sampling": Sampling(min_new_tokens=9), "eos_ids": (3,)}
    assert [captured(**least), captured(**least)] == [2, 0]
    # Longer than a first cache: one more for what it grows to.
    assert [captured(new=600), captured(new=600)] == [2, 0]
    assert captured(kept=None) == captured(kept=None) == 1


def test_weights_written_in_place_are_seen_and_others_captured_anew(captures: Any) -> None:
    spec, params = hybrids.small("full")
    params = trees.map(torch.clone, params)
    worn = lora.init(spec, rank=4, generator=torch.Generator().manual_seed(0))
    worn = trees.map(lambda leaf: replace(leaf, a=leaf.a.double(), b=leaf.b.double()), worn)
    kept, ids, before = KeptSteps(), hybrids.prompt(1, 2, 5), None

    def follows(adapters: Any) -> int:
        """How many captures it takes to give what an eager call gives, which must have changed."""
        nonlocal before
        how = {"max_new_tokens": 20, "adapters": adapters}
        want = generate(params, spec, ids, graphs=False, **how)
        assert before is None or not torch.equal(before, want)
        before = want
        made = len(captures)
        assert torch.equal(generate(params, spec, ids, kept=kept, **how), want)
        return len(captures) - made

    assert follows(worn) == 1
    with torch.no_grad():
        for leaf in trees.leaves(worn):
            leaf.b.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    assert follows(worn) == 0
    with torch.no_grad():
        params["layers"][0]["mlp"]["up"]["weight"].mul_(-1)
    assert follows(worn) == 0
    assert follows(lora.rescale(worn, 3.0)) == 1
    assert follows(trees.map(lambda leaf: replace(leaf, b=leaf.b * -1), worn)) == 1
    assert follows(None) == 1
    params["layers"][1]["mlp"]["up"]["weight"] = -params["layers"][1]["mlp"]["up"]["weight"]
    assert follows(None) == 1


def test_what_is_kept_has_a_bound(captures: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, params = hybrids.small("full")
    kept = KeptSteps()
    monkeypatch.setattr(prompt_pass, "fits", lambda *_: False)

    def run(rows: int) -> None:
        ids = hybrids.prompt(1, rows, 5)
        generate(params, spec, ids, max_new_tokens=9, kept=kept)

    for rows in range(1, kept_steps.MOST + 3):
        run(rows)
    assert len(kept) == kept_steps.MOST
    # The oldest went.
    assert count(captures, lambda: run(kept_steps.MOST + 2)) == 0
    assert count(captures, lambda: run(1)) == 1
    one = kv.empty(spec, 1, kv.ROUND, padded=False, dtype=torch.float64, device="cpu")
    size = trees.nbytes(one.layers)
    monkeypatch.setattr(kept_steps, "_memory", lambda device: 5.5 * size / kept_steps.SHARE)
    run(2)
    run(3)  # with which the oldest, of one row, goes
    assert len(kept) == 2 and count(captures, lambda: run(2)) == 0
    run(6)  # which alone is too much
    assert len(kept) == 2 and count(captures, lambda: run(3)) == 0


def test_what_is_kept_gives_way(captures: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """To a call that finds no memory beside it; alone, that call fails."""
    spec, params = hybrids.small("full")
    kept, empty = KeptSteps(), kv.empty

    def run(rows: int) -> torch.Tensor:
        return generate(params, spec, hybrids.prompt(1, rows, 5), max_new_tokens=9, kept=kept)

    run(1)

    def full(spec: Any, batch: int, *rest: Any, **named: Any) -> kv.Cache:
        if len(kept) or batch > 2:
            raise torch.OutOfMemoryError("no room")
        return empty(spec, batch, *rest, **named)

    monkeypatch.setattr(kv, "empty", full)
    run(2)
    assert steps(kept) == 1
    with pytest.raises(torch.OutOfMemoryError):
        run(3)


def test_who_fails_or_is_not_done_leaves_nothing_behind(captures: Any) -> None:
    spec, params = hybrids.small("full")
    kept, ids = KeptSteps(), hybrids.prompt(1, 2, 5)
    how: dict[str, Any] = {"max_new_tokens": 12, "kept": kept}
    want = generate(params, spec, ids, **how)
    inner: list[torch.Tensor] = []

    def meanwhile(_: torch.Tensor) -> None:
        if not inner:
            inner.append(generate(params, spec, ids, **how))

    # A call amid another takes no memory of it.
    assert torch.equal(generate(params, spec, ids, on_token=meanwhile, **how), want)
    assert torch.equal(inner[0], want)

    def stops(_: torch.Tensor) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(params, spec, ids, on_token=stops, **how)
    assert steps(kept) == 0
    generate(params, spec, ids, **how)
    broken = trees.map(lambda t: t * float("nan"), params)
    with pytest.raises(InputError, match="not finite"):
        generate(broken, spec, ids, **how)
    assert steps(kept) == 1
    assert len(copy.deepcopy(kept)) == 0


class Small:
    """A step whose size takes a while to say, as those of many layers do."""

    captured, device = True, torch.device("cpu")

    @property
    def nbytes(self) -> int:
        time.sleep(1e-4)
        return 1


def test_calls_in_several_threads_do_not_meet() -> None:
    kept = KeptSteps()

    def calls(first: int) -> None:
        for i in range(first, first + 30):
            kept.give(i, Small())
            kept.take(Small, i)
            kept.give(i, Small())

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(calls, range(0, 400, 100)))
    assert 0 < len(kept) <= kept_steps.MOST
