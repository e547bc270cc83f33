"""`use_gradient_checkpointing="auto"`: planned at each shape, heeding the budget, as exact."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import folders
import pytest
import torch
from bridged import ids
from live_bytes import LiveBytes

from purelm import FastLanguageModel, graphed
from purelm.convert import memory_plan
from purelm.errors import ArgumentError
from purelm.nn import decoder, dense_weights, plan, tree
from purelm.nn.residuals import KEEP
from purelm.quant import linear
from purelm.quant.nf4 import NF4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    folders.whole(path)
    return path


def load(folder: Path, budget: int | None = None, checkpointing: Any = "auto") -> Any:
    model, _ = FastLanguageModel.from_pretrained(
        str(folder),
        dtype=torch.float32,
        load_in_16bit=True,
        device_map="cpu",
        use_gradient_checkpointing=checkpointing,
        memory_budget=budget,
    )
    return FastLanguageModel.get_peft_model(model, r=4, use_gradient_checkpointing=checkpointing)


def step(model: Any, batch: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    loss = model(batch, labels=batch).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def test_gradients_are_those_of_every_other_choice(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    want = step(load(folder, checkpointing=False), ids())
    free = load(folder)
    assert all(torch.equal(a, b) for a, b in zip(step(free, ids()), want, strict=True))
    (plan,) = free.plans.values()
    assert set(plan.policies) == {KEEP}
    tight = load(folder, budget=plan.peak - 1)
    assert all(torch.equal(a, b) for a, b in zip(step(tight, ids()), want, strict=True))
    (tighter,) = tight.plans.values()
    assert set(tighter.policies) != {KEEP} and tighter.peak < plan.peak
    assert str(tighter) in tight.explain() and str(tighter) in tight.report()
    assert capsys.readouterr().err.count("purelm: ") == 2
    step(tight, ids())
    assert len(tight.plans) == 1 and not capsys.readouterr().err
    step(tight, ids(rows=1))
    assert len(tight.plans) == 2


def test_what_a_step_allocates_is_planned(folder: Path) -> None:
    """With adapters that outweigh all else, whose casts are there from forward to backward."""
    model, _ = FastLanguageModel.from_pretrained(
        str(folder), dtype=torch.bfloat16, load_in_16bit=True, device_map="cpu"
    )
    model = FastLanguageModel.get_peft_model(model, r=512, use_gradient_checkpointing="auto")
    batch = ids(rows=1)
    trained = [p for p in model.parameters() if p.requires_grad]
    with LiveBytes() as live:
        model(batch, labels=batch).loss.backward()
    (plan,) = model.plans.values()
    there = sum(p.nbytes for p in model.parameters())
    moments = 2 * sum(p.nbytes for p in trained)
    assert live.most <= plan.peak - there - moments


def four_bits(folder: Path, budget: int | None = None, checkpointing: Any = "auto") -> Any:
    model, _ = FastLanguageModel.from_pretrained(
        str(folder), dtype=torch.bfloat16, device_map="cpu", memory_budget=budget,
        use_gradient_checkpointing=checkpointing,
    )  # fmt: skip
    given: Any = {"init_lora_weights": "gaussian", "use_gradient_checkpointing": checkpointing}
    return FastLanguageModel.get_peft_model(model, r=4, **given)


def test_weights_that_stay_dequantized(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same step to the bit, which dequantizes nothing of these layers; only training sees them,
    and only while the packed weights are what they were.
    """
    want = step(four_bits(folder, checkpointing=False), ids())
    model = four_bits(folder)
    found = step(model, ids())
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    (plan,) = model.plans.values()
    layers = len(model.spec.layers)
    assert plan.room == layers == model.dense.layers
    weights = [leaf for leaf in tree.leaves(model.params["layers"]) if isinstance(leaf, NF4)]
    assert len(weights) == 7 * layers and model.params is model.base_params
    assert model.dense.nbytes == 2 * sum(leaf.numel() for leaf in weights)
    made: list[Any] = []
    true = linear.dequantize
    monkeypatch.setattr(linear, "dequantize", lambda *a: made.append(a) or true(*a))
    step(model, ids())
    assert not made
    with torch.no_grad():
        model(ids(), labels=ids())
    assert made
    with torch.no_grad():  # of one layer alone
        made.clear()
        read = graphed._Read(model)
        assert not read.moved()
        tree.tensors(model.params["layers"][1]["mlp"]["down"])[0].bitwise_not_()
        assert read.moved()
    other = step(model, ids())
    assert not model.dense.stale
    assert len(made) == 7
    again = four_bits(folder, checkpointing=False)
    tree.tensors(again.params["layers"][1]["mlp"]["down"])[0].bitwise_not_()
    assert all(torch.equal(a, b) for a, b in zip(step(again, ids()), other, strict=True))
    model.for_inference()
    assert not model.dense.nbytes


def test_steps_of_many_tokens_have_no_dequantized_weights(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But those that are there for steps of few."""
    monkeypatch.setattr(plan, "FEW_TOKENS", 30)
    model = four_bits(folder)
    layers = len(model.spec.layers)
    for rows, kept in ((2, 0), (1, layers), (2, layers)):
        step(model, ids(rows=rows))
        assert model.dense.layers == kept


def test_weights_that_stay_dequantized_give_way(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """To a shape with less room, and, where memory runs out, for good, which is said."""
    free = four_bits(folder)
    step(free, ids())
    (whole,) = free.plans.values()
    sizes = dense_weights.bytes_of(free.params, 2)
    model = four_bits(folder, budget=whole.peak + sum(sizes[1:]))
    for rows, kept in ((1, len(sizes)), (2, len(sizes) - 1), (1, len(sizes) - 1)):
        step(model, ids(rows=rows))
        assert model.dense.layers == kept
    assert model.dense.nbytes == sum(sizes[1:])

    def none(*args: Any, **more: Any) -> Any:
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(decoder, "hidden", none)
        with pytest.raises(torch.OutOfMemoryError):
            step(model, ids())
    step(model, ids(rows=3))
    assert not model.dense.nbytes
    free.dense.keep(1)
    with monkeypatch.context() as patch:
        patch.setattr(dense_weights, "weight_of", none)
        step(free, ids(2))
    assert not free.dense.layers and "ran out over dequantized weights" in caplog.text


@pytest.mark.parametrize("later", [False, True])
def test_free_memory_is_left_for_gradients_and_moments(
    folder: Path, monkeypatch: pytest.MonkeyPatch, later: bool
) -> None:
    """Of what is free before the first step the optimizer takes its part; of what is free after it
    no more.
    """
    keeps = load(folder)
    step(keeps, ids())
    (whole,) = keeps.plans.values()
    model = load(folder)
    trained = [p for p in model.parameters() if p.requires_grad]
    if later:
        for p in trained:
            p.grad = torch.zeros_like(p)
    there = sum(p.nbytes for p in model.parameters()) + later * sum(p.nbytes for p in trained)
    monkeypatch.setattr(memory_plan, "_free", lambda device: whole.peak - there - 1)
    model(ids(), labels=ids())
    (plan,) = model.plans.values()
    assert plan.budget == whole.peak - 1 and set(plan.policies) != {KEEP}


def test_rows_longer_than_a_chunk_are_planned_with_their_mask(folder: Path) -> None:
    """Llama 4's: attention under the mask of chunks runs again, whole rows or not."""
    model = load(folder)
    layers = model.spec.layers
    for chunk, masked in ((23, False), (8, True)):
        own = [replace(one, attention=replace(one.attention, chunk=chunk)) for one in layers]
        model.spec = replace(model.spec, layers=tuple(own))
        model.plans.clear()
        step(model, ids())
        (plan,) = model.plans.values()
        assert ("for a mask" in str(plan)) == masked


def test_weights_that_are_rounded_from_now_on_are_planned_anew(folder: Path) -> None:
    model = load(folder)
    for scheme, rounded in ((None, False), ("int8", True), (None, False)):
        model.round_weights(scheme)
        step(model, ids())
        (plan,) = model.plans.values()
        assert ("rounded in training" in str(plan)) == rounded


def test_a_budget_below_the_least(folder: Path) -> None:
    model = load(folder, budget=1000)
    with pytest.raises(ArgumentError, match="2 x 23 tokens: the least possible is"):
        model(ids(), labels=ids())
    model.eval()(ids())  # nothing is kept there


@pytest.mark.parametrize("budget", [0, -1, 2.5, "8GB", True])
def test_what_is_no_budget(folder: Path, budget: Any) -> None:
    with pytest.raises(ArgumentError, match="memory_budget is"):
        FastLanguageModel.from_pretrained(
            str(folder), use_gradient_checkpointing="auto", memory_budget=budget
        )


def test_a_budget_that_nothing_would_heed(folder: Path) -> None:
    with pytest.raises(ArgumentError, match="needs use_gradient_checkpointing='auto'"):
        FastLanguageModel.from_pretrained("nowhere", memory_budget=2**30)
    model, _ = FastLanguageModel.from_pretrained(
        str(folder), memory_budget=2**30, use_gradient_checkpointing="auto"
    )
    with pytest.raises(ArgumentError, match="needs use_gradient_checkpointing='auto'"):
        FastLanguageModel.get_peft_model(model)


def test_memory_that_runs_out_says_what_was_planned(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **keywords: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(decoder, "hidden", full)
    for model, words in (
        (load(folder), "the memory plan was: 2 x 23 tokens, .* lower memory_budget"),
        (load(folder, checkpointing=False), "policy was Policy.* 'auto'"),
    ):
        with pytest.raises(torch.OutOfMemoryError) as caught:
            model(ids(), labels=ids())
        (note,) = caught.value.__notes__
        assert re.search(words, note)
        assert memory_plan.advice(model) == note
