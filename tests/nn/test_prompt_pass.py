"""Prompts in padded passes: what they compute, and what is kept of them."""

from collections.abc import Callable
from typing import Any

import hybrids
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from purelm.nn import cache as kv
from purelm.nn import generate as generation
from purelm.nn import pages, prompt_pass
from purelm.nn.decode import decode, prefill
from purelm.nn.generate import generate
from purelm.nn.kept_steps import KeptSteps
from purelm.nn.pages import PAGE
from purelm.nn.prompt import layout_of

# The mixers whose layers have no state.
PADDED = [kind for kind, (_, recurrent) in hybrids.MIXERS.items() if recurrent is None]


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """As on a GPU; which passes were captured."""
    made: list[Any] = []

    def capture(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
        made.append(step)
        return step

    monkeypatch.setattr(prompt_pass, "capture", capture)
    monkeypatch.setattr(generation, "replayable", lambda device: True)
    return made


def close(ours: torch.Tensor, exact: torch.Tensor) -> None:
    """In fp64 what is left is rounding."""
    assert (ours - exact).abs().max() <= 1e-10 * exact.abs().max()


@settings(max_examples=20, deadline=None)
@given(
    kind=st.sampled_from(PADDED),
    calls=st.lists(st.lists(st.integers(1, 40), min_size=2, max_size=2), min_size=2, max_size=4),
)
def test_a_pass_is_the_prompts_alone(kind: str, calls: list[list[int]]) -> None:
    """Logits, and those of the next token over the cache that is handed over; of prompts padded in
    front to one width, after whatever the pass held before."""
    spec, params = hybrids.small(kind)
    kept = KeptSteps()
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(prompt_pass, "capture", lambda step, device: step)
        for seed, lengths in enumerate(calls):
            width = max(lengths)
            rows = [hybrids.prompt(seed + i, 1, n)[0] for i, n in enumerate(lengths)]
            ids = torch.stack([torch.cat([r.new_zeros(width - len(r)), r]) for r in rows])
            begin = torch.tensor([width - n for n in lengths])
            real = torch.arange(width) >= begin[:, None] if min(lengths) < width else None
            cache = kv.empty(
                spec, 2, 64, padded=real is not None, dtype=torch.float64, device="cpu"
            )
            logits, cache = prompt_pass.prefill(
                params, spec, ids, real, cache, adapters=None, kept=kept
            )
            further, _ = decode(params, spec, torch.tensor([3, 4]), cache)
            for i, row in enumerate(rows):
                own = kv.empty(spec, 1, 64, padded=False, dtype=torch.float64, device="cpu")
                want, own = prefill(params, spec, row[None], own, layout=layout_of(row[None], None))
                close(logits[i], want[0])
                close(further[i], decode(params, spec, torch.tensor([3 + i]), own)[0][0])


def test_a_length_is_captured_when_it_comes_again(captures: list[Any]) -> None:
    """However many tokens are asked for and by whatever rules; the ids are those of no graphs."""
    spec, params = hybrids.small("full")
    kept = KeptSteps()

    def captured(rows: int, length: int, new: int = 2, **how: Any) -> int:
        before, ids = len(captures), hybrids.prompt(length, rows, length)
        out = generate(params, spec, ids, max_new_tokens=new, kept=kept, **how)
        want = generate(params, spec, ids, max_new_tokens=new, graphs=False, **how)
        assert torch.equal(out, want)
        return len(captures) - before

    assert [captured(1, 5), captured(1, 7), captured(1, 30), captured(1, 32)] == [0, 1, 0, 0]
    assert [captured(1, 33), captured(1, 48), captured(2, 5), captured(2, 6)] == [0, 1, 0, 1]
    # In rules that the host runs too.
    hook: dict[str, Any] = {"adjust": lambda ids, logits: logits}
    assert [captured(1, 20, **hook), captured(1, 20, new=3, **hook)] == [0, 0]


def test_what_cannot_be_captured_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Any] = []
    monkeypatch.setattr(prompt_pass, "capture", lambda step, device: tried.append(step))
    monkeypatch.setattr(generation, "replayable", lambda device: True)
    spec, params = hybrids.small("full")
    kept, ids = KeptSteps(), hybrids.prompt(0, 1, 5)
    want = generate(params, spec, ids, max_new_tokens=2, graphs=False)
    for _ in range(4):
        assert torch.equal(generate(params, spec, ids, max_new_tokens=2, kept=kept), want)
    assert len(tried) == 1


def test_what_is_not_run_so(captures: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """States would take the padding in, and a long prompt keeps the GPU busy by itself."""
    passes: list[int] = []
    prefill_ = prompt_pass.prefill

    def noted(params: Any, spec: Any, ids: torch.Tensor, *rest: Any, **how: Any) -> Any:
        passes.append(ids.shape[1])
        return prefill_(params, spec, ids, *rest, **how)

    monkeypatch.setattr(prompt_pass, "prefill", noted)
    for kind in hybrids.MIXERS:
        spec, params = hybrids.small(kind)
        generate(params, spec, hybrids.prompt(0, 2, 5), max_new_tokens=1)
        assert bool(passes) == (kind in PADDED)
        passes.clear()
    spec, params = hybrids.small("full")
    monkeypatch.setattr(prompt_pass, "MOST", 96)
    for length in (32, 33, 48, 49):
        generate(params, spec, hybrids.prompt(0, 2, length), max_new_tokens=1)
    assert passes == [32, 33, 48]
    # Never longer than the positions that the model has.
    assert [prompt_pass.length_of(spec, n) for n in (1, 32, 33, 1025, 1600, 2048)] == [
        *(32, 32, 48, 1536, 2048, 2048),
    ]
    assert [prompt_pass.rows_of(n) for n in (1, 2, 3, 4, 5, 7, 9, 17)] == [1, 2, 3, 4, 6, 8, 12, 24]


def test_pages_are_filled_by_block() -> None:
    """What stands behind a prompt goes to block 0, which is nobody's."""
    spec, _ = hybrids.small("full")
    own = pages.empty(
        spec, 2, 9, dtype=torch.float64, columns=torch.float64, device=torch.device("cpu")
    )
    cache = kv.empty(spec, 2, 3 * PAGE, padded=False, dtype=torch.float64, device="cpu")
    for state in cache.layers:
        for x in state.values():
            x.normal_()
    pages.fill(own, cache, torch.tensor([5, 2, 0, 7, 0, 0]))
    for ours, theirs in zip(own.layers, cache.layers, strict=True):
        for name, x in theirs.items():
            rows = x.unflatten(1, (3, PAGE))
            assert torch.equal(ours[name][[5, 2]], rows[0, :2])
            assert torch.equal(ours[name][7], rows[1, 0])
            assert not ours[name][[1, 3, 4, 6, 8]].any()
