"""Adapters of parts of fused projections against peft, both ways, in every family that has some."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import bridged
import folders
import peft
import pytest
import tiny
import torch
import transformers
from family_cases import CASES as ALL
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from purelm import FastLanguageModel
from purelm.convert import adapter_file, adapter_write, fused, peft_config, peft_targets
from purelm.convert.bridge import CausalLM
from purelm.convert.lora_config import PeftConfig
from purelm.convert.registry import FAMILIES
from purelm.errors import AdapterError, ArgumentError
from purelm.nn import lora, stacks, tree
from purelm.nn.lora import LoRA

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated",
    # Ranks of experts' parameters, which peft finds where they are.
    "ignore:The following (rank|alpha)_pattern keys did not match",
    "ignore:fan_in_fan_out is set to False but the target module is `Conv1D`",
)
MHA = {"hidden_size": 64, "num_attention_heads": 4, "num_kv_heads": 4}
# Family and switches, the parts' names of some, and the fused modules they lie in.
CASES: dict[str, tuple[str, dict[str, Any], list[str], list[str]]] = {
    "phi3": ("phi3", {}, ["q_proj", "v_proj", "up_proj"], ["qkv_proj", "gate_up_proj"]),
    "glm": ("glm", {}, ["v_proj", "gate_proj"], ["v_proj", "gate_up_proj"]),
    "glm4": ("glm4", {}, ["gate_proj", "up_proj", "o_proj"], ["gate_up_proj", "o_proj"]),
    "gpt2": ("gpt2", {}, ["k_proj", "c_fc"], ["c_attn", "c_fc"]),
    "gpt_neox": ("gpt_neox", {}, ["q_proj", "k_proj", "dense"], ["query_key_value", "dense"]),
    "falcon": ("falcon", {}, ["k_proj"], ["query_key_value"]),
    "falcon-heads": (
        "falcon",
        {**MHA, "multi_query": False, "parallel_attn": False, "bias": True},
        ["q_proj", "v_proj", "dense_h_to_4h"],
        ["query_key_value", "dense_h_to_4h"],
    ),
    "falcon-groups": (
        "falcon",
        {"new_decoder_architecture": True, "bias": True},
        ["k_proj", "v_proj"],
        ["query_key_value"],
    ),
    "granitemoehybrid": (
        "granitemoehybrid",
        {"num_local_experts": 0},
        ["gate_proj", "output_linear"],
        ["input_linear", "output_linear"],
    ),
    "granitemoeshared": (
        "granitemoeshared",
        {},
        ["shared_mlp.gate_proj", "output_linear"],
        ["input_linear", "output_linear"],
    ),
}


def folder_of(case: str, tmp_path: Path) -> tuple[Any, Path]:
    family, switches, _, _ = CASES[case]
    model = tiny.hf_model(family, **switches)
    return model, tiny.save(model, tmp_path / "base")


def adapted(folder: Path, **arguments: Any) -> CausalLM:
    model = bridged.bridge(folder)
    return peft_config.apply(model, **{"r": 4, "lora_alpha": 12, **arguments}).eval()


def read(folder: Path, model: CausalLM) -> Any:
    names = model.origin.family.names
    return adapter_file.read_adapter(folder, model.spec, names, params=model.base_params)


def same(first: tree.Tree, second: tree.Tree) -> None:
    """The same leaves, to the bit."""
    one, other = dict(tree.items(first)), dict(tree.items(second))
    assert one.keys() == other.keys()
    for path, leaf in one.items():
        assert (leaf.scale, leaf.dropout) == (other[path].scale, other[path].dropout), path
        pairs = ((getattr(x, n) for x in (leaf, other[path])) for n in ("a", "b", "magnitude"))
        assert all(a is b is None or torch.equal(a, b) for a, b in pairs), path


def peft_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_every_family_with_fused_modules_is_here() -> None:
    found = set()
    for kind in tiny._KINDS:
        config = tiny.config(kind).to_dict()
        family = FAMILIES[config["model_type"]]
        if fused.modules(family.spec(config), family.names):
            found.add(kind)
    assert found == {family for family, *_ in CASES.values()}


# A case of each family, and those of Falcon, whose class has its parts under several names.
CLASSES = {family: switches for family, switches in reversed(ALL)} | {
    f"falcon {i}": switches
    for i, (family, switches) in enumerate(ALL)
    if family == "falcon" and not switches.get("alibi")
}


@pytest.mark.parametrize("case", CLASSES)
def test_files_name_what_the_class_has(case: str) -> None:
    """What may be adapted, trained whole or trained beside an adapter, but for experts' own."""
    kind = case.partition(" ")[0]
    config = tiny.config(kind, **CLASSES[case])
    family = FAMILIES[config.model_type]
    with torch.device("meta"):
        model = getattr(transformers, family.hf_class)(config)
    spec = family.spec(config.to_dict())
    names = family.of(spec).names
    modules = {name for name, _ in model.named_modules()}
    tensors = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    projections = peft_targets.adaptable(PeftConfig(target_parameters=("none",)), spec, names)
    owners = fused.owners(spec, names)
    parts = {known for name, paths in projections.items() for known in [name] if len(paths) == 1}
    parts -= {name for name in parts if projections[name][0] in owners}
    assert parts <= modules and {one.name for one in owners.values()} <= modules
    for path in peft_targets.modules(spec, names):
        if stacks.place(f"{path}.") is None and not path.endswith("mlp.router"):
            assert fused.module_to_hf(path, spec, names) in modules
    assert set(peft_targets.parameters(spec, names).values()) <= tensors
    for path, _ in tree.items(stacks.each_spec(spec)):
        if path.endswith(".bias") and stacks.place(path) is None:
            assert fused.to_hf(path, spec, names) in tensors


VARIANTS: dict[str, dict[str, Any]] = {
    "some": {},
    "all": {"target_modules": "all-linear"},
    "dora": {"use_dora": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", CASES)
def test_peft_loads_ours(case: str, variant: str, tmp_path: Path) -> None:
    """The same logits there, and here again, where every leaf is what it was."""
    base, folder = folder_of(case, tmp_path)
    arguments = {"target_modules": CASES[case][2], **VARIANTS[variant]}
    model = adapted(folder, **arguments)
    bridged.spread_trained(model)
    model.save_pretrained(tmp_path / "adapter")
    modules = {
        # A module of experts has one parameter adapted within what adapts the other.
        name.removeprefix("base_model.model.").rpartition(".lora_")[0].removesuffix(".base_layer")
        for name in peft_tensors(tmp_path / "adapter")
    }
    assert modules <= {name for name, _ in base.named_modules()}
    # Servers that read only these two have the scale of every module.
    saved = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert saved["lora_alpha"] / saved["r"] == 12 / 4
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    ids = bridged.ids()
    ours = model(ids).logits.detach()
    bridged.same_logits(ours, theirs(ids).logits.detach())
    again = bridged.bridge(folder)
    adapters, trained, config = read(tmp_path / "adapter", again)
    again.set_adapters(adapters, trained, config=config)
    assert torch.equal(again.eval()(ids).logits, ours)
    if variant != "dora":  # with which parts without an adapter have lengths
        same(adapters, tree.map_tensors(torch.Tensor.detach, model.adapters))
        # What it says is what was asked for: the same call keeps it.
        kept = peft_config.apply(again, r=4, lora_alpha=12, **arguments).eval()
        assert torch.equal(kept(ids).logits, ours)


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("case", CASES)
def test_we_load_pefts(case: str, variant: str, tmp_path: Path) -> None:
    """Parts share A and have their rows of B, and are written again as the file was."""
    base, folder = folder_of(case, tmp_path)
    settings = peft.LoraConfig(
        r=5,
        lora_alpha=7,
        target_modules=CASES[case][3],
        use_dora=variant == "dora",
        task_type="CAUSAL_LM",
    )
    theirs = peft.get_peft_model(base, settings).eval()
    bridged.spread_trained(theirs)
    theirs.save_pretrained(tmp_path / "adapter")
    model = bridged.bridge(folder)
    adapters, trained, config = read(tmp_path / "adapter", model)
    model.set_adapters(adapters, trained, config=config)
    ids = bridged.ids()
    bridged.same_logits(model.eval()(ids).logits.detach(), theirs(ids).logits.detach())
    stored, leaves = peft_tensors(tmp_path / "adapter"), dict(tree.items(adapters))
    for name, one in fused.modules(model.spec, model.origin.family.names).items():
        if name.rpartition(".")[2] in CASES[case][3]:
            for path in one.paths:
                assert torch.equal(leaves[path].a, stored[f"base_model.model.{name}.lora_A.weight"])
    # Named by the fused module here, the same weights are meant.
    asked = dict(tree.items(adapted(folder, r=5, target_modules=CASES[case][3]).adapters))
    assert {p: x.b.shape for p, x in asked.items()} == {p: x.b.shape for p, x in leaves.items()}
    model.save_pretrained(tmp_path / "again")
    written = peft_tensors(tmp_path / "again")
    assert stored.keys() == written.keys()
    assert all(torch.equal(stored[name], written[name]) for name in stored)
    saved = json.loads((tmp_path / "again/adapter_config.json").read_text())
    assert (saved["r"], saved["lora_alpha"], saved["rank_pattern"]) == (5, 7, {})
    assert set(saved["target_modules"]) == set(CASES[case][3])


@pytest.mark.parametrize(
    "targets",
    [
        {"target_modules": r".*\.(0|2)\.attn\.c_attn"},
        {"target_modules": ["c_attn", "c_fc"], "layers_to_transform": [1], "layers_pattern": "h"},
        {"target_modules": ["c_attn", "c_proj"], "exclude_modules": ["h.1.attn.c_attn"]},
        {
            "target_modules": ["attn.c_attn", "c_proj"],
            "rank_pattern": {"c_attn": 7, "h.0.mlp.c_proj": 2},
            "alpha_pattern": {r"h\.(1|2)\.attn\.c_attn": 5},
        },
        {"target_modules": ["c_attn"], "bias": "lora_only", "modules_to_save": ["ln_f"]},
        {"target_modules": ["c_attn"], "bias": "all", "use_dora": True},
    ],
    ids=["expression", "layers", "excluded", "patterns", "saved", "biases"],
)
def test_pefts_choices_of_fused_modules(targets: dict[str, Any], tmp_path: Path) -> None:
    base, folder = folder_of("gpt2", tmp_path)
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=3, task_type="CAUSAL_LM", **targets))
    bridged.spread_trained(theirs.eval())
    theirs.save_pretrained(tmp_path / "adapter")
    model = bridged.bridge(folder)
    adapters, trained, config = read(tmp_path / "adapter", model)
    model.set_adapters(adapters, trained, config=config)
    ids = bridged.ids()
    bridged.same_logits(model.eval()(ids).logits.detach(), theirs(ids).logits.detach())
    model.save_pretrained(tmp_path / "again")
    stored, written = (peft_tensors(tmp_path / name) for name in ("adapter", "again"))
    assert stored.keys() == written.keys()
    assert all(torch.equal(stored[name], written[name]) for name in stored)
    # The same words here mean the same weights.
    asked = dict(tree.items(adapted(folder, r=3, lora_alpha=8, **targets).adapters))
    leaves = dict(tree.items(adapters))
    assert {p: (x.rank, x.scale) for p, x in asked.items()} == {
        p: (x.rank, x.scale) for p, x in leaves.items()
    }


def test_training_goes_on_as_pefts(tmp_path: Path) -> None:
    """The parts' A is one parameter: gradients, steps and files are those of the whole."""
    base, folder = folder_of("gpt_neox", tmp_path)
    settings = peft.LoraConfig(r=3, target_modules=["query_key_value"], task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(base, settings)
    bridged.spread_trained(theirs)
    theirs.save_pretrained(tmp_path / "adapter")
    model = bridged.bridge(folder)
    model.load_adapter(tmp_path / "adapter", "default", is_trainable=True)
    model.set_adapter("default")
    assert model.get_nb_trainable_parameters()[0] == theirs.get_nb_trainable_parameters()[0]
    for _ in range(3):
        for one in (model, theirs):
            one.train()(input_ids=bridged.ids(), labels=bridged.ids()).loss.backward()
        want = {name.replace(".default", ""): p for name, p in theirs.named_parameters()}
        for name, one in fused.modules(model.spec, model.origin.family.names).items():
            leaves = [tree.at(model.adapters, path) for path in one.paths]
            grads = leaves[0].a.grad, one.whole([leaf.b.grad for leaf in leaves])
            for x, got in zip("AB", grads, strict=True):
                peers = want[f"base_model.model.{name}.lora_{x}.weight"].grad
                assert (got - peers).abs().max() <= 2e-5 * peers.abs().max()
        for one in (model, theirs):
            torch.optim.SGD([p for p in one.parameters() if p.requires_grad], lr=0.1).step()
            one.zero_grad()
    model.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    ours, peers = (peft_tensors(tmp_path / name) for name in ("ours", "theirs"))
    assert ours.keys() == peers.keys()
    for name, tensor in ours.items():
        assert (tensor - peers[name]).abs().max() <= 1e-5 * peers[name].abs().max()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_state_of_a_shared_parameter(dtype: torch.dtype | None, tmp_path: Path) -> None:
    """It is there once, and comes back."""
    base, folder = folder_of("phi3", tmp_path)
    settings = peft.LoraConfig(r=3, target_modules=["qkv_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(base, settings).save_pretrained(tmp_path / "adapter")
    model = bridged.bridge(folder)
    model.adapter_dtype = dtype
    model.load_adapter(tmp_path / "adapter", "default", is_trainable=True)
    model.set_adapter("default")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert sum("lora_A" in name for name in state) == len(model.spec.layers)
    save_file(model.state_dict(), tmp_path / "state.safetensors")  # refuses what shares memory
    bridged.spread_trained(model)
    moved = model(bridged.ids()).logits.detach()
    model.load_state_dict(state)
    leaves = dict(tree.items(model.adapters))
    assert leaves["layers.1.attn.q"].a is leaves["layers.1.attn.v"].a
    assert torch.equal(leaves["layers.1.attn.v"].a, state[next(n for n in state if ".1." in n)])
    assert not torch.equal(model(bridged.ids()).logits, moved)
    model.delete_adapter("default")
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_a_folder_of_pefts_is_loaded_trained_and_handed_back(tmp_path: Path) -> None:
    folders.whole(tmp_path / "base", "phi3")
    hf: Any = transformers
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    base = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base", **options)
    settings = peft.LoraConfig(
        r=3,
        target_modules=["qkv_proj", "gate_up_proj"],
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(tmp_path / "base"),
    )
    theirs = peft.get_peft_model(base, settings)
    bridged.spread_trained(theirs)
    theirs.save_pretrained(tmp_path / "adapter")
    model, _ = FastLanguageModel.from_pretrained(
        tmp_path / "adapter", load_in_4bit=False, dtype=torch.float32, device_map="cpu"
    )
    ids = bridged.ids()
    bridged.same_logits(model(ids).logits.detach(), theirs.eval()(ids).logits.detach())
    model = FastLanguageModel.get_peft_model(
        model, r=3, lora_alpha=8, target_modules=["qkv_proj", "gate_up_proj"]
    )
    model(ids, labels=ids).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    model.eval().save_pretrained(tmp_path / "again")
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base", **options)
    again = peft.PeftModel.from_pretrained(again, tmp_path / "again").eval()
    bridged.same_logits(again(ids).logits.detach(), model(ids).logits.detach())
    # transformers by itself loads the same.
    alone = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "again", **options).eval()
    bridged.same_logits(alone(ids).logits.detach(), model(ids).logits.detach())


def test_files_that_name_the_parts(tmp_path: Path) -> None:
    """As other libraries write, whose layers have them apart."""
    _, folder = folder_of("phi3", tmp_path)
    model = adapted(folder, target_modules=["q_proj", "v_proj"])
    bridged.spread_trained(model)
    tensors = {}
    for path, leaf in tree.items(model.adapters):
        name = model.origin.family.names.module_to_hf(path)
        tensors[f"base_model.model.{name}.lora_A.weight"] = leaf.a.detach()
        tensors[f"base_model.model.{name}.lora_B.weight"] = leaf.b.detach()
    (tmp_path / "adapter").mkdir()
    save_file(tensors, tmp_path / "adapter/adapter_model.safetensors")
    config = PeftConfig(r=4, lora_alpha=12, target_modules=("q_proj", "v_proj"))
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config.to_dict()))
    adapters, _, _ = read(tmp_path / "adapter", model)
    same(adapters, tree.map_tensors(torch.Tensor.detach, model.adapters))


def test_pefts_weights_merged(tmp_path: Path) -> None:
    """What peft merges into its matrix is what is merged here."""
    base, folder = folder_of("falcon-groups", tmp_path)
    settings = peft.LoraConfig(
        r=3, target_modules=["query_key_value"], use_rslora=True, task_type="CAUSAL_LM"
    )
    theirs = peft.get_peft_model(base, settings).eval()
    bridged.spread_trained(theirs)
    theirs.save_pretrained(tmp_path / "adapter")
    model = bridged.bridge(folder)
    adapters, _, config = read(tmp_path / "adapter", model)
    assert config.use_rslora
    model.set_adapters(adapters, config=config)
    model.save_pretrained_merged(tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    for name, want in theirs.merge_and_unload().state_dict().items():
        if "query_key_value.weight" in name:
            torch.testing.assert_close(merged[name], want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("case", ["falcon-heads", "falcon-groups", "gpt2"])
def test_biases(case: str, bias: str, tmp_path: Path) -> None:
    """One of a fused module goes along with the others', and comes back."""
    base, folder = folder_of(case, tmp_path)
    model = adapted(folder, target_modules=["k_proj"], bias=bias)
    bridged.spread_trained(model)
    model.save_pretrained(tmp_path / "adapter")
    ours = model(bridged.ids()).logits.detach()
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    bridged.same_logits(ours, theirs(bridged.ids()).logits.detach())
    again = bridged.bridge(folder)
    adapters, trained, config = read(tmp_path / "adapter", again)
    again.set_adapters(adapters, trained, config=config)
    bridged.same_logits(again.eval()(bridged.ids()).logits.detach(), ours)
    for path, copy in tree.items(model.trained):
        assert torch.equal(tree.at(trained, path), copy)
    assert config.bias == bias
    with pytest.raises(ArgumentError, match=r"give the base's params"):
        adapter_write.write_adapter(
            tmp_path / "without",
            model.adapters,
            model.spec,
            model.origin.family.names,
            trained=tree.from_items({"layers.1.attn.k.bias": torch.zeros(16)}),
        )


def test_several_adapters(tmp_path: Path) -> None:
    """Each is written as its own, and the sum of two as one."""
    base, folder = folder_of("phi3", tmp_path)
    model = adapted(folder, target_modules=["q_proj"])
    model.add_adapter("other", r=2, lora_alpha=6, target_modules=["qkv_proj"])
    model.set_adapter("other")
    bridged.spread_trained(model)
    model.save_pretrained(tmp_path / "adapters")
    model.add_weighted_adapter(["default", "other"], [1.0, 0.5], "mix", "cat")
    ids = bridged.ids()
    for name in ("default", "other", "mix"):
        model.set_adapter(name)
        model.save_pretrained(tmp_path / name, selected_adapters=[name])
        place = tmp_path / name / ("" if name == "default" else name)
        theirs = peft.PeftModel.from_pretrained(tiny.hf_model("phi3"), place).eval()
        bridged.same_logits(model.eval()(ids).logits.detach(), theirs(ids).logits.detach())


def test_patterns_and_layers(tmp_path: Path) -> None:
    """Ranks and scales that differ by part: rank_pattern and alpha_pattern make the scale right."""
    base, folder = folder_of("phi3", tmp_path)
    model = adapted(
        folder,
        target_modules=["qkv_proj", "up_proj", "down_proj"],
        exclude_modules=["layers.1.self_attn.qkv_proj"],
        layers_to_transform=[0, 1],
        rank_pattern={"k_proj": 2, "up_proj": 3},
        alpha_pattern={"v_proj": 8, "qkv_proj": 5},
    )
    bridged.spread_trained(model)
    ranks = {path: leaf.rank for path, leaf in tree.items(model.adapters)}
    assert ranks == {
        **{f"layers.0.attn.{x}": n for x, n in (("q", 4), ("k", 2), ("v", 4))},
        **{f"layers.{i}.mlp.{x}": n for i in (0, 1) for x, n in (("up", 3), ("down", 4))},
    }
    model.save_pretrained(tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    ids = bridged.ids()
    bridged.same_logits(model(ids).logits.detach(), theirs(ids).logits.detach())


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_any_adapters_of_parts(data: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The file's product is each part's in its rows, in float64, and comes apart as it was."""
    kind = data.draw(st.sampled_from(["phi3", "gpt_neox", "falcon-groups", "gpt2"]))
    family, switches, _, _ = CASES[kind]
    config = tiny.config(family, **switches).to_dict()
    spec, names = FAMILIES[family].spec(config), FAMILIES[family].names
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    leaves: dict[str, LoRA] = {}
    for one in fused.modules(spec, names).values():
        own = data.draw(st.lists(st.sampled_from(one.paths), unique=True))
        shared = torch.randn(3, one.row[0], generator=g) if data.draw(st.booleans()) else None
        for path in own:
            rank, rows = data.draw(st.integers(1, 5)), one.rows[one.paths.index(path)]
            a = torch.randn(rank, one.row[0], generator=g) if shared is None else shared
            b = torch.randn(rows, len(a), generator=g)
            # Of two scales in one module one goes into B, whose rounding these powers do not need.
            leaves[path] = LoRA(a, b, data.draw(st.sampled_from([0.5, 2.0])))
    if not leaves:
        return
    folder = tmp_path_factory.mktemp("drawn") / "adapter"
    adapters = tree.from_items({path: leaves[path] for path in sorted(leaves)})
    adapter_write.write_adapter(folder, adapters, spec, names)
    stored, settings_of = peft_tensors(folder), adapter_file.read_config(folder)
    config = adapter_file.parse(settings_of, folder)
    for name, one in fused.modules(spec, names).items():
        have = [path for path in one.paths if path in leaves]
        found = f"base_model.model.{name}.lora_A.weight" in stored
        assert found == bool(have)
        if have:
            a, b = (stored[f"base_model.model.{name}.lora_{x}.weight"].double() for x in "AB")
            rank, scale = peft_config.peft_targets.rank_and_scale(config, name)
            assert rank == len(a) == sum({x.a: x.rank for x in map(leaves.get, have)}.values())
            for i, path in enumerate(one.paths):
                want = 0.0 * one.part(b, i) @ a
                if path in leaves:
                    leaf = leaves[path]
                    want = leaf.b.double() @ leaf.a.double() * leaf.scale
                torch.testing.assert_close(one.part(b, i) @ a * scale, want, rtol=0, atol=1e-12)
    back, _, _ = adapter_file.read_adapter(folder, spec, names)
    for path, leaf in tree.items(back):
        assert torch.equal(leaf.b * leaf.scale, leaves[path].b * leaves[path].scale), path
        assert torch.equal(leaf.a, leaves[path].a)
    assert dict(tree.items(back)).keys() == leaves.keys()


def test_trained_further_by_peft(tmp_path: Path) -> None:
    """Where zeros are trained, the header's ranks no longer hold, and are not followed."""
    base, folder = folder_of("phi3", tmp_path)
    model = adapted(folder, target_modules=["q_proj", "v_proj"])
    bridged.spread_trained(model)
    model.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    stored = load_file(file)
    name = "base_model.model.model.layers.1.self_attn.qkv_proj.lora_B.weight"
    stored[name] = stored[name] + 0.25
    save_file(stored, file, header)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    again = bridged.bridge(folder)
    adapters, _, config = read(tmp_path / "adapter", again)
    again.set_adapters(adapters, config=config)
    ids = bridged.ids()
    bridged.same_logits(again.eval()(ids).logits.detach(), theirs(ids).logits.detach())
    ranks = {path: leaf.rank for path, leaf in tree.items(adapters)}
    assert ranks["layers.0.attn.q"] == 4 and "layers.0.attn.k" not in ranks
    assert ranks["layers.1.attn.k"] == 8


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[1]", "does not say which"),
        ("{", "does not say which"),
        ('{"x":[[0,4],[4]]}', "does not say which"),
        ('{"x":[[4,4]]}', "does not say which"),
        ('{"x":[[0,1e9]]}', "does not say which"),
    ],
)
def test_a_wrong_header(text: str, problem: str, tmp_path: Path) -> None:
    _, folder = folder_of("phi3", tmp_path)
    model = adapted(folder, target_modules=["q_proj"])
    model.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file(load_file(file), file, {"format": "pt", adapter_file.RANKS: text})
    with pytest.raises(AdapterError, match=problem):
        read(tmp_path / "adapter", model)


def test_wrong_files(tmp_path: Path) -> None:
    _, folder = folder_of("phi3", tmp_path)
    model = adapted(folder, target_modules=["qkv_proj", "o_proj"])
    model.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    stored = load_file(file)
    module = "base_model.model.model.layers.0.self_attn"
    b = f"{module}.qkv_proj.lora_B.weight"
    own = {
        f"{module}.q_proj.lora_A.weight": torch.zeros(12, 48),
        f"{module}.q_proj.lora_B.weight": torch.zeros(48, 12),
    }
    for changed, problem in (
        ({n: t for n, t in stored.items() if ".layers.0.self_attn.qkv" not in n}, "missing: .*qkv"),
        ({**stored, b: stored[b][:-1].clone()}, r"found shape \[95, 12\].*\[96, 12\]"),
        ({**stored, **own}, r"qkv_proj and .*\.q_proj are the same weights"),
    ):
        save_file(changed, file, {"format": "pt"})
        with pytest.raises(AdapterError, match=problem):
            read(tmp_path / "adapter", model)
    with pytest.raises(ArgumentError, match=r"'w_pack'; this model has q_proj, qkv_proj, k_proj"):
        adapted(folder, target_modules=["w_pack"])


def test_dora_beside_none_in_one_module(tmp_path: Path) -> None:
    _, folder = folder_of("phi3", tmp_path)
    model = adapted(folder, target_modules=["q_proj", "k_proj"])
    leaves = dict(tree.items(model.adapters))
    first = leaves["layers.0.attn.q"]
    leaves["layers.0.attn.q"] = replace(first, magnitude=torch.ones(len(first.b)))
    with pytest.raises(ArgumentError, match="adapt them alike"):
        adapter_write.write_adapter(
            tmp_path / "adapter", tree.from_items(leaves), model.spec, model.origin.family.names
        )


def test_scales_of_one_module(tmp_path: Path) -> None:
    """Parts of one matrix have one scale in the file; the others' B makes up for it."""
    base, folder = folder_of("phi3", tmp_path)
    model = adapted(folder, target_modules=["q_proj", "k_proj"], alpha_pattern={"k_proj": 5})
    bridged.spread_trained(model)
    model.save_pretrained(tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    ids = bridged.ids()
    ours = model(ids).logits.detach()
    bridged.same_logits(ours, theirs(ids).logits.detach())
    adapters, _, _ = read(tmp_path / "adapter", model)
    for path, leaf in tree.items(adapters):
        want = lora.delta(tree.at(model.adapters, path)).detach()
        torch.testing.assert_close(lora.delta(leaf), want, rtol=1e-6, atol=1e-6)
