"""Optimizers by name: bitsandbytes' arithmetic, without its waits."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bitsandbytes import optim

from purelm import FastLanguageModel, optimizers
from purelm.convert.bridge import CausalLM
from purelm.errors import ArgumentError
from purelm.sft_options import Options, check


@pytest.fixture
def model(folder: Path) -> CausalLM:
    made, _ = FastLanguageModel.from_pretrained(
        str(folder), dtype=torch.float32, full_finetuning=True
    )
    return made


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("adamw_8bit", optim.AdamW8bit),
        ("lion_8bit", optim.Lion8bit),
        ("ademamix_8bit", optim.AdEMAMix8bit),
    ],
)
def test_steps_are_those_of_bitsandbytes(
    name: str, theirs: type[torch.optim.Optimizer], model: CausalLM
) -> None:
    made = optimizers.optimizer(model, name, lr=1e-2, weight_decay=0.1)
    params = [p for group in made.param_groups for p in group["params"]]
    twins = [p.detach().clone().requires_grad_() for p in params]
    assert any(p.numel() >= 4096 for p in params)
    few = len(made.param_groups[0]["params"])
    groups = [
        {"params": twins[:few], "weight_decay": 0.1},
        {"params": twins[few:], "weight_decay": 0.0},
    ]
    other = theirs(groups, lr=1e-2)  # type: ignore[call-arg]
    for _ in range(3):
        for p, twin in zip(params, twins, strict=True):
            p.grad = torch.randn_like(p)
            twin.grad = p.grad.clone()
        before = params[0].detach().clone()
        made.step()
        other.step()
        assert not torch.equal(params[0], before)
    assert all(torch.equal(p, twin) for p, twin in zip(params, twins, strict=True))
    kinds = {t.dtype for p in params for t in optimizers.kept(made.state[p]).values()}
    assert torch.uint8 in kinds


def test_what_cannot_be_made_says_why(model: CausalLM) -> None:
    with pytest.raises(ArgumentError, match="expected one of adamw_torch_fused, adamw_8bit"):
        optimizers.optimizer(model, "sgd")
    with pytest.raises(ArgumentError, match="the model is on cpu"):
        optimizers.optimizer(model, "paged_adamw_8bit")
    for name in ("lr", "weight_decay"):
        for value in (-1.0, math.nan, math.inf):
            with pytest.raises(ArgumentError, match=f"{name} is {value}"):
                optimizers.optimizer(model, **{name: value})


def test_a_library_that_is_not_there_is_asked_for_before_anything_is_loaded(
    model: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizers, "find_spec", lambda name: None)
    options = Options(model="nowhere", data="nothing", optimizer="lion_8bit")
    for made in (lambda: optimizers.optimizer(model, "lion_8bit"), lambda: check(options)):
        with pytest.raises(ArgumentError, match=r"pip install 'purelm\[bnb\]'"):
            made()
    check(replace(options, optimizer="adamw_torch_fused"))
