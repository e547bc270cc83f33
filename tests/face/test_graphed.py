"""A captured step: on a GPU it equals the eager one to the bit; elsewhere it says why not."""

from pathlib import Path
from typing import Any

import folders
import pytest
import torch
from bridged import ids

from purelm import FastLanguageModel
from purelm.errors import ArgumentError, InputError
from purelm.graphed import GraphedStep


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    folders.whole(path)
    return path


def load(folder: Path, device: str, **options: Any) -> Any:
    model, _ = FastLanguageModel.from_pretrained(
        str(folder), dtype=torch.bfloat16 if device == "cuda" else torch.float32, device_map=device
    )
    options = {"use_gradient_checkpointing": False, **options}
    return FastLanguageModel.get_peft_model(model, r=4, **options)


def test_a_model_on_the_cpu(folder: Path) -> None:
    with pytest.raises(ArgumentError, match="on cpu"):
        GraphedStep(load(folder, "cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", [False, True, "auto"])
def test_equal_to_the_eager_step(folder: Path, checkpointing: Any) -> None:
    batches = [ids(seed, rows, 16).cuda() for seed in (1, 2) for rows in (2, 2, 1)]
    found = []
    for graphed in (False, True):
        model = load(folder, "cuda", use_gradient_checkpointing=checkpointing)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2, fused=True)
        step = GraphedStep(model) if graphed else None
        seen: list[torch.Tensor] = []
        for i, some in enumerate(batches * 2):
            if step is None:
                loss = model(some, labels=some).loss
                loss.backward()
                loss = loss.detach()
            else:
                loss = step(some, some)
            seen += [loss, *(p.grad.clone() for p in trained)]
            if i % 2:  # every other batch accumulates
                optimizer.step()
                optimizer.zero_grad()
        found.append(seen)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.gpu
def test_what_cannot_be_captured(folder: Path) -> None:
    with pytest.raises(ArgumentError, match="dropout"):
        GraphedStep(load(folder, "cuda", lora_dropout=0.1))
    step = GraphedStep(load(folder, "cuda", use_gradient_checkpointing="unsloth"))
    with pytest.raises(ArgumentError, match="sent to the host"):
        step(ids().cuda(), ids().cuda())
    with pytest.raises(InputError, match="vocabulary"):
        step(ids().cuda() + 5000, ids().cuda())
