"""What we write, opened by a client as its users do: transformers' pipeline."""

from pathlib import Path

import bridged
import folders
import pytest
import torch
import transformers

from purelm import FastLanguageModel
from purelm.convert.bridge import CausalLM

PROMPT = "Once upon a time"


@pytest.fixture
def trained(tmp_path: Path) -> CausalLM:
    folders.whole(tmp_path / "base")
    model, _ = FastLanguageModel.from_pretrained(
        tmp_path / "base", load_in_4bit=False, dtype=torch.float32, device_map="cpu",
        max_seq_length=None,
    )  # fmt: skip
    model = FastLanguageModel.get_peft_model(model, r=4)
    bridged.spread_trained(model)
    return model.eval()


@pytest.mark.parametrize("merged", [False, True])
def test_a_pipeline_tells_what_we_tell(merged: bool, trained: CausalLM, tmp_path: Path) -> None:
    """Of an adapter's folder it finds the base by itself, of a merged model it needs none."""
    save = trained.save_pretrained_merged if merged else trained.save_pretrained
    save(tmp_path / "saved")
    pipe = transformers.pipeline(
        "text-generation", model=str(tmp_path / "saved"), dtype=torch.float32, device="cpu"
    )
    options = {"max_new_tokens": 12, "do_sample": False}
    (found,) = pipe(PROMPT, return_full_text=False, **options)
    ids = trained.tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    made = trained.generate(ids, **options)[0, ids.shape[1] :]
    assert found["generated_text"] == trained.tokenizer.decode(made, skip_special_tokens=True)
    assert len(set(made.tolist())) > 3
    if not merged:
        pipe.model.disable_adapters()
        (plain,) = pipe(PROMPT, return_full_text=False, **options)
        assert plain["generated_text"] != found["generated_text"]
