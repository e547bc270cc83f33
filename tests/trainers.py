"""What tests of other people's trainers share: a tiny model, rows, settings, the order of rows."""

from pathlib import Path
from typing import Any

import pytest
import torch

from purelm import FastLanguageModel

STEPS, FEW, RATE, ROWS = 20, 6, 5e-3, 4

# What trainers warn of that is none of ours: a test's `pytestmark`.
WARNED = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*"),
]


def adapted(folder: Path, **options: Any) -> tuple[Any, Any]:
    model, tokenizer = FastLanguageModel.from_pretrained(
        folder, dtype=torch.float32, device_map="cpu", max_seq_length=64, **options
    )
    if options.get("full_finetuning"):
        return model, tokenizer
    return FastLanguageModel.get_peft_model(model, r=4, use_gradient_checkpointing=False), tokenizer


def rows(tokenizer: Any, count: int = STEPS * ROWS) -> list[dict[str, list[int]]]:
    """Rows of different lengths, so that batches are padded and labels differ in number.

    No label at the first token, which transformers would have padding on the left predict.
    """
    made = []
    for i in range(count):
        ids = tokenizer(f"row {i}: " + "abc de " * (1 + i * 5 % 7))["input_ids"][:40]
        made.append(
            {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100, *ids[1:]]}
        )
    return made


def padded(tokenizer: Any, batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    width = max(len(row["input_ids"]) for row in batch)
    fill = {"input_ids": tokenizer.pad_token_id, "attention_mask": 0, "labels": -100}
    return {
        name: torch.tensor([[value] * (width - len(row[name])) + row[name] for row in batch])
        for name, value in fill.items()
    }


def settings(folder: Path, **options: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": ROWS,
        "max_steps": STEPS,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "save_strategy": "no",
        "bf16": False,
        **options,
    }


def in_order(kind: Any) -> Any:
    """A trainer that takes rows in the order of the data, as our loop does."""

    class InOrder(kind):  # type: ignore[misc]
        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return torch.utils.data.SequentialSampler(dataset or self.train_dataset)

    return InOrder


def logged(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def same(found: list[float], want: list[float]) -> None:
    assert len(found) == len(want) and want[-1] < 0.95 * want[0]
    # The trainers average in fp32 and transformers rounds what it logs to four digits.
    torch.testing.assert_close(torch.tensor(found), torch.tensor(want), rtol=1e-4, atol=1e-4)
