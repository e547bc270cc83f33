"""The parts of the loop: order of rows, learning rate, the step and evaluation."""

import copy
import gc
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from live_bytes import LiveBytes

from purelm import FastLanguageModel, graphed, graphed_update, optimizers, training
from purelm.errors import ArgumentError, DataError, InputError, TrainingError
from purelm.graphed_training import Graphs, graphs_for
from purelm.graphed_update import GraphedUpdate
from purelm.rows import Row, collate


def load(folder: Path, **options: Any) -> Any:
    model, _ = FastLanguageModel.from_pretrained(
        str(folder), dtype=torch.float32, load_in_16bit=True, device_map="cpu"
    )
    return FastLanguageModel.get_peft_model(model, r=4, **options)


def drawn(count: int, seed: int = 0) -> list[Row]:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        length = int(torch.randint(3, 20, (), generator=generator))
        ids = torch.randint(4, 290, (length,), generator=generator).tolist()
        start = int(torch.randint(0, length - 1, (), generator=generator))
        rows.append(Row(tuple(ids), tuple([-100] * start + ids[start:])))
    return rows


@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 4), st.integers(0, 99))
def test_every_epoch_visits_every_row_once(n: int, batch: int, acc: int, seed: int) -> None:
    plan = training.plan_steps(n, batch, acc, max_steps=None, epochs=2, seed=seed)
    assert plan.steps == 2 * plan.steps_per_epoch
    steps = [training.batches(plan, step) for step in range(plan.steps)]
    for epoch in range(2):
        some = steps[epoch * plan.steps_per_epoch : (epoch + 1) * plan.steps_per_epoch]
        assert sorted(i for window in some for b in window for i in b) == list(range(n))
    assert all(1 <= len(b) <= batch for window in steps for b in window)
    assert all(1 <= len(window) <= acc for window in steps)
    assert plan.epoch(plan.steps) == 2 and plan.epoch(0) == 0
    # A step is what it is, whatever ran before it.
    assert training.batches(plan, plan.steps - 1) == steps[-1]


def test_each_epoch_and_seed_has_its_own_order() -> None:
    plans = [training.plan_steps(50, 50, 1, max_steps=2, epochs=1, seed=s) for s in (0, 1)]
    orders = [training.batches(plan, step)[0][0] for plan in plans for step in (0, 1)]
    assert len({tuple(training.batches(plan, step)[0]) for plan in plans for step in (0, 1)}) == 4
    assert len(orders) == 4


@given(
    st.sampled_from(["cosine", "linear", "constant"]),
    st.integers(0, 20),
    st.integers(1, 60),
)
def test_the_rate_rises_then_falls(kind: Any, warmup: int, steps: int) -> None:
    schedule = training.Schedule(kind, 0.5, warmup, steps)
    rates = [training.learning_rate(schedule, step) for step in range(steps)]
    assert all(0 < rate <= 0.5 for rate in rates)
    top = min(warmup, steps)
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    if warmup < steps:
        assert rates[warmup] == 0.5


def test_cosine_and_linear_equal_torch() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    schedule = training.Schedule("cosine", 0.1, 0, 20)
    for step in range(20):
        assert math.isclose(
            training.learning_rate(schedule, step), cosine.get_last_lr()[0], rel_tol=1e-9
        )
        optimizer.step()
        cosine.step()
    linear = training.Schedule("linear", 0.1, 0, 20)
    assert math.isclose(training.learning_rate(linear, 5), 0.075)


def step_once(model: Any, window: list[list[Row]], rate: float = 1e-2) -> training.StepResult:
    optimizer = optimizers.optimizer(model.train(), weight_decay=0.01)
    return training.train_step(
        model, optimizer, window, step=0, rate=rate, max_grad_norm=1.0, pad_id=3
    )


@pytest.mark.parametrize("packing", [False, True])
def test_smoothed_labels_and_z_loss(folder: Path, packing: bool) -> None:
    """The step's loss and gradients are those of torch's cross entropy over whole logits."""
    rows, smoothing, z_loss = drawn(5), 0.2, 1e-2
    model = load(folder, init_lora_weights="gaussian").train()
    params = [p for p in model.parameters() if p.requires_grad]
    total = torch.zeros(())
    for row in rows:
        scores = model(torch.tensor([row.ids])).logits[0, :-1]
        labels = torch.tensor(row.labels[1:])
        total = total + F.cross_entropy(scores, labels, reduction="sum", label_smoothing=smoothing)
        total = total + z_loss * scores[labels != -100].logsumexp(-1).square().sum()
    total = total / sum(row.learned for row in rows)
    norm = torch.stack([g.norm() for g in torch.autograd.grad(total, params)]).norm()
    found = training.train_step(
        model,
        optimizers.optimizer(model, weight_decay=0.0),
        [rows[:3], rows[3:]],
        step=0,
        rate=1e-3,
        max_grad_norm=1.0,
        pad_id=3,
        packing=packing,
        label_smoothing=smoothing,
        z_loss=z_loss,
    )
    assert found.loss == pytest.approx(total.item(), rel=1e-5)
    assert found.grad_norm == pytest.approx(norm.item(), rel=1e-4)


def test_accumulation_equals_one_large_batch(folder: Path) -> None:
    rows = drawn(8)
    one, many = load(folder), load(folder)
    # Batches of unequal size, so that a mean of means would differ.
    whole = step_once(one, [rows])
    parts = step_once(many, [rows[:1], rows[1:6], rows[6:]])
    assert math.isclose(whole.loss, parts.loss, rel_tol=1e-5)
    assert math.isclose(whole.grad_norm, parts.grad_norm, rel_tol=1e-4)
    assert whole.tokens == parts.tokens == sum(len(row.ids) for row in rows)


def test_packed_rows_make_the_same_step(folder: Path) -> None:
    rows = drawn(6)
    padded, packed = load(folder), load(folder)
    optimizer = optimizers.optimizer(packed.train(), weight_decay=0.01)
    want = step_once(padded, [rows[:4], rows[4:]])
    given = {"step": 0, "rate": 1e-2, "max_grad_norm": 1.0, "pad_id": 3, "packing": True}
    found = training.train_step(packed, optimizer, [rows[:4], rows[4:]], **given)
    assert math.isclose(found.loss, want.loss, rel_tol=1e-5)
    assert math.isclose(found.grad_norm, want.grad_norm, rel_tol=1e-4)
    assert found.tokens == want.tokens
    both = (training.evaluate(packed, rows, batch=4, pad_id=3, packing=on) for on in (True, False))
    assert math.isclose(*both, rel_tol=1e-5)


def test_packing_is_chosen_only_where_it_is_fused(folder: Path) -> None:
    assert not training.packs(load(folder))  # on a CPU a mask would keep documents apart


def test_a_step_equals_plain_torch(folder: Path) -> None:
    rows = drawn(4)
    ours, plain = load(folder), load(folder).train()
    result = step_once(ours, [rows])
    params = [p for p in plain.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-2, weight_decay=0.01)
    batch = collate(rows, 3)
    logits = plain(batch["input_ids"], batch["attention_mask"]).logits
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    )
    torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_(params, 1.0)
    optimizer.step()
    assert math.isclose(result.loss, loss.item(), rel_tol=1e-5)
    for p, q in zip(training.trained(ours).values(), params, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_evaluation_weighs_tokens_however_it_is_batched(folder: Path) -> None:
    rows = drawn(7)
    model = load(folder, lora_dropout=0.5).train()
    expected, count = 0.0, 0
    for row in rows:
        ids = torch.tensor([row.ids])
        target = torch.tensor(row.labels[1:])
        with torch.no_grad():
            logits = model.eval()(ids).logits[0, :-1]
        expected += float(torch.nn.functional.cross_entropy(logits, target, reduction="sum"))
        count += row.learned
    model.train()
    for batch in (1, 3, 7):
        found = training.evaluate(model, rows, batch=batch, pad_id=3)
        assert math.isclose(found, expected / count, rel_tol=1e-5)
    assert model.training and model.dropout_step == 0


def test_a_loss_that_is_not_finite_stops_before_the_update(folder: Path) -> None:
    model = load(folder)
    with torch.no_grad():
        next(iter(training.trained(model).values())).fill_(float("nan"))
    before = {name: p.detach().clone() for name, p in training.trained(model).items()}
    optimizer = optimizers.optimizer(model.train(), weight_decay=0.0)
    with pytest.raises(TrainingError, match="step 8"):
        training.train_step(
            model, optimizer, [drawn(2)], step=7, rate=1.0, max_grad_norm=0.0, pad_id=3
        )
    for name, p in training.trained(model).items():
        assert torch.equal(p.nan_to_num(7.0), before[name].nan_to_num(7.0)) and p.grad is None


def test_a_step_that_fails_leaves_no_gradients_to_the_next(folder: Path) -> None:
    """Such as one whose later batch finds no memory: what the earlier ones gave goes with it."""
    model = FastLanguageModel.get_peft_model(load(folder), r=4)
    rows = drawn(4)
    beyond = Row((10**6, 1), (1, 1))
    with pytest.raises(InputError):
        step_once(model, [rows, [beyond]])
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.full
@pytest.mark.parametrize("checkpointing", [False, True, "unsloth", "auto"])
def test_a_hundred_steps_leave_the_memory_that_ten_left(folder: Path, checkpointing: Any) -> None:
    """Of padded batches of many shapes and of packed ones, by an optimizer with moments."""
    model, _ = FastLanguageModel.from_pretrained(str(folder), dtype=torch.float32)
    model = FastLanguageModel.get_peft_model(
        model, r=4, lora_dropout=0.1, use_gradient_checkpointing=checkpointing
    ).train()
    made = optimizers.optimizer(model)
    alive = []
    with LiveBytes() as live:
        for step in range(100):
            training.train_step(
                model, made, [drawn(2, step)], step=step, rate=1e-3, max_grad_norm=1.0,
                pad_id=0, packing=step % 2 == 1,
            )  # fmt: skip
            if step % 10 == 9:
                gc.collect()
                alive.append(live.now)
    assert alive[0] > 0 and len(set(alive)) == 1


def test_a_model_with_nothing_to_train_is_refused(folder: Path) -> None:
    model, _ = FastLanguageModel.from_pretrained(str(folder), dtype=torch.float32)
    with pytest.raises(ArgumentError, match="no trainable parameters"):
        optimizers.optimizer(model, weight_decay=0.0)


def test_norms_do_not_decay(folder: Path) -> None:
    model, _ = FastLanguageModel.from_pretrained(
        str(folder), dtype=torch.float32, full_finetuning=True
    )
    groups = optimizers.optimizer(model, weight_decay=0.1).param_groups
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0]
    assert all(p.ndim == 1 for p in groups[1]["params"]) and groups[1]["params"]
    assert sum(len(g["params"]) for g in groups) == len(training.trained(model))


def test_the_update_that_is_captured_is_the_step_s_own(folder: Path) -> None:
    """Clipping, AdamW, zeroed gradients; nothing of it for a loss that is not finite."""
    found = []
    rows = [drawn(4, seed) for seed in range(3)]
    for captured in (False, True):
        model = load(folder)
        optimizer = optimizers.optimizer(model, weight_decay=0.01)
        update = GraphedUpdate(optimizer, 0.5)
        results = []
        for step, some in enumerate(rows):
            if captured:
                count = sum(row.learned for row in some)
                loss = model(**collate(some, 0), num_items_in_batch=count).loss
                loss.backward()
                results += update(loss.detach(), 0.01 * (step + 1))
                assert all(not p.grad.any() for p in training.trained(model).values())
            else:
                done = training.train_step(
                    model, optimizer, [some], step=step, rate=0.01 * (step + 1),
                    max_grad_norm=0.5, pad_id=0,
                )  # fmt: skip
                results += [done.loss, done.grad_norm]
        found.append((results, list(training.trained(model).values())))
        if captured:
            before = [p.clone() for p in training.trained(model).values()]
            for p in training.trained(model).values():
                p.grad.fill_(1.0)
            assert math.isnan(update(torch.tensor(math.nan), 0.1)[0])
            assert all(
                torch.equal(a, b)
                for a, b in zip(before, training.trained(model).values(), strict=True)
            )
            assert {int(s["step"]) for s in optimizer.state.values()} == {3}
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    for a, b in zip(found[0][1], found[1][1], strict=True):
        assert (a - b).abs().max() <= 1e-6 * a.abs().max()


class Kept:
    """What a CUDA graph is: it works on the memory that there was when it was captured."""

    def __init__(self, update: GraphedUpdate) -> None:
        optimizer, params = update.optimizer, update.params
        self.update = update
        self.held = [(p.data, p.grad, dict(optimizer.state[p])) for p in params]

    def __call__(self) -> torch.Tensor:
        optimizer, params = self.update.optimizer, self.update.params
        live = [(p.data, p.grad, optimizer.state[p]) for p in params]
        self.put(self.held)
        norm = self.update._run()
        self.put(live)
        return norm

    def put(self, held: list[Any]) -> None:
        for p, (data, grad, state) in zip(self.update.params, held, strict=True):
            p.data, p.grad, self.update.optimizer.state[p] = data, grad, state


@pytest.mark.parametrize("kind", ["gradients", "state", "memory", "nothing"])
def test_what_comes_in_the_place_of_what_was_captured_is_trained(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    captures: list[Kept] = []

    def capture(run: Any, device: torch.device) -> Kept:
        captures.append(Kept(run.__self__))
        return captures[-1]

    monkeypatch.setattr(graphed_update, "capture", capture)
    monkeypatch.setattr(graphed_update, "replayable", lambda device: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    params, twins = ([torch.ones(3, requires_grad=True)] for _ in range(2))
    optimizer, plain = (torch.optim.AdamW(of, lr=1.0, fused=True) for of in (params, twins))
    update = GraphedUpdate(optimizer, 0.0)
    params[0].grad = torch.zeros(3)
    for step in range(6):
        if step == 3 and kind == "gradients":
            params[0].grad = torch.zeros(3)
        elif step == 3 and kind == "state":
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        elif step == 3 and kind == "memory":
            params[0].data = params[0].data.clone()
        assert params[0].grad is not None
        given = torch.tensor([1.0, -2.0, 3.0 * step])
        params[0].grad.add_(given)
        twins[0].grad, plain.param_groups[0]["lr"] = given, 0.1 * (step + 1)
        update(torch.zeros(()), 0.1 * (step + 1))
        plain.step()
        torch.testing.assert_close(params[0], twins[0])
    assert len(captures) == 1 + (kind != "nothing")


def test_batches_without_a_graph_give_to_the_captured_update(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that no graph can hold leaves its gradients where those of the others are."""
    monkeypatch.setattr(graphed, "uncapturable", lambda model: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    model = load(folder, use_gradient_checkpointing="unsloth")
    graphs = Graphs(model, optimizers.optimizer(model), 1.0, packing=False, say=(said := []).append)
    for _ in range(2):
        model.zero_grad()
        graphs.loss(drawn(2), 9)
        assert all(
            p.grad is g for p, g in zip(graphs.step.trained, graphs.step._grads, strict=True)
        )
        assert any(g.any() for g in graphs.step._grads)
    assert len(said) == 1 and "without a graph" in said[0]


def test_what_no_step_can_be_made_of(folder: Path) -> None:
    """It is refused, by name, before anything is run or changed."""
    model = load(folder)
    optimizer = optimizers.optimizer(model)
    before = [p.detach().clone() for p in training.trained(model).values()]
    asked: dict[str, Any] = {"window": [drawn(2)], "rate": 0.1, "max_grad_norm": 1.0}
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("max_grad_norm is nan", {"max_grad_norm": math.nan}),
        ("max_grad_norm is -1", {"max_grad_norm": -1.0}),
        ("rate is inf", {"rate": math.inf}),
        (r"batches of \[\] rows", {"window": []}),
        (r"batches of \[2, 0\] rows", {"window": [drawn(2), []]}),
    ]
    for words, change in wrong:
        with pytest.raises(ArgumentError, match=words):
            training.train_step(model, optimizer, step=0, pad_id=0, **{**asked, **change})
    model.eval()
    with pytest.raises(ArgumentError, match="evaluation mode"):
        training.train_step(model, optimizer, step=0, pad_id=0, **asked)
    assert not optimizer.state
    after = training.trained(model).values()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_row_has_a_label_for_each_id() -> None:
    with pytest.raises(DataError, match="3 ids and 2 labels"):
        Row((5, 9, 4), (9, 4))


def test_an_evaluation_that_fails_leaves_training_on(folder: Path) -> None:
    model = load(folder)
    with pytest.raises(InputError):
        training.evaluate(model, [Row((10**6, 1), (1, 1))], batch=1, pad_id=0)
    assert model.training
    with pytest.raises(ArgumentError, match="no rows"):
        training.evaluate(model, [], batch=1, pad_id=0)


def test_a_step_is_not_replayed_from_graphs_of_another(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made with one loss, clipping, model or optimizer, and asked for another."""
    monkeypatch.setattr(graphed, "uncapturable", lambda model: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    model = load(folder)
    optimizer = optimizers.optimizer(model, weight_decay=0.0)
    graphs = Graphs(model, optimizer, 1.0, label_smoothing=0.1)
    asked: dict[str, Any] = {"max_grad_norm": 1.0, "packing": True, "label_smoothing": 0.1}
    same = {"step": 0, "rate": 0.1, "pad_id": 0, "graphs": graphs}
    for name, value in (
        ("max_grad_norm", 0.0),
        ("packing", False),
        ("label_smoothing", 0.0),
        ("z_loss", 1e-4),
    ):
        with pytest.raises(ArgumentError, match=f"{name} is .* replay"):
            training.train_step(model, optimizer, [drawn(2)], **same, **{**asked, name: value})
    with pytest.raises(ArgumentError, match="another model or optimizer"):
        training.train_step(
            model, optimizers.optimizer(model, weight_decay=0.0), [drawn(2)], **same, **asked
        )
    graphs.check(model, optimizer, **asked, z_loss=0.0)


def test_graphs_that_cannot_be(folder: Path) -> None:
    model = load(folder)
    optimizer, said = optimizers.optimizer(model, weight_decay=0.0), []
    options: Any = {"packing": True, "say": said.append}
    assert graphs_for(model, optimizer, 1.0, asked=None, **options) is None
    assert graphs_for(model, optimizer, 1.0, asked=False, **options) is None
    assert not said
    with pytest.raises(ArgumentError, match="on cpu"):
        graphs_for(model, optimizer, 1.0, asked=True, **options)
