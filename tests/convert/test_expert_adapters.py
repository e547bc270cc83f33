"""Adapters on experts in peft's files, both as parameters and expert by expert, against peft."""

from pathlib import Path
from typing import Any

import bridged
import peft
import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file

from purelm.convert import peft_config
from purelm.convert.adapter_file import read_adapter
from purelm.errors import AdapterError, ArgumentError
from purelm.nn import decoder, tree

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
    # peft warns of patterns that its own conversion made.
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys"),
]
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def base(family: str, folder: Path) -> tuple[Path, Any]:
    folder = tiny.save(tiny.hf_model(family), folder / "base")
    return folder, bridged.bridge(folder)


def adapted(model: Any, **settings: Any) -> Any:
    settings = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj"], **settings}
    peft_config.apply(model, **settings).eval()
    bridged.spread_trained(model)
    return model


def hf(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def logits(model: Any) -> torch.Tensor:
    ids = bridged.ids()
    return decoder.forward(model.params, model.spec, ids, adapters=model.adapters).detach()


@pytest.mark.parametrize("targets", [BOTH, BOTH[:1], BOTH[1:]], ids=["both", "gate up", "down"])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_peft_loads_ours(family: str, targets: list[str], tmp_path: Path) -> None:
    """As parameters: peft's logits over transformers are ours, merged by either side too."""
    folder, model = base(family, tmp_path)
    plain = logits(model)
    adapted(model, target_parameters=targets)
    model.save_pretrained(tmp_path / "adapter")
    want = logits(model)
    assert not torch.allclose(plain, want)
    theirs = peft.PeftModel.from_pretrained(hf(folder), tmp_path / "adapter").eval()
    bridged.same_logits(theirs(bridged.ids()).logits.detach(), want)
    merged = theirs.merge_and_unload()
    bridged.same_logits(merged(bridged.ids()).logits.detach(), want)
    model.save_pretrained_merged(tmp_path / "merged")
    bridged.same_logits(hf(tmp_path / "merged")(bridged.ids()).logits.detach(), want)
    again, trained, config = read_adapter(
        tmp_path / "adapter", model.spec, model.origin.family.names
    )
    assert not trained and set(config.target_parameters or ()) == set(targets)
    pairs = zip(tree.items(again), tree.items(model.adapters), strict=True)
    assert all(
        p == q and torch.equal(a.a, b.a) and torch.equal(a.b, b.b) for (p, a), (q, b) in pairs
    )


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_ours_loads_peft(family: str, tmp_path: Path) -> None:
    folder, model = base(family, tmp_path)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["v_proj"], "target_parameters": BOTH}
    theirs = peft.get_peft_model(hf(folder), peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(2)
    for name, p in theirs.named_parameters():
        if "lora_B" in name:
            p.data.normal_(0, 0.3, generator=generator)
    theirs.save_pretrained(tmp_path / "adapter")
    made, trained, config = read_adapter(
        tmp_path / "adapter", model.spec, model.origin.family.names
    )
    model.set_adapters(made, trained, config=config)
    bridged.same_logits(theirs.eval()(bridged.ids()).logits.detach(), logits(model))
    model.save_pretrained(tmp_path / "again")
    one, other = (
        load_file(tmp_path / f / "adapter_model.safetensors") for f in ("adapter", "again")
    )
    assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_peft_loads_experts_one_by_one(family: str, tmp_path: Path) -> None:
    """Named as each expert's own projections, which peft converts for transformers 5."""
    folder, model = base(family, tmp_path)
    names = ["w1", "w2", "w3"] if family == "mixtral" else ["gate_proj", "up_proj", "down_proj"]
    adapted(model, target_modules=["q_proj", *names])
    model.save_pretrained(tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(hf(folder), tmp_path / "adapter").eval()
    bridged.same_logits(theirs(bridged.ids()).logits.detach(), logits(model))


def test_experts_train_as_one(tmp_path: Path) -> None:
    """The parameters' adapters move, and target_modules means no expert beside them."""
    _, model = base("qwen3_moe", tmp_path)
    adapted(model, target_modules=["q_proj", "up_proj"], target_parameters=BOTH).train()
    paths = [path for path, _ in tree.items(model.adapters)]
    assert [p.rpartition(".")[2] for p in paths if "layers.1" in p] == ["q", "gate_up", "down"]
    model(bridged.ids(), labels=bridged.ids()).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in tree.tensors(model.adapters))
    assert "experts.gate: 6 experts, each" in model.explain() and "LoRA r=3" in model.explain()


def test_what_it_refuses(tmp_path: Path) -> None:
    _, model = base("qwen3_moe", tmp_path)
    for settings, message in [
        ({"target_parameters": ["experts.w1"]}, "matches nothing; this model has mlp.experts.down"),
        ({"target_parameters": "gate_up_proj"}, "a list of names"),
        ({"target_parameters": BOTH, "lora_dropout": 0.1}, "neither dropout nor DoRA"),
        ({"target_parameters": BOTH, "use_dora": True}, "neither dropout nor DoRA"),
        ({"target_parameters": BOTH, "init_lora_weights": "olora"}, "starts inside one weight"),
    ]:
        with pytest.raises(ArgumentError, match=message):
            adapted(model, **settings)
    adapted(model, target_parameters=BOTH)
    model.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    stored = load_file(file)
    name = "base_model.model.model.layers.1.mlp.experts.lora_A.weight"
    names = model.origin.family.names
    save_file({**stored, name: stored[name][:5].clone()}, file)
    with pytest.raises(AdapterError, match="the config and the model make them"):
        read_adapter(tmp_path / "adapter", model.spec, names)
    save_file({n: t for n, t in stored.items() if "layers.1.mlp" not in n}, file)
    with pytest.raises(AdapterError, match=r"missing: model.layers.1.mlp.experts.gate_up_proj"):
        read_adapter(tmp_path / "adapter", model.spec, names)
