"""use_dora: peft's logits, gradients and files; training, merging and reports."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import bridged
import folders
import peft
import pytest
import torch
import transformers
from oracles import assert_rows
from safetensors.torch import load_file, save_file

from purelm import FastLanguageModel
from purelm.convert.fused import Fused
from purelm.convert.merge_tensor import Parts, changed, check, check_changed, merged
from purelm.errors import AdapterError, ArgumentError, SaveError
from purelm.nn import decoder, lora, loss, tree
from purelm.nn.residuals import KEEP, OFFLOAD, RECOMPUTE

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
TARGETS = ["q_proj", "o_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("dora")
    folders.whole(path, "qwen2")
    return path


def load(folder: Path, **options: Any) -> Any:
    given = {"load_in_16bit": True, "dtype": torch.float32, "device_map": "cpu", **options}
    return FastLanguageModel.from_pretrained(folder, **given)[0]


def adapted(folder: Path, dropout: float = 0.0, **options: Any) -> Any:
    model = FastLanguageModel.get_peft_model(
        load(folder, **options),
        r=4,
        lora_alpha=7,
        lora_dropout=dropout,
        target_modules=TARGETS,
        use_dora=True,
    )
    bridged.spread_trained(model)
    return model


def theirs(folder: Path, saved: Path) -> Any:
    hf: Any = transformers
    base = hf.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return peft.PeftModel.from_pretrained(base, str(saved), is_trainable=True)


def test_it_starts_as_the_base(folder: Path) -> None:
    fresh = FastLanguageModel.get_peft_model(load(folder), r=4, use_dora=True).eval()
    bridged.same_logits(fresh(bridged.ids()).logits.detach(), load(folder)(bridged.ids()).logits)


def test_peft_has_the_same_logits_gradients_and_files(folder: Path, tmp_path: Path) -> None:
    model = adapted(folder)
    model.save_pretrained(tmp_path / "ours")
    other = theirs(folder, tmp_path / "ours").eval()
    other.save_pretrained(tmp_path / "theirs")
    ours, peer = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs")
    )
    assert ours.keys() == peer.keys() and all(torch.equal(ours[n], peer[n]) for n in ours)
    model.train()
    got, want = (m(input_ids=bridged.ids(), labels=bridged.ids()) for m in (model, other))
    bridged.same_logits(got.logits.detach(), want.logits.detach())
    got.loss.backward()
    want.loss.backward()
    grads = {n.replace(".default", ""): p.grad for n, p in other.named_parameters()}
    checked = 0
    for name, p in model.named_parameters():
        if p.requires_grad:
            peers = grads["base_model.model." + name]
            assert (p.grad - peers).abs().max() <= 2e-5 * peers.abs().max(), name
            checked += 1
    assert checked == 3 * len(TARGETS) * len(model.spec.layers)
    again = FastLanguageModel.from_pretrained(
        tmp_path / "theirs", dtype=torch.float32, load_in_4bit=False, device_map="cpu"
    )[0]
    assert torch.equal(again(bridged.ids()).logits, model.eval()(bridged.ids()).logits)
    assert again.peft_config["default"].use_dora


def test_policies_and_dropout(folder: Path) -> None:
    model = adapted(folder, dropout=0.3, load_in_16bit=False, load_in_4bit=True)
    found = []
    for policy in (KEEP, RECOMPUTE, OFFLOAD):
        model.residuals, model.dropout_step = policy, 0
        model.zero_grad()
        model.train()(bridged.ids(), labels=bridged.ids()).loss.backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    for grads in zip(*found, strict=True):
        assert grads[0].abs().max() > 0 and all(torch.equal(grads[0], g) for g in grads)
    dropped = model(bridged.ids()).logits
    assert not torch.equal(dropped, model.eval()(bridged.ids()).logits)
    assert "DoRA r=4" in model.explain() and "by autograd, for DoRA with dropout" in model.explain()
    plain = FastLanguageModel.get_peft_model(load(folder), r=4)
    assert "DoRA" not in plain.explain()


def test_per_sample_gradients(folder: Path) -> None:
    model = adapted(folder)
    params = tree.map_tensors(torch.Tensor.detach, model.params)
    adapters = tree.map_tensors(torch.Tensor.detach, model.adapters)
    ids = bridged.ids(rows=3, length=9)[:, None]

    def value(adapters: Any, row: torch.Tensor) -> torch.Tensor:
        return loss.loss(params, model.spec, row, labels=row, adapters=adapters)

    every = torch.func.vmap(torch.func.grad(value), in_dims=(None, 0))(adapters, ids)
    for i, row in enumerate(ids):
        one = torch.func.grad(value)(adapters, row)
        for a, b in zip(tree.tensors(every), tree.tensors(one), strict=True):
            assert (a[i] - b).abs().max() <= 1e-4 * b.abs().max()


@pytest.mark.parametrize("method", ["merged_16bit", "merged_4bit"])
def test_merged(folder: Path, tmp_path: Path, method: str) -> None:
    four = method == "merged_4bit"
    model = adapted(folder, load_in_16bit=not four, load_in_4bit=four).eval()
    want = decoder.forward(lora.merge(model.params, model.adapters), model.spec, bridged.ids())
    bridged.same_logits(model(bridged.ids()).logits.detach(), want.detach())
    model.save_pretrained_merged(tmp_path / "merged", save_method=method)
    saved = FastLanguageModel.from_pretrained(
        tmp_path / "merged", dtype=torch.float32, load_in_4bit=four, device_map="cpu"
    )[0]
    got = saved(bridged.ids()).logits.detach()
    if four:  # what is quantized again loses some
        assert (got - want).abs().mean() < 0.3 * want.abs().mean()
    else:
        bridged.same_logits(got, want.detach())
        model.save_pretrained(tmp_path / "adapter")
        peers = theirs(folder, tmp_path / "adapter").merge_and_unload()
        bridged.same_logits(got, peers(bridged.ids()).logits.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_written_is_checked(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    a, b, m = (torch.randn(*size, generator=g) for size in ((3, 40), (24, 3), (24,)))
    adapter = lora.LoRA(a, b, 0.7, magnitude=m)
    base = torch.randn(24, 40, generator=g).to(dtype)
    base[3], b[3] = 0.0, 0.0
    made = merged(base.clone(), adapter, "w")
    check(base, made, adapter, "w")
    whole = base.double() + 0.7 * b.double() @ a.double()
    exact = whole * (m.double() / whole.norm(dim=1).clamp(min=1e-30))[:, None]
    assert_rows(made, exact.to(dtype), exact)
    for wrong in (replace(adapter, magnitude=m * 1.01), replace(adapter, magnitude=None)):
        with pytest.raises(SaveError, match="nothing is saved"):
            check(base, made, wrong, "w")


@pytest.mark.parametrize("turned", [False, True])
def test_fused_parts(turned: bool) -> None:
    """Each part has its own adapter, or none, also where the matrix is stored [in, out]."""
    g = torch.Generator().manual_seed(0)
    parts = tuple(
        lora.LoRA(torch.randn(2, 6, generator=g), torch.randn(n, 2, generator=g), s, 0.0, m)
        for n, s, m in ((4, 0.5, torch.rand(4)), (2, 2.0, torch.rand(2)))
    )
    whole = Fused("qkv", ("q", "k", "v"), (4, 2, 2), (6,), groups=2)
    base = torch.randn(8, 6, generator=g)
    stored = base.T.clone() if turned else base.clone()
    before, change = stored.clone(), Parts(whole, (*parts, None), turned)
    made = changed(stored, change, "qkv")
    check_changed(before, made, change, "qkv")
    rows = made.T if turned else made
    for i, adapter in enumerate(parts):
        assert torch.equal(whole.part(rows, i), lora.merged(whole.part(base, i), adapter))
    assert torch.equal(whole.part(rows, 2), whole.part(base, 2))
    whole.put(rows, 2, torch.zeros(2, 6))
    with pytest.raises(SaveError, match="v in qkv was to stay"):
        check_changed(before, made, change, "qkv")


def test_bad_input(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="use_dora"):
        FastLanguageModel.get_peft_model(load(folder), use_dora="yes")  # type: ignore[arg-type]
    with pytest.raises(NotImplementedError, match="pissa"):
        FastLanguageModel.get_peft_model(load(folder), use_dora=True, init_lora_weights="pissa")
    with pytest.raises(NotImplementedError, match="use_dora=True with qat_scheme"):
        FastLanguageModel.get_peft_model(load(folder), use_dora=True, qat_scheme="int8")
    model = adapted(folder)
    with pytest.raises(ArgumentError, match="other settings"):
        FastLanguageModel.get_peft_model(model, r=4, lora_alpha=7, target_modules=TARGETS)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(n for n in tensors if n.endswith("magnitude_vector"))
    for other, problem in (
        ({n: t for n, t in tensors.items() if n != name}, "missing"),
        ({**tensors, name: tensors[name][:-1].clone()}, "found shape"),
    ):
        save_file(other, file)
        with pytest.raises(AdapterError, match=problem):
            load(tmp_path)
    save_file(tensors, file)
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace('"use_dora": true', '"use_dora": false'))
    with pytest.raises(AdapterError, match="use_dora is not true"):
        load(tmp_path)
