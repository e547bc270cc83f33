"""Low-rank adapters of the head: peft is the oracle for logits, loss, gradients and files."""

from functools import partial
from pathlib import Path
from typing import Any

import bridged
import folders
import peft
import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file

from purelm import Engine, FastLanguageModel, Request
from purelm.convert import adapter_load, peft_config
from purelm.convert.bridge import CausalLM
from purelm.errors import AdapterError, ArgumentError
from purelm.nn import tree

pytestmark = [
    # peft says what it saves beside an adapter of the head, and that a tied head is one to part.
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:Model (with|has) `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]

TIED = {"tie_word_embeddings": True}
HEAD = {"target_modules": ["q_proj", "lm_head"], "rank_pattern": {"lm_head": 3}}
CAPPED = {"final_logit_softcapping": 3.0}
# (family, its switches, arguments that peft and purelm understand alike)
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "plain": ("llama", {}, HEAD),
    "alone": ("llama", {}, {**HEAD, "target_modules": ["lm_head"], "use_rslora": True}),
    "regex": ("llama", {}, {**HEAD, "target_modules": r".*\.v_proj|lm_head"}),
    "tied": ("llama", TIED, HEAD),
    "capped": ("gemma2", CAPPED, {**HEAD, "alpha_pattern": {"lm_head": 7}}),
    "scaled": ("cohere", {"logit_scale": 0.25}, HEAD),
    "bias": ("phi", {}, {**HEAD, "bias": "lora_only"}),
    "dora": ("qwen2", {}, {**HEAD, "use_dora": True}),
}


def made(case: str, tmp_path: Path) -> tuple[Any, Path, CausalLM]:
    """The model of transformers, its folder, and ours with adapters that were trained."""
    family, switches, arguments = CASES[case]
    base = tiny.hf_model(family, **switches)
    folder = tiny.save(base, tmp_path / "base")
    model = bridged.bridge(folder)
    peft_config.apply(model, r=4, lora_alpha=16, **arguments).eval()
    bridged.spread_trained(model)
    return base, folder, model


def by_path(model: Any) -> dict[str, torch.Tensor]:
    """peft's gradients by the names that ours have."""
    found = {}
    for name, p in model.named_parameters():
        if p.grad is not None:
            name = name.removeprefix("base_model.model.").replace(".default", "")
            found[name.replace(".base_layer.bias", ".trained_bias")] = p.grad
    return found


@pytest.mark.parametrize("case", CASES)
def test_peft_loads_ours_and_trains_alike(case: str, tmp_path: Path) -> None:
    base, folder, model = made(case, tmp_path)
    arguments = CASES[case][2]
    head = model.adapters["head"]
    assert head.rank == 3 and not tree.get(model.trained, "head", "weight")
    ids = bridged.ids()
    model.save_pretrained(tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True).eval()
    assert "lm_head.lora_A.default" in "\n".join(name for name, _ in theirs.named_modules())
    want = theirs(ids, labels=ids)
    got = model(ids, labels=ids)
    bridged.same_logits(got.logits.detach(), want.logits.detach())
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-5, atol=0)
    got.loss.backward()
    want.loss.backward()
    grads = by_path(theirs)
    ours = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    if not arguments.get("use_dora"):
        assert ours.keys() == grads.keys()
    for name, grad in ours.items():
        off = (grad - grads[name]).norm() / grads[name].norm()
        assert off <= 1e-4, (name, float(off))

    again = bridged.bridge(folder)
    one = adapter_load.load(again, tmp_path / "adapter")
    again.set_adapters(one.adapters, one.trained, config=one.config)
    assert torch.equal(again(ids).logits, got.logits)


@pytest.mark.parametrize("case", ["plain", "regex", "tied", "bias", "dora"])
def test_we_load_pefts(case: str, tmp_path: Path) -> None:
    """Beside its adapter peft saves the head's frozen weight, which must be the base's."""
    family, switches, arguments = CASES[case]
    base = tiny.hf_model(family, **switches)
    folder = tiny.save(base, tmp_path / "base")
    settings = peft.LoraConfig(r=4, lora_alpha=16, task_type="CAUSAL_LM", **arguments)
    theirs = peft.get_peft_model(base, settings).eval()
    bridged.spread_trained(theirs)
    theirs.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    stored = load_file(file)
    frozen = "base_model.model.lm_head.base_layer.weight"
    assert frozen in stored
    model, ids = bridged.bridge(folder), bridged.ids()
    one = adapter_load.load(model, tmp_path / "adapter")
    model.set_adapters(one.adapters, one.trained, config=one.config)
    bridged.same_logits(model(ids).logits.detach(), theirs(ids).logits.detach())
    fresh = peft_config.apply(bridged.bridge(folder), r=4, lora_alpha=16, **arguments)
    assert {p for p, _ in tree.items(fresh.adapters)} == {p for p, _ in tree.items(one.adapters)}
    model.save_pretrained(tmp_path / "again")
    written = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert written.keys() == stored.keys() - {frozen}
    assert all(torch.equal(written[name], stored[name]) for name in written)
    save_file({**stored, frozen: stored[frozen] + 0.1}, file)
    with pytest.raises(AdapterError, match=r"another than this model's.*lm_head\.base_layer"):
        adapter_load.load(bridged.bridge(folder), tmp_path / "adapter")


@pytest.mark.parametrize("case", CASES)
def test_merged(case: str, tmp_path: Path) -> None:
    """transformers runs what was merged; a head that was the embedding is a matrix of its own."""
    _, folder, model = made(case, tmp_path)
    ids = bridged.ids()
    want = model(ids).logits.detach()
    model.save_pretrained_merged(tmp_path / "merged")
    load = transformers.AutoModelForCausalLM.from_pretrained
    theirs = load(tmp_path / "merged", dtype=torch.float32, attn_implementation="eager").eval()
    bridged.same_logits(theirs(ids).logits.detach(), want)
    again = bridged.bridge(tmp_path / "merged")
    bridged.same_logits(again(ids).logits.detach(), want)
    assert not again.spec.tied
    base = bridged.bridge(folder)
    assert torch.equal(again.params["embed"]["weight"], base.params["embed"]["weight"])


@pytest.mark.parametrize("tied", [False, True])
def test_merged_where_the_vocabulary_has_grown(tied: bool, tmp_path: Path) -> None:
    """And where the rest is stored in 4 bits."""
    folder = tmp_path / "base"
    folders.whole(folder, "llama", tie_word_embeddings=tied)
    load = partial(FastLanguageModel.from_pretrained, dtype="float32")
    rows = folders.VOCAB + 5
    model, _ = load(str(folder), load_in_16bit=True, resize_model_vocab=rows)
    FastLanguageModel.get_peft_model(model, r=4, init_lora_weights="gaussian", **HEAD).eval()
    bridged.spread_trained(model)
    ids = bridged.ids()
    assert model.adapters["head"].b.shape[0] == rows
    model.save_pretrained_merged(tmp_path / "merged")
    again, _ = load(str(tmp_path / "merged"), load_in_16bit=True)
    assert not again.spec.tied
    bridged.same_logits(again(ids).logits.detach(), model(ids).logits.detach())
    model, _ = load(str(folder), load_in_4bit=True)
    FastLanguageModel.get_peft_model(model, r=4, target_modules=["lm_head"],
                                     rank_pattern={"lm_head": 2}).eval()  # fmt: skip
    bridged.spread_trained(model)
    model.save_pretrained_merged(tmp_path / "four", None, "merged_4bit")
    again, _ = load(str(tmp_path / "four"), load_in_4bit=True)
    bridged.same_logits(again(ids).logits.detach(), model(ids).logits.detach())


@pytest.mark.parametrize("case", ["plain", "tied", "dora"])
def test_generates_as_peft(case: str, tmp_path: Path) -> None:
    base, _, model = made(case, tmp_path)
    with torch.no_grad():
        model.adapters["head"].b.mul_(8)  # enough for other tokens than the base's
    model.save_pretrained(tmp_path / "adapter")
    padded = bridged.left_padded((6, 4), 0, 0)
    alone = padded["input_ids"][:1]
    how: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    how["eos_token_id"] = 2
    plain = base.generate(**padded, **how)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    want = theirs.generate(**padded, **how)
    assert torch.equal(model.generate(**padded, **how), want)
    guessed = model.generate(alone, prompt_lookup_num_tokens=2, **how)
    assert guessed.shape[1] > 6 and torch.equal(guessed, want[:1, : guessed.shape[1]])
    assert not torch.equal(plain, want)
    pairs = zip(*padded.values(), strict=True)
    asked = [Request(row[mask == 1].tolist(), 8, eos_ids=(2,)) for row, mask in pairs]
    for found, row in zip(Engine(model).run(asked), want[:, 6:].tolist(), strict=True):
        assert found == row[: len(found)] and (len(found) == 8 or found[-1] == 2)
    with model.disable_adapter():
        assert torch.equal(model.generate(**padded, **how), plain)


def test_two_at_once_add_up(tmp_path: Path) -> None:
    """As in peft, and one of them from peft's own config."""
    base, _, model = made("plain", tmp_path)
    settings = peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
    model.add_adapter("other", settings)
    assert tree.get(model.worn["other"].adapters, "head").rank == 2
    model.set_adapter(["default", "other"])
    model.save_pretrained(tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    theirs.load_adapter(tmp_path / "adapter" / "other", "other")
    theirs.base_model.set_adapter(["default", "other"])
    ids = bridged.ids()
    bridged.same_logits(model.eval()(ids).logits.detach(), theirs.eval()(ids).logits.detach())


def test_training_goes_on(tmp_path: Path) -> None:
    """Steps of training, saved, loaded and taken up by the same call: the same next step."""
    folder = tmp_path / "base"
    folders.whole(folder, "qwen2")
    load = partial(FastLanguageModel.from_pretrained, dtype="float32", load_in_16bit=True)
    wear = partial(FastLanguageModel.get_peft_model, r=4, lora_dropout=0.2, **HEAD)
    model, ids = wear(load(str(folder))[0]), bridged.ids()
    start = model.adapters["head"].b.clone()

    def step(model: CausalLM) -> float:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    losses = [step(model) for _ in range(4)]
    assert losses[-1] < losses[0] and not torch.equal(model.adapters["head"].b, start)
    model.save_pretrained(tmp_path / "adapter")
    again = wear(load(str(tmp_path / "adapter"))[0])
    again.dropout_step = model.dropout_step
    assert step(again) == step(model)
    assert all(map(torch.equal, tree.tensors(again.adapters), tree.tensors(model.adapters)))
    with pytest.raises(ArgumentError, match="an adapter of its own"):
        _ = again.base_model
    assert "lm_head" not in "".join(again.origin.notes)
    (line,) = [one for one in again.explain().splitlines() if "LoRA r=3" in one]
    assert line.startswith("head:" if "head" in again.params else "embed:")


WRONG: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (TIED, {**HEAD, "modules_to_save": ["embed_tokens"]}, "the same matrix"),
    (TIED, {**HEAD, "target_modules": ["lm_head", "embed_tokens"]}, "the same matrix"),
    ({}, {**HEAD, "layers_to_transform": [1]}, "in none of the layers"),
    ({}, {**HEAD, "finetune_last_n_layers": 1}, "in none of the layers"),
]


@pytest.mark.parametrize(("switches", "given", "message"), WRONG)
def test_what_cannot_be(
    switches: dict[str, Any], given: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = tiny.save(tiny.hf_model("llama", **switches), tmp_path / "base")
    with pytest.raises(ArgumentError, match=message):
        peft_config.apply(bridged.bridge(folder), r=4, **given)


def test_trained_whole_without_a_rank_of_its_own(tmp_path: Path) -> None:
    """And where it is named in modules_to_save, as in peft."""
    folder = tiny.save(tiny.hf_model("llama"), tmp_path / "base")
    for given in (
        {"target_modules": ["q_proj", "lm_head"]},
        {**HEAD, "modules_to_save": ["lm_head"]},
    ):
        model = peft_config.apply(bridged.bridge(folder), r=4, **given)
        assert tree.get(model.trained, "head", "weight") is not None
        assert tree.get(model.adapters, "head") is None
