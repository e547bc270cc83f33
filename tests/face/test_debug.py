"""What is not finite: the step is refused, all is as it was, and the first layer and tensor are
named, wherever it begins.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import purelm
from purelm import FastLanguageModel, Row
from purelm.errors import ArgumentError, InputError, PurelmError, TrainingError
from purelm.nn import fast_attention, fast_mlp, loss, tree
from purelm.optimizers import optimizer as made_for

NAN, HUGE = math.nan, 3e38
ROWS = [[Row((5, 9, 4, 7, 8), (-100, 9, 4, 7, 8)), Row((6, 4), (-100, 4))]]


def load(folder: Path, **options: Any) -> Any:
    model, _ = FastLanguageModel.from_pretrained(
        str(folder), dtype=torch.float32, load_in_16bit=True, device_map="cpu"
    )
    worn = {"r": 2, "use_gradient_checkpointing": False, "use_dora": False, **options}
    model = FastLanguageModel.get_peft_model(model, init_lora_weights="gaussian", **worn)
    with torch.no_grad():
        for leaf in tree.leaves(model.adapters):
            leaf.b.add_(0.01)
    return model


def in_weight(path: str, value: float) -> Callable[[Any, Any], None]:
    """One value of the base's, or in a whole matrix a factor beyond what fp32 holds."""

    def put(model: Any, patch: Any) -> None:
        leaf = tree.at(model.params, path)
        leaf.data.view(-1)[3] = value
        if value == HUGE:
            leaf.data.fill_(value)

    return put


def in_adapter(path: str, part: str) -> Callable[[Any, Any], None]:
    def put(model: Any, patch: Any) -> None:
        getattr(tree.at(model.adapters, path), part).data.view(-1)[1] = NAN

    return put


def in_result(module: Any, name: str, calls: set[int]) -> Callable[[Any, Any], None]:
    """Of a function, in these of its calls: of the step (there are two layers), and of the step run
    again, whose layers are run twice.
    """

    def put(model: Any, patch: Any) -> None:
        true, count = getattr(module, name), iter(range(99))

        def wrong(*args: Any, **how: Any) -> Any:
            made = true(*args, **how)
            first = made[0] if isinstance(made, tuple | list) else made
            if next(count) in calls:
                with torch.no_grad():
                    first.view(-1)[0] = NAN
            return made

        patch.setattr(module, name, wrong)

    return put


SITES: dict[str, tuple[Callable[[Any, Any], None], str]] = {
    "embedding": (in_weight("embed.weight", NAN), r"run again, embed\.weight has 1 NaN"),
    "norm": (in_weight("layers.1.attn_norm.weight", NAN), r"layers\.1\.attn_norm\.weight"),
    "q": (in_weight("layers.0.attn.q.weight", NAN), r"layers\.0\.attn\.q\.weight"),
    "o": (in_weight("layers.1.attn.o.weight", math.inf), r"1\.attn\.o\.weight has 0 NaN and 1 i"),
    "down": (in_weight("layers.1.mlp.down.weight", NAN), r"layers\.1\.mlp\.down\.weight"),
    "last norm": (in_weight("norm.weight", NAN), r"run again, norm\.weight"),
    "a": (in_adapter("layers.1.attn.v", "a"), r"layers\.1\.attn\.v\.a has"),
    "b": (in_adapter("layers.0.mlp.up", "b"), r"layers\.0\.mlp\.up\.b has"),
    "magnitude": (in_adapter("layers.1.mlp.gate", "magnitude"), r"1\.mlp\.gate\.magnitude has"),
    # Finite weights, whose products are not.
    "k overflows": (in_weight("layers.1.attn.k.weight", HUGE), r"layers\.1: q, k or v"),
    "o overflows": (in_weight("layers.0.attn.o.weight", HUGE), r"layers\.0: the hidden states b"),
    "up overflows": (in_weight("layers.1.mlp.up.weight", HUGE), r"layers\.1: gate or up"),
    "down overflows": (in_weight("layers.0.mlp.down.weight", HUGE), r"layers\.0: its output"),
    # What functions make.
    "attention": (
        in_result(fast_attention, "attention_forward", {1, 4, 5}), r"layers\.1: the attention's"
    ),
    "loss": (in_result(loss, "next_token", {0, 1}), r"run again, the loss has 1 NaN"),
    "gradient of attention": (
        in_result(fast_attention, "attention_backward", {0, 2}),
        r"the gradient of layers\.1\.attn\.q\.",
    ),
    "gradient of the MLP": (
        in_result(fast_mlp, "pull_activated", {0, 2}), r"the gradient of layers\.1\.mlp\."
    ),
}  # fmt: skip


def refused(model: Any, error: type[PurelmError], words: str, **how: Any) -> None:
    """The step raises, and what is trained, the optimizer and the dropout are as they were."""
    optimizer = made_for(model.train(), weight_decay=0.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    given: Any = {"step": 4, "rate": 1e-2, "max_grad_norm": 1.0, "pad_id": 0, "debug": True, **how}
    with pytest.raises(error, match=words):
        purelm.train_step(model, optimizer, given.pop("window", ROWS), **given)
    assert not optimizer.state and model.dropout_step == 0 and not model.debug
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, before[name], rtol=0, atol=0, equal_nan=True)
        assert p.grad is None


@pytest.mark.parametrize("site", SITES)
def test_a_step_with_what_is_not_finite(
    folder: Path, site: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, words = SITES[site]
    model = load(folder, use_dora=site == "magnitude", lora_dropout=0.1)
    put(model, monkeypatch)
    refused(model, TrainingError, f"(?s)step 5: the loss is .*{words}")


def test_rows_and_rates_that_teach_nothing(folder: Path) -> None:
    model = load(folder)
    nothing = [[Row((5, 9, 4), (5, -100, -100))]]
    refused(model, InputError, "no label counts", window=nothing)
    for rate in (NAN, math.inf, -1.0):
        refused(model, ArgumentError, "rate is", rate=rate)


@pytest.mark.parametrize("kind", ["padded", "packed", "recomputed", "whole"])
def test_what_is_finite_is_not_complained_of(folder: Path, kind: str) -> None:
    """And has the loss and the gradients that it has without the checks."""
    model = load(folder, use_gradient_checkpointing=kind == "recomputed").train()
    if kind == "whole":
        model, _ = FastLanguageModel.from_pretrained(str(folder), full_finetuning=True)
    batch: Any = {"input_ids": torch.tensor([[0, 0, 5, 9, 4], [6, 4, 7, 8, 9]])}
    batch["labels"] = batch["input_ids"]
    if kind == "packed":
        batch = {name: t.view(1, -1) for name, t in batch.items()}
        batch["cu_seqlens"] = torch.tensor([0, 3, 8], dtype=torch.int32)
    else:
        batch["attention_mask"] = batch["input_ids"] > 0
    found = []
    for model.debug in (False, True):
        loss = model.train()(**batch).loss
        grads = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
        found.append([loss.detach(), *grads])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_loop_of_one_s_own(folder: Path) -> None:
    """`model.debug` makes the pass itself raise: forward, and backward of a loss scaled away."""
    model, ids = load(folder).train(), torch.tensor([[5, 9, 4]])
    model.debug = True
    loss = model(ids, labels=ids).loss
    with pytest.raises(TrainingError, match="the gradient of the loss has 0 NaN and 1 infinite"):
        (loss * math.inf).backward()
    in_weight("layers.1.attn.o.weight", NAN)(model, None)
    with pytest.raises(TrainingError, match="layers.1.attn.o.weight has"):
        model(ids, labels=ids)
