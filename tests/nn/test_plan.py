"""The planner: within its budget, monotone in it, and right about what it counts."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from purelm.errors import ArgumentError
from purelm.nn import lora, loss, params, tree
from purelm.nn.plan import GIB, Plan, plan
from purelm.nn.residuals import KEEP, Policy, bytes_per_token, per_layer
from purelm.nn.spec import AttentionSpec, LayerSpec, MLPSpec, ModelSpec, NormSpec, RopeSpec
from purelm.nn.step_memory import peak, residual_bytes
from purelm.nn.step_shape import Shape


def llama(dim: int, layers: int, f: int, heads: int, head_dim: int) -> ModelSpec:
    attention = AttentionSpec(heads, 8, head_dim, head_dim**-0.5, RopeSpec(head_dim, 1e4))
    layer = LayerSpec(NormSpec(1e-5), attention, MLPSpec(f))
    return ModelSpec(128256, dim, (layer,) * layers, NormSpec(1e-5), 131072)


SMALL, LARGE = llama(2048, 16, 8192, 32, 64), llama(4096, 32, 14336, 32, 128)
MIXED = replace(
    LARGE,
    layers=tuple(
        replace(
            layer,
            attention=replace(layer.attention, window=512 if i % 2 else None),
            mlp=MLPSpec(14336 if i % 3 else 4096),
            parallel=i == 5,
            post_norm=i == 6,
        )
        for i, layer in enumerate(LARGE.layers)
    ),
)
CAPPED = replace(
    SMALL,
    layers=tuple(
        replace(layer, attention=replace(layer.attention, softcap=50.0)) for layer in SMALL.layers
    ),
)

specs = st.sampled_from([SMALL, LARGE, MIXED, CAPPED])
shapes = st.builds(
    Shape, st.integers(1, 16), st.integers(1, 40000), st.sampled_from([2, 4]), st.booleans()
)


def kept_bytes(spec: ModelSpec, found: Plan) -> int:
    """What a plan keeps on the device, counted apart from the planner."""
    return found.shape.tokens * sum(
        size
        for layer, policy in zip(spec.layers, found.policies, strict=True)
        for name, size in bytes_per_token(layer, spec.dim, found.shape.itemsize).items()
        if getattr(policy, name) == "keep"
    )


@given(specs, shapes, st.integers(0, 200 * GIB), st.integers(0, 50 * GIB), st.integers(0, 9 * GIB))
def test_within_the_budget_and_monotone_in_it(
    spec: ModelSpec, shape: Shape, budget: int, more: int, fixed: int
) -> None:
    try:
        found = plan(spec, shape, budget=budget, fixed=fixed)
    except ArgumentError as problem:
        least = int(str(problem).split("the least possible is ")[1].split()[0].replace(",", ""))
        assert budget < least
        assert plan(spec, shape, budget=least, fixed=fixed).peak == least
        return
    assert found.peak == peak(spec, shape, found.policies, fixed) <= budget
    larger = plan(spec, shape, budget=budget + more, fixed=fixed)
    assert larger.peak >= found.peak and kept_bytes(spec, larger) >= kept_bytes(spec, found)
    for before, after in zip(found.policies, larger.policies, strict=True):
        for name in ("x", "qkv", "out", "mid", "gate_up"):
            assert getattr(before, name) in (getattr(after, name), "offload", "recompute")
            assert getattr(before, name) != "keep" or getattr(after, name) == "keep"


@given(specs, shapes)
def test_all_is_kept_where_there_is_room(spec: ModelSpec, shape: Shape) -> None:
    found = plan(spec, shape, budget=2**60, fixed=0)
    assert set(found.policies) == {KEEP} and "all kept" in str(found)


@given(shapes, st.integers(0, 16 * 10**8), st.integers(0, 10**9))
def test_weights_are_kept_of_what_all_residuals_leave(shape: Shape, left: int, more: int) -> None:
    """Of the last layers, no more than fit, and none before a residual."""
    sizes = [10**8] * 16
    whole = plan(SMALL, shape, budget=2**60, fixed=0)
    found = plan(SMALL, shape, budget=whole.peak + left, fixed=0, dense=sizes)
    assert found.policies == whole.policies and found.room == left // 10**8
    assert found.peak == whole.peak and found.dense == found.room * 10**8 <= left
    assert found.gains == (found.room > 0 and shape.tokens <= 8192)
    assert (f"the last {found.room} layers" in str(found)) == found.gains
    larger = plan(SMALL, shape, budget=found.budget + more, fixed=0, dense=sizes)
    assert larger.room >= found.room
    tight = plan(SMALL, shape, budget=whole.peak - 1, fixed=0, dense=sizes)
    assert not tight.room and tight.policies != whole.policies


@given(st.integers(8192, 40000), st.integers(16, 79))
def test_long_rows_never_run_attention_again(length: int, gib: int) -> None:
    shape = Shape(1, length, 2)
    found = plan(LARGE, shape, budget=gib * GIB, fixed=6 * GIB)
    assert all(policy.out != "recompute" for policy in found.policies)


def test_nothing_leaves_a_device_without_a_host() -> None:
    shape = Shape(8, 2048, 2, offload=False)
    found = plan(LARGE, shape, budget=30 * GIB, fixed=6 * GIB)
    assert not any(policy.offloads for policy in found.policies)
    assert len(set(found.policies)) > 1 and found.policies[-1] != found.policies[0]


def test_copies_that_cannot_hide_are_the_first_to_go() -> None:
    """Few tokens give a copy no time: kept ahead of what would be run again."""
    for shape, sent_last in ((Shape(8, 2048, 2), True), (Shape(1, 64, 2), False)):
        all_kept = plan(LARGE, shape, budget=2**60, fixed=0).peak
        found = plan(LARGE, shape, budget=all_kept - shape.tokens * 4096, fixed=0)
        assert any(policy.offloads for policy in found.policies) == sent_last, found


def test_gradients_equal_those_of_keep() -> None:
    """To the bit, whatever mixture of policies a budget leads to."""
    attention = AttentionSpec(2, 1, 8, 8**-0.5, RopeSpec(8, 1e4))
    layer = LayerSpec(NormSpec(1e-5), attention, MLPSpec(24))
    spec = ModelSpec(30, 16, (layer,) * 4, NormSpec(1e-5), 64, init_std=0.3)
    g = torch.Generator().manual_seed(0)
    base = params.init(spec, generator=g)
    adapters = lora.init(spec, generator=g, rank=2, start="random")
    trained = [t.requires_grad_() for t in tree.tensors(adapters)]
    ids = torch.randint(0, 30, (2, 7), generator=g)

    def grads(residuals: Any) -> list[torch.Tensor]:
        value = loss.loss(base, spec, ids, ids, adapters=adapters, residuals=residuals)
        return [value, *torch.autograd.grad(value, trained)]

    want = grads(KEEP)
    mixtures = set()
    for offload in (True, False):
        shape = Shape(2, 7, 4, offload)
        low, high = (
            plan(spec, shape, budget=b, fixed=0).peak for b in (_least(spec, shape), 2**40)
        )
        for budget in range(low, high + 1, max(1, (high - low) // 12)):
            found = plan(spec, shape, budget=budget, fixed=0).policies
            mixtures.add(found)
            got = grads(found)
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), found
    assert len(mixtures) > 6


def _least(spec: ModelSpec, shape: Shape) -> int:
    with pytest.raises(ArgumentError, match="least possible") as problem:
        plan(spec, shape, budget=0, fixed=0)
    return int(str(problem.value).split("the least possible is ")[1].split()[0].replace(",", ""))


def test_what_is_trained_itself_runs_again_whole() -> None:
    """No policy helps: what it takes is counted, said, and refused where it is too much."""
    plain = Shape(8, 2048, 2)
    shape = replace(plain, trained=True)
    found = plan(LARGE, shape, budget=2**60, fixed=GIB)
    assert "layers 0-31: its input kept and all run again, for trained weights" in str(found)
    assert set(found.policies) == {KEEP} and found.peak > _least(LARGE, plain)
    hidden = shape.tokens * 4096 * 2
    assert found.peak > GIB + 32 * hidden + 5 * shape.tokens * 14336 * 2
    with pytest.raises(ArgumentError, match="least possible"):
        plan(LARGE, shape, budget=found.peak - 1, fixed=GIB)


@pytest.mark.parametrize(("why", "part"), [("masked", "attention"), ("dora", "MLP")])
def test_parts_that_run_again_keep_nothing_of_their_own(why: str, part: str) -> None:
    """Their halves' inputs are kept or sent away, as the policy says, and the rest with them."""
    plain = Shape(8, 2048, 2)
    shape = replace(plain, **{why: True}, dropout=why == "dora")
    found = plan(LARGE, shape, budget=2**60, fixed=GIB)
    said = {"masked": "a mask", "dora": "DoRA with dropout"}[why]
    assert f"{part} run again, for {said}" in str(found)
    sizes = bytes_per_token(LARGE.layers[0], 4096, 2)
    gone = sizes["qkv"] + sizes["out"] + (sizes["gate_up"] if why == "dora" else 0)
    kept, all_kept = (
        sum(residual_bytes(LARGE.layers[0], LARGE, each).values()) for each in (shape, plain)
    )
    assert kept == all_kept - shape.tokens * gone
    tight = plan(LARGE, shape, budget=found.peak - 1, fixed=GIB)
    assert any(policy.offloads for policy in tight.policies)
    masked = peak(LARGE, replace(plain, masked=True), found.policies, 0)
    longer = peak(LARGE, Shape(4, 4096, 2, masked=True), found.policies, 0)
    assert longer - masked >= 3 * (4 * 4096**2 - 8 * 2048**2)


def test_tiles_need_less() -> None:
    shape = Shape(1, 65536, 2)
    wide = replace(
        shape, dora=True, dropout=True
    )  # by autograd, whose MLP needs more than its attention
    assert _least(LARGE, replace(wide, tile=4096)) < _least(LARGE, wide) - GIB
    found = plan(LARGE, replace(shape, tile=4096), budget=2**60, fixed=0)
    assert {(p.tile, p.gate_up, p.qkv) for p in found.policies} == {(4096, "recompute", "keep")}


def test_one_policy_a_layer() -> None:
    assert per_layer(KEEP, 3) == (KEEP,) * 3
    mixed = (KEEP, Policy(qkv="recompute"))
    assert per_layer(mixed, 2) is mixed
    with pytest.raises(ArgumentError, match="2 policies.* 3 layers"):
        per_layer(mixed, 3)
