"""TRL's trainers of preferences and rewards take the bridge, and `reference()` beside it."""

from pathlib import Path
from typing import Any

import bridged
import folders
import pytest
import torch
from trainers import RATE, ROWS, STEPS, WARNED, adapted, in_order, logged, rows, same, settings

from purelm import FastLanguageModel

BETA = 0.1

pytestmark = WARNED


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("preferences")
    folders.whole(path)
    return path


def preferences() -> Any:
    datasets = pytest.importorskip("datasets")
    return datasets.Dataset.from_list(
        [
            {
                "prompt": f"row {i}:",
                "chosen": " abc de" * (1 + i % 3),
                "rejected": " xyz q" * (1 + i % 4),
            }
            for i in range(STEPS * ROWS)
        ]
    )


def summed(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Each row's log-probability of its completion."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    each = logits[:, :-1].log_softmax(-1).gather(2, batch["input_ids"][:, 1:, None])[..., 0]
    return (each * batch["completion_mask"][:, 1:]).sum(1)


def own_losses(model: Any, batches: list[dict[str, torch.Tensor]]) -> list[float]:
    """Direct preference optimization (arXiv 2305.18290) in a loop of our own."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    losses = []
    for batch in batches:
        with torch.no_grad(), model.disable_adapter():
            chosen, rejected = summed(model, batch).chunk(2)
        kept, dropped = summed(model, batch).chunk(2)
        margin = (kept - chosen) - (dropped - rejected)
        loss = -torch.nn.functional.logsigmoid(BETA * margin).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_dpo(folder: Path, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    model, tokenizer = adapted(folder)
    options = {"max_length": 48, "beta": BETA, "gradient_checkpointing": True}
    args = trl.DPOConfig(**settings(tmp_path, max_steps=STEPS, **options))
    data = {"train_dataset": preferences(), "processing_class": tokenizer.to_transformers()}
    with pytest.raises(AttributeError, match=r"ref_model=model\.reference\(\)"):
        trl.DPOTrainer(model=model, args=args, **data)
    kind = in_order(trl.DPOTrainer)
    trainer = kind(model=model, ref_model=model.reference(), args=args, **data)
    batches = [dict(batch) for batch in trainer.get_train_dataloader()]
    want = own_losses(adapted(folder)[0].train(), batches)
    trainer.train()
    same(logged(trainer), want)
    assert len(want) == STEPS and want[0] == pytest.approx(0.6931, abs=1e-4)


@pytest.mark.full
def test_kto(folder: Path, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    if not hasattr(trl, "KTOTrainer"):
        pytest.skip("this TRL has no KTOTrainer")
    model, tokenizer = adapted(folder)
    data = [
        {"prompt": row["prompt"], "completion": row[kind], "label": kind == "chosen"}
        for i, row in enumerate(preferences())
        for kind in ["chosen" if i % 2 else "rejected"]
    ]
    trainer = trl.KTOTrainer(
        model=model,
        ref_model=model.reference(),
        args=trl.KTOConfig(**settings(tmp_path, max_steps=STEPS, max_length=48)),
        train_dataset=pytest.importorskip("datasets").Dataset.from_list(data),
        processing_class=tokenizer.to_transformers(),
    )
    trainer.train()
    losses = logged(trainer)
    assert len(losses) == STEPS and losses[0] == pytest.approx(0.5, abs=1e-4)
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


@pytest.mark.full
def test_grpo(folder: Path, tmp_path: Path) -> None:
    """Answers are sampled by `generate`, and what is rewarded grows more frequent."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    model, tokenizer = adapted(folder)

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]

    options: dict[str, Any] = {"num_generations": 8, "max_completion_length": 8, "beta": 0.0}
    options |= {"per_device_train_batch_size": 8, "learning_rate": 3e-2, "max_steps": STEPS}
    trainer = trl.GRPOTrainer(
        model=model,
        args=trl.GRPOConfig(**settings(tmp_path, **options)),
        train_dataset=datasets.Dataset.from_list([{"prompt": f"row {i}:"} for i in range(STEPS)]),
        processing_class=tokenizer.to_transformers(),
        reward_funcs=reward,
    )
    trainer.train()
    found = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert len(found) == STEPS
    assert sum(found[-5:]) > 1.2 * sum(found[:5]), found


@pytest.mark.parametrize("options", [{"load_in_4bit": True}, {"full_finetuning": True}], ids=str)
def test_a_reference_stays_what_the_model_was(folder: Path, options: dict[str, Any]) -> None:
    model, tokenizer = adapted(folder, **options)
    bridged.spread_trained(model)
    ids = torch.tensor([rows(tokenizer, 1)[0]["input_ids"]])
    before = model.eval()(ids).logits.detach()
    reference = model.reference()
    assert not reference.training and not any(p.requires_grad for p in reference.parameters())
    bridged.spread_trained(model, 8)
    assert not torch.allclose(model(ids).logits, before)
    bridged.same_logits(reference(ids).logits, before)
    mine = model.base_params["layers"][0]["attn_norm"]["weight"]
    its = reference.base_params["layers"][0]["attn_norm"]["weight"]
    assert (mine.data_ptr() == its.data_ptr()) == ("full_finetuning" not in options)


def test_a_reference_of_what_changes_nothing_is_the_base(folder: Path) -> None:
    model, _ = adapted(folder)
    assert model.worn and not model.reference().worn
    other, _ = FastLanguageModel.from_pretrained(folder, dtype=torch.float32, device_map="cpu")
    other = FastLanguageModel.get_peft_model(other, r=4, modules_to_save=["lm_head"], use_dora=True)
    reference = other.reference()
    ids = torch.arange(12)[None]
    before = other.eval()(ids).logits.detach()
    bridged.spread_trained(other)
    assert reference.worn
    bridged.same_logits(reference(ids).logits, before)
