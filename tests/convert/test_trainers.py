"""Other people's trainers take `model, tokenizer` as they are, and end where our own loop does."""

from pathlib import Path
from typing import Any

import folders
import pytest
import torch
import transformers
from safetensors.torch import load_file
from trainers import (
    FEW,
    RATE,
    ROWS,
    STEPS,
    WARNED,
    adapted,
    in_order,
    logged,
    padded,
    rows,
    same,
    settings,
)

from purelm import FastLanguageModel, graphed
from purelm.errors import ArgumentError
from purelm.graphed_bridge import replay
from purelm.nn.residuals import KEEP, RECOMPUTE

pytestmark = WARNED


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("trainers")
    folders.whole(path)
    return path


def own_losses(
    model: Any, tokenizer: Any, steps: int = STEPS, accumulate: int = 1, **terms: float
) -> list[float]:
    """The loop that every trainer here must agree with: AdamW, a constant rate, clipping at 1."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    model.train()
    data, losses, size = rows(tokenizer), [], ROWS // accumulate
    for step in range(steps):
        taken = data[step * ROWS : (step + 1) * ROWS]
        parts = [padded(tokenizer, taken[i : i + size]) for i in range(0, ROWS, size)]
        count = sum(int((part["labels"][:, 1:] != -100).sum()) for part in parts)
        total = 0.0
        for part in parts:
            loss = model(**part, num_items_in_batch=count, **terms).loss
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def hf_trainer(model: Any, tokenizer: Any, folder: Path, **options: Any) -> Any:
    hf: Any = transformers
    return in_order(hf.Trainer)(
        model=model,
        args=hf.TrainingArguments(**settings(folder, **options)),
        train_dataset=rows(tokenizer),
        data_collator=hf.DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
    )


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("options", [{"load_in_4bit": True}, {"full_finetuning": True}], ids=str)
def test_trainer(folder: Path, tmp_path: Path, accumulate: int, options: Any) -> None:
    steps = STEPS if accumulate == 1 else FEW
    want = own_losses(*adapted(folder, **options), steps, accumulate)
    model, tokenizer = adapted(folder, **options)
    trainer = hf_trainer(
        model,
        tokenizer,
        tmp_path,
        per_device_train_batch_size=ROWS // accumulate,
        gradient_accumulation_steps=accumulate,
        gradient_checkpointing=True,
        max_steps=steps,
    )
    assert trainer.model_accepts_loss_kwargs
    trainer.train()
    assert model.residuals == RECOMPUTE
    same(logged(trainer), want)
    model.save_pretrained(tmp_path / "out")
    if "full_finetuning" not in options:
        again, _ = FastLanguageModel.from_pretrained(
            tmp_path / "out", dtype=torch.float32, device_map="cpu"
        )
        ids = torch.tensor([rows(tokenizer, 1)[0]["input_ids"]])
        assert torch.equal(again(ids).logits, model.eval()(ids).logits)
    else:
        written = load_file(tmp_path / "out/model.safetensors")
        name = "model.layers.0.mlp.up_proj.weight"
        assert torch.equal(written[name], model.params["layers"][0]["mlp"]["up"]["weight"])


@pytest.mark.parametrize("options", [{"load_in_4bit": True}, {"full_finetuning": True}], ids=str)
def test_trainer_over_replayed_passes(
    folder: Path, tmp_path: Path, options: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what is captured run as it is, in batches padded in front, two to a step."""
    monkeypatch.setattr(graphed, "capture", lambda step, device, pool: None)
    monkeypatch.setattr(graphed, "uncapturable", lambda model: None)
    for name in ("graph_pool_handle", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    want = own_losses(*adapted(folder, **options), accumulate=2)
    model, tokenizer = adapted(folder, **options)
    model.for_training(True)
    replay(model)
    given = {"per_device_train_batch_size": ROWS // 2, "gradient_accumulation_steps": 2}
    trainer = hf_trainer(model, tokenizer, tmp_path, **given)
    trainer.train()
    same(logged(trainer), want)
    assert model.replays._steps[0.0, 0.0]._shapes


@pytest.mark.parametrize("accumulate", [1, 2])
def test_trainer_smooths_labels(folder: Path, tmp_path: Path, accumulate: int) -> None:
    """Its own smoother, which shifts labels for models that it knows by name, agrees with ours."""
    want = own_losses(*adapted(folder), FEW, accumulate, smoothing=0.1)
    model, tokenizer = adapted(folder)
    trainer = hf_trainer(
        model,
        tokenizer,
        tmp_path,
        per_device_train_batch_size=ROWS // accumulate,
        gradient_accumulation_steps=accumulate,
        label_smoothing_factor=0.1,
        max_steps=FEW,
    )
    trainer.train()
    same(logged(trainer), want)


def test_trainer_resumes(folder: Path, tmp_path: Path) -> None:
    model, tokenizer = adapted(folder)
    options = {
        "save_strategy": "steps",
        "save_steps": 3,
        "gradient_checkpointing": False,
        "max_steps": FEW,
    }
    whole = hf_trainer(model, tokenizer, tmp_path, **options)
    whole.train()
    assert model.residuals == KEEP
    again, tokenizer = adapted(folder)
    rest = hf_trainer(again, tokenizer, tmp_path, **options)
    rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert logged(rest) == logged(whole)
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_trainer_evaluates(folder: Path, tmp_path: Path) -> None:
    hf: Any = transformers
    model, tokenizer = adapted(folder)
    data = rows(tokenizer, ROWS)
    trainer = hf.Trainer(
        model=model,
        args=hf.TrainingArguments(**settings(tmp_path, per_device_eval_batch_size=ROWS)),
        eval_dataset=data,
        data_collator=hf.DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
    )
    found = trainer.predict(data)
    batch = padded(tokenizer, data)
    with torch.no_grad():
        want = model.eval()(**batch)
    assert found.metrics["test_loss"] == pytest.approx(want.loss.item(), rel=1e-5)
    torch.testing.assert_close(torch.from_numpy(found.predictions), want.logits)


def test_accelerate(folder: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    want = own_losses(*adapted(folder))
    model, tokenizer = adapted(folder)
    data = rows(tokenizer)
    made = accelerate.Accelerator(cpu=True, mixed_precision="no")
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0
    )
    loader: Any = torch.utils.data.DataLoader(
        data,  # type: ignore[arg-type]
        batch_size=ROWS,
        collate_fn=lambda batch: padded(tokenizer, batch),
    )
    model, optimizer, loader = made.prepare(model, optimizer, loader)
    model.train()
    losses = []
    for batch in loader:
        loss = model(**batch).loss
        made.backward(loss)
        made.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    same(losses, want)
    plain = made.unwrap_model(model)
    assert set(made.get_state_dict(model)) == set(plain.state_dict())


def test_sft_trainer(folder: Path, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    want = own_losses(*adapted(folder))
    model, tokenizer = adapted(folder)
    data = datasets.Dataset.from_list(
        [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows(tokenizer)]
    )
    trainer = in_order(trl.SFTTrainer)(
        model=model,
        args=trl.SFTConfig(**settings(tmp_path, max_length=64, gradient_checkpointing=True)),
        train_dataset=data,
        processing_class=tokenizer.to_transformers(),  # it insists on the class
    )
    trainer.train()
    same(logged(trainer), want)
    assert not trainer.padding_free and model.model_tags == ["trl", "sft"]


def test_trainers_with_their_own_head(folder: Path) -> None:
    model, _ = adapted(folder)
    ids = torch.arange(12)[None]
    model.forward = None  # they replace it
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    head = model.get_output_embeddings()
    del model.forward
    assert head.bias is None
    torch.testing.assert_close(hidden @ head.weight.mT, model(ids).logits)
    trained, _ = FastLanguageModel.from_pretrained(
        folder, dtype=torch.float32, device_map="cpu", max_seq_length=64
    )
    trained = FastLanguageModel.get_peft_model(trained, r=4, modules_to_save=["lm_head"])
    with pytest.raises(ArgumentError, match="the head is trained"):
        trained.base_model(input_ids=ids)


def test_checkpointing_by_trainers_names(folder: Path) -> None:
    model, tokenizer = adapted(folder)
    batch = padded(tokenizer, rows(tokenizer, 2))
    found = []
    for options in ({}, {"every_n_layers": 2}, {"offload": True}):
        model.activation_checkpointing_enable(None, **options)
        model.zero_grad()
        model.train()(**batch).loss.backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
        if "every_n_layers" in options:
            assert model.residuals == (RECOMPUTE, KEEP, RECOMPUTE)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*found, strict=True))
    with pytest.raises(ArgumentError, match="every_n_layers"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=None, every_n_layers=0)
    model.activation_checkpointing_disable()
    assert model.residuals == KEEP
    parts = [model.num_parameters(), model.num_parameters(exclude_embeddings=True)]
    assert parts[0] - parts[1] == model.spec.vocab * model.spec.dim
