"""Three hundred steps on real text beside transformers with peft: the curve of the losses."""

from pathlib import Path
from typing import Any

import pytest
import torch
from assets import shared

from purelm import FastLanguageModel
from purelm.optimizers import optimizer as made

STEPS, ROWS, LENGTH, RATE = 300, 4, 64, 2e-3


def batches(tokenizer: Any) -> list[torch.Tensor]:
    """The text in order, each [ROWS, LENGTH]."""
    text = shared("assets/data/tinyshakespeare.txt").read_text()[:250_000]
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"]).view(-1)
    size = ROWS * LENGTH
    return list(ids[: STEPS * size].view(STEPS, ROWS, LENGTH))


def theirs(adapter: Path, rows: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """The losses of peft's model over transformers', from the same adapters."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    base = transformers.LlamaForCausalLM.from_pretrained(
        str(shared("assets/stories260K")), dtype=dtype, attn_implementation="eager"
    )
    model = peft.PeftModel.from_pretrained(base, str(adapter), is_trainable=True).to(dtype)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=RATE, weight_decay=0.01, foreach=False)
    found = []
    for ids in rows:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.detach().double())
    return torch.stack(found)


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.timeout(900)
def test_the_curve_of_three_hundred_steps(tmp_path: Path) -> None:
    """From the same adapters, in the same order: as near to float64 as transformers in float32 is,
    step by step, and the model has learned.
    """
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(shared("assets/stories260K")), load_in_16bit=True, dtype="float32", device_map="cpu"
    )
    model = FastLanguageModel.get_peft_model(model, r=8, lora_alpha=16, random_state=1).train()
    model.save_pretrained(tmp_path)
    rows = batches(tokenizer)
    assert len(rows) == STEPS
    optimizer = made(model, lr=RATE, weight_decay=0.01)
    found = []
    for ids in rows:
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.detach().double())
    ours = torch.stack(found)
    exact, eager = (theirs(tmp_path, rows, dtype) for dtype in (torch.float64, torch.float32))
    limit = 2 * float((eager - exact).abs().max()) + torch.finfo(torch.float32).eps * float(
        exact.max()
    )
    print(f"off {float((ours - exact).abs().max()):.3g}, transformers {limit / 2:.3g}")
    assert float((ours - exact).abs().max()) <= limit
    assert ours[-50:].mean() < 0.8 * ours[:10].mean()
