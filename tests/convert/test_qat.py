"""Quantization-aware training behind the published parameters, against rounding by hand."""

from pathlib import Path
from typing import Any

import folders
import pytest
import tiny
import torch
from torch.nn.functional import linear

from purelm import FastLanguageModel
from purelm.convert.load import load_folder
from purelm.errors import ArgumentError, KernelError
from purelm.nn import decoder, lora, tree
from purelm.nn.params import param_specs
from purelm.quant import fake
from purelm.quant.fake import SCHEMES, Fake

SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "num_attention_heads": 4}
IDS = torch.randint(0, 99, (2, 13), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    folders.whole(path, **SIZES, num_key_value_heads=4)
    return path


def load(folder: Path, **options: Any) -> Any:
    options = {"load_in_16bit": True, **options}
    given = {"dtype": torch.float32, "device_map": "cpu", **options}
    return FastLanguageModel.from_pretrained(str(folder), **given)[0]


def spread(model: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.02, generator=generator)
    return model


@pytest.mark.parametrize("scheme", ["int4", "int8", "fp8-int4"])
def test_the_merged_weight_is_what_is_rounded(folder: Path, scheme: str) -> None:
    """Weight-only schemes: the adapted model computes as the merged model stored so."""
    model = FastLanguageModel.get_peft_model(load(folder), r=4, qat_scheme=scheme)
    spread(model).eval()
    merged = lora.merge(model.params, model.adapters)
    projections = {path for path, p in tree.items(param_specs(model.spec)) if p.quantize}
    stored = tree.map_with_path(
        lambda path, leaf: fake.weight_of(Fake(leaf, scheme)) if path in projections else leaf,
        merged,
    )
    found = model(IDS).logits.detach()
    if SCHEMES[scheme].activation is None:
        want = decoder.forward(stored, model.spec, IDS).detach()
        assert (found - want).abs().max() <= 1e-5 * want.abs().max()
    plain = decoder.forward(merged, model.spec, IDS)
    assert (found - plain).abs().max() > 1e-4 * plain.abs().max()
    assert "rounded as" in model.explain()


@pytest.mark.parametrize("policy", [False, True, "unsloth"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients_are_those_of_the_rounded_products(
    folder: Path, scheme: str, policy: bool | str
) -> None:
    """One projection's adapter by the chain rule, and every policy alike."""
    given = {"r": 4, "qat_scheme": scheme, "use_gradient_checkpointing": policy}
    model = spread(FastLanguageModel.get_peft_model(load(folder), **given)).train()
    model(IDS, labels=IDS).loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert all(g is not None and g.isfinite().all() and g.any() for g in found.values())
    reference = spread(FastLanguageModel.get_peft_model(load(folder), r=4, qat_scheme=scheme))
    reference.residuals = None  # plain autograd
    reference.train()(IDS, labels=IDS).loss.backward()
    for name, p in reference.named_parameters():
        if p.requires_grad:
            assert (p.grad - found[name]).norm() <= 1e-5 * p.grad.norm(), name


def test_one_projection_by_hand() -> None:
    from purelm.nn.linear import project

    g = torch.Generator().manual_seed(2)
    w, x, dy = (torch.randn(*s, generator=g) for s in ((6, 64), (5, 64), (5, 6)))
    a, b = (torch.randn(*s, generator=g).requires_grad_() for s in ((3, 64), (6, 3)))
    (y,) = project(x, [{"weight": Fake(w, "int8-int4")}], [lora.LoRA(a, b, 0.5)])
    da, db = torch.autograd.grad(y, (a, b), dy)
    rounded_x = fake.int8_token(x)
    whole = fake.weight_of(Fake(w + 0.5 * (b @ a).detach(), "int8-int4"))
    torch.testing.assert_close(y.detach(), linear(rounded_x, whole))
    torch.testing.assert_close(db, 0.5 * dy.mT @ rounded_x @ a.detach().mT)
    torch.testing.assert_close(da, 0.5 * b.detach().mT @ dy.mT @ rounded_x)


def test_full_fine_tuning_learns_under_rounding(folder: Path, tmp_path: Path) -> None:
    """And saves the weights that were trained, not the rounded ones."""
    model = load(folder, load_in_16bit=False, full_finetuning=True, qat_scheme="int4").train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(8):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    model.save_pretrained(tmp_path / "out")
    saved = load_folder(
        tmp_path / "out", quantize=None, dtype=None, device=torch.device("cpu")
    ).params
    for (path, a), (_, b) in zip(tree.items(saved), tree.items(model.params), strict=True):
        assert torch.equal(a, b), path


def test_what_cannot_be_rounded_says_why(folder: Path) -> None:
    model = load(folder)
    for scheme, words in (("int3", "expected one of int4"), ("nvfp4", "compute capability 10")):
        with pytest.raises(ArgumentError, match=words):
            FastLanguageModel.get_peft_model(model, qat_scheme=scheme)
    with pytest.raises(ArgumentError, match="lora_dropout"):
        FastLanguageModel.get_peft_model(model, qat_scheme="int8", lora_dropout=0.1)
    with pytest.raises(ArgumentError, match="full_finetuning=True"):
        load(folder, qat_scheme="int8")
    with pytest.raises(ArgumentError, match="load_in_16bit"):
        packed = load(folder, load_in_16bit=False)
        FastLanguageModel.get_peft_model(packed, qat_scheme="int8")
    narrow = tiny.hf_model("llama")
    with pytest.raises(KernelError, match="groups of 128"):
        fake.check(narrow.model.layers[0].mlp.up_proj.weight.shape, "int4", "up")
    assert model.qat_scheme is None and not model.adapters
    # An error leaves the model as it was.
    FastLanguageModel.get_peft_model(model, r=4)
    with pytest.raises(ArgumentError, match="other settings"):
        FastLanguageModel.get_peft_model(model, r=8, qat_scheme="int8")
    assert model.qat_scheme is None
