"""Adapters on experts in peft's files, both as parameters and expert by expert, against peft."""

from pathlib import Path
from typing import Any

import bridged
import peft
import pytest
import tiny
import torch
import transformers
from family_cases import MOE4
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from purelm.convert import peft_config
from purelm.convert.adapter_config import read_config
from purelm.convert.adapter_file import read_adapter
from purelm.errors import AdapterError, ArgumentError
from purelm.nn import decoder, tree

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
    # peft warns of patterns that its own conversion made.
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys"),
]
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
PARTS = ["gate_proj", "up_proj", "down_proj"]
# Families and what is adapted, single experts among it. peft puts some of them together itself, but
# takes shared experts and dense MLPs for them, and gate for gate and up.
SINGLE: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "qwen3_moe": ("qwen3_moe", {}, {"target_modules": ["q_proj", "gate_proj", "down_proj"]}),
    "gate and up": ("mixtral", {}, {"target_modules": ["w1", "w3"]}),
    "a layer": (
        "qwen3_moe",
        {},
        {"target_modules": [*PARTS, "v_proj"], "layers_to_transform": [1]},
    ),
    "ranks": (
        "qwen3_moe",
        {},
        {"target_modules": PARTS, "rank_pattern": {"up_proj": 2}, "alpha_pattern": {"up_proj": 4}},
    ),
    "qwen2_moe": (
        "qwen2_moe",
        {"mlp_only_layers": [0]},
        {"target_modules": ["q_proj", *PARTS], "rank_pattern": {"shared_expert.up_proj": 2}},
    ),
    "some layers": (
        "qwen2_moe",
        {},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1, 2]},
    ),
    "granitemoe": ("granitemoe", {}, {"target_modules": ["o_proj", *PARTS]}),
    "glm4_moe": ("glm4_moe", {}, {"target_modules": "all-linear"}),
    "deepseek_v3": ("deepseek_v3", {}, {"target_modules": "all-linear"}),
    "deepseek_v2": ("deepseek_v2", {}, {"target_modules": "all-linear"}),
    "lfm2_moe": ("lfm2_moe", {}, {"target_modules": ["w1", "w2", "w3"]}),
    "llama4_text": ("llama4_text", {}, {"target_modules": ["v_proj", *PARTS]}),
    "phimoe": ("phimoe", {}, {"target_modules": ["w1", "w2", "w3"]}),
    "granitemoehybrid": (
        "granitemoehybrid",
        {},
        {"target_modules": ["q_proj", *PARTS, "input_linear"], "use_rslora": True},
    ),
    "gpt_oss": ("gpt_oss", {}, {"target_modules": ["q_proj", *PARTS]}),
    "gemma4_text": ("gemma4_text", {"num_kv_shared_layers": 0, **MOE4}, {"target_modules": PARTS}),
}


def base(family: str, folder: Path, **switches: Any) -> tuple[Path, Any]:
    folder = tiny.save(tiny.hf_model(family, **switches), folder / "base")
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
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss", "llama4_text"])
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


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "llama4_text"])
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


def test_patterns_of_parameters_that_are_modules_here(tmp_path: Path) -> None:
    folder, model = base("qwen3_moe", tmp_path)
    patterns = {"rank_pattern": {r"1\.self_attn\.v_proj\.weight": 2}}
    settings = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": [],
        "target_parameters": ["v_proj.weight"],
    }
    wanted = peft.LoraConfig(task_type="CAUSAL_LM", **settings, **patterns)
    theirs = peft.get_peft_model(hf(folder), wanted)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_B" in name:
                p.fill_(0.1)
    theirs.save_pretrained(tmp_path / "adapter")
    made, _, config = read_adapter(tmp_path / "adapter", model.spec, model.origin.family.names)
    assert {leaf.rank for leaf in tree.leaves(made)} == {4, 2}
    model.set_adapters(made, config=config)
    bridged.same_logits(theirs.eval()(bridged.ids()).logits.detach(), logits(model))


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_peft_loads_experts_one_by_one(family: str, tmp_path: Path) -> None:
    """Named as each expert's own projections, which peft converts for transformers 5."""
    folder, model = base(family, tmp_path)
    names = ["w1", "w2", "w3"] if family == "mixtral" else ["gate_proj", "up_proj", "down_proj"]
    adapted(model, target_modules=["q_proj", *names])
    model.save_pretrained(tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(hf(folder), tmp_path / "adapter").eval()
    bridged.same_logits(theirs(bridged.ids()).logits.detach(), logits(model))


@pytest.mark.parametrize("case", SINGLE)
def test_peft_loads_single_experts_as_parameters(case: str, tmp_path: Path) -> None:
    """The same logits there; here again every leaf is what it was, and training goes on."""
    family, switches, settings = SINGLE[case]
    folder, model = base(family, tmp_path, **switches)
    adapted(model, **settings)
    model.save_pretrained(tmp_path / "adapter")
    want = logits(model)
    theirs = peft.PeftModel.from_pretrained(hf(folder), tmp_path / "adapter").eval()
    bridged.same_logits(theirs(bridged.ids()).logits.detach(), want)
    saved = read_config(tmp_path / "adapter") or {}
    assert any("experts" in name for name in saved["target_parameters"])
    again = bridged.bridge(folder)
    made, trained, config = read_adapter(
        tmp_path / "adapter", again.spec, again.origin.family.names
    )
    assert not trained and config.target_parameters is None
    leaves, kept = dict(tree.items(made)), dict(tree.items(model.adapters))
    assert leaves.keys() == kept.keys()
    for path, leaf in leaves.items():
        torch.testing.assert_close(leaf.b * leaf.scale, kept[path].b.detach() * kept[path].scale)
        assert torch.equal(leaf.a, kept[path].a)
    again.set_adapters(made, config=config)
    peft_config.apply(again, r=3, lora_alpha=6, **{"target_modules": ["q_proj"], **settings})


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5_moe_text"])
def test_peft_merges_what_is_merged_here(family: str, tmp_path: Path) -> None:
    """Of families whose forward pass needs other libraries' kernels there, the weights tell."""
    folder, model = base(family, tmp_path)
    adapted(model, target_modules="all-linear")
    model.save_pretrained(tmp_path / "adapter")
    model.save_pretrained_merged(tmp_path / "merged")
    theirs = peft.PeftModel.from_pretrained(hf(folder), tmp_path / "adapter").merge_and_unload()
    before, ours = hf(folder).state_dict(), hf(tmp_path / "merged").state_dict()
    changed = 0
    for name, want in theirs.state_dict().items():
        torch.testing.assert_close(ours[name], want, rtol=1e-6, atol=1e-7)
        changed += not torch.equal(before[name], want)
    assert changed >= 6 * len(model.spec.layers)


def test_single_experts_that_peft_trained_on(tmp_path: Path) -> None:
    """Where gate's ranks act on up too, they are one adapter of both from then on."""
    folder, model = base("granitemoe", tmp_path)
    adapted(model, target_modules=["gate_proj", "up_proj"])
    model.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    stored = {n: t + 0.1 if "lora_B" in n else t for n, t in load_file(file).items()}
    save_file(stored, file, header)
    theirs = peft.PeftModel.from_pretrained(hf(folder), tmp_path / "adapter").eval()
    names = model.origin.family.names
    made, _, config = read_adapter(tmp_path / "adapter", model.spec, names)
    model.set_adapters(made, config=config)
    bridged.same_logits(theirs(bridged.ids()).logits.detach(), logits(model))
    assert config.target_parameters == ("block_sparse_moe.experts.gate_up_proj",)


@pytest.mark.parametrize("family", ["granitemoe", "qwen3_moe"])
def test_dropout_beside_experts_is_kept_where_peft_does_not_look(
    family: str, tmp_path: Path
) -> None:
    """Parameters have none in peft, and in use there is none: it makes of the file what we do."""
    folder, model = base(family, tmp_path)
    adapted(model, target_modules=["q_proj", "gate_proj", "up_proj"], lora_dropout=0.1)
    model.save_pretrained(tmp_path / "adapter")
    assert (read_config(tmp_path / "adapter") or {})["lora_dropout"] == 0.0
    theirs = peft.PeftModel.from_pretrained(hf(folder), tmp_path / "adapter").eval()
    bridged.same_logits(theirs(bridged.ids()).logits.detach(), logits(model))
    names, again = model.origin.family.names, bridged.bridge(folder)
    made, _, config = read_adapter(tmp_path / "adapter", model.spec, names)
    again.set_adapters(made, config=config)
    assert config.lora_dropout == 0.1
    assert {leaf.dropout for leaf in tree.leaves(again.adapters)} == {0.1}
    peft_config.apply(
        again,
        r=3,
        lora_alpha=6,
        lora_dropout=0.1,
        target_modules=["q_proj", "gate_proj", "up_proj"],
    )
    file = adapter_tensors(tmp_path)
    for text in ("x", "1", "-0.1", "nan"):
        save_file(load_file(file), file, {"format": "pt", "purelm.dropout": text})
        with pytest.raises(AdapterError, match=r"purelm\.dropout is"):
            read_adapter(tmp_path / "adapter", model.spec, names)


def test_dora_of_experts_is_for_purelm_alone(tmp_path: Path) -> None:
    _, model = base("qwen3_moe", tmp_path)
    adapted(model, target_modules=PARTS, use_dora=True)
    assert "peft has no DoRA of experts over transformers 5" in model.report()
    model.save_pretrained(tmp_path / "adapter")
    made, _, config = read_adapter(tmp_path / "adapter", model.spec, model.origin.family.names)
    want = logits(model)
    model.set_adapters(made, config=config)
    assert torch.equal(logits(model), want)


def adapter_tensors(folder: Path) -> Path:
    return folder / "adapter" / "adapter_model.safetensors"


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
