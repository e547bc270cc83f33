"""Real trained models: a small story teller's golden text, and a chat model's answers.

The chat model is SmolLM2-135M-Instruct as an HF folder without a tokenizer's repairs; the variable
PURELM_SMOLLM2 names the folder.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from assets import shared

from purelm import FastLanguageModel
from purelm.nn import tree
from purelm.quant.nf4 import NF4

STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
)
QUESTION = [{"role": "user", "content": "What is the capital of Japan?"}]
TALES = [
    "Once upon a time, there was a robot who lived on the moon. He was made of cheese.",
    "The robot on the moon had no friends, so he made one out of the cheese he had left.",
]


def batch_of(tokenizer: Any, texts: list[str]) -> dict[str, torch.Tensor]:
    tokenizer.padding_side = "right"
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    tokens, mask = batch["input_ids"], batch["attention_mask"]
    return {
        "input_ids": tokens,
        "attention_mask": mask,
        "labels": tokens.masked_fill(mask == 0, -100),
    }


def train(model: Any, batches: list[dict[str, torch.Tensor]], lr: float) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


# stories260K.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_golden_text(dtype: torch.dtype) -> None:
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(shared("assets/stories260K")), load_in_16bit=True, dtype=dtype, device_map="cpu"
    )
    begin = torch.tensor([[tokenizer.bos_token_id]])
    out = model.generate(begin, max_new_tokens=60, do_sample=False)
    assert tokenizer.decode(out[0], skip_special_tokens=True).startswith(STORY)


def test_trains_in_4_bits(tmp_path: Path) -> None:
    """The loss on two new tales falls; the adapter and the merged model keep what was learned."""
    folder = str(shared("assets/stories260K"))
    model, tokenizer = FastLanguageModel.from_pretrained(
        folder, device_map="cpu", dtype=torch.float32
    )
    assert sum(isinstance(leaf, NF4) for leaf in tree.leaves(model.params)) == 7 * 5
    model = FastLanguageModel.get_peft_model(model, r=8)
    batch = batch_of(tokenizer, TALES)
    losses = train(model, [batch] * 25, lr=1e-2)
    assert losses[-1] < 0.5 * losses[0]
    model.eval()
    model.save_pretrained(tmp_path / "adapter")
    again, _ = FastLanguageModel.from_pretrained(
        str(tmp_path / "adapter"), device_map="cpu", dtype=torch.float32
    )
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model(**batch).logits)


# SmolLM2-135M-Instruct.


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    given = os.environ.get("PURELM_SMOLLM2")
    if not given:
        pytest.skip("PURELM_SMOLLM2 names no folder with SmolLM2-135M-Instruct")
    folder = tmp_path_factory.mktemp("smollm2")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(Path(given) / name, folder / name)
    for path in shared("assets/tokenizers/smollm2").iterdir():
        shutil.copy(path, folder / path.name)
    return folder


@pytest.mark.full
@pytest.mark.parametrize("four_bits", [False, True], ids=["bf16", "nf4"])
def test_the_capital_of_japan(smollm2: Path, four_bits: bool) -> None:
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(smollm2), load_in_4bit=four_bits, dtype=torch.bfloat16, device_map="cpu"
    )
    prompt = tokenizer.apply_chat_template(
        QUESTION, add_generation_prompt=True, return_tensors="pt"
    )
    ids = prompt["input_ids"]
    out = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    answer = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    print(answer)
    assert "Tokyo" in answer


def gsm8k(count: int) -> list[str]:
    lines = shared("assets/data/gsm8k_train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines[:count]]
    return [f"Question: {row['question']}\nAnswer: {row['answer']}" for row in rows]


@pytest.mark.full
@pytest.mark.timeout(900)
def test_a_short_fine_tune(smollm2: Path, tmp_path: Path) -> None:
    """LoRA on 4 bits lowers the loss on rows it did not see; transformers runs what is merged."""
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(smollm2), dtype=torch.float32, device_map="cpu"
    )
    model = FastLanguageModel.get_peft_model(model, r=8)
    texts = gsm8k(36)
    held = batch_of(tokenizer, texts[32:])
    with torch.no_grad():
        before = model.eval()(**held).loss.item()
    batches = [batch_of(tokenizer, texts[i : i + 2]) for i in range(0, 32, 2)]
    losses = train(model.train(), batches, lr=1e-3)
    with torch.no_grad():
        after = model.eval()(**held).loss.item()
    print(f"trained {losses[0]:.3f} -> {losses[-1]:.3f}, held out {before:.3f} -> {after:.3f}")
    assert sum(losses[-4:]) < sum(losses[:4]) and after < 0.97 * before

    model.save_pretrained_merged(tmp_path / "merged")
    merged, _ = FastLanguageModel.from_pretrained(
        str(tmp_path / "merged"), load_in_16bit=True, dtype=torch.float32, device_map="cpu"
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tokens = held["input_ids"][:1, :64]
    with torch.no_grad():
        ours, want = merged(tokens).logits, theirs(tokens).logits
        adapted = model(tokens).logits
    off = ((ours - want).abs().max() / want.abs().max()).item()
    print(f"merged: {off:.1e} of the largest logit from transformers")
    assert off <= 5e-6 and torch.equal(ours.argmax(-1), want.argmax(-1))
    # The adapter was trained over 4-bit weights and is merged into the 16-bit original.
    near = torch.cosine_similarity(adapted.flatten(), ours.flatten(), dim=0).item()
    print(f"merged beside 4 bits: cosine {near:.4f}")
    assert near > 0.98
