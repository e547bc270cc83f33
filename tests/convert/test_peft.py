"""LoRA arguments and adapter files against peft: its files here, ours there, equal logits."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import bridged
import faults
import folders
import peft
import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from purelm import FastLanguageModel
from purelm.convert import adapter_config, adapter_file, adapter_write, peft_config
from purelm.convert.bridge import CausalLM
from purelm.convert.peft_config import DEFAULT_TARGETS
from purelm.errors import AdapterError, ArgumentError, SaveError
from purelm.nn import decoder, lora, tree

pytestmark = [
    # peft says that trained copies of tied weights are trained apart, which is tested here.
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    # peft asks transformers under a name that transformers is about to change.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]

TIED = {"tie_word_embeddings": True}
REGEX = r".*\.(0|2)\.self_attn\.[qv]_proj"

# (family, its switches, arguments that peft and purelm understand alike)
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "seven": ("llama", {}, {"target_modules": list(DEFAULT_TARGETS)}),
    "two": ("llama", {}, {"target_modules": ["q_proj", "mlp.down_proj"]}),
    "regex": ("qwen3", {}, {"target_modules": REGEX}),
    "all-linear": ("llama", TIED, {"target_modules": "all-linear"}),
    "rslora": ("llama", {}, {"use_rslora": True, "target_modules": ["v_proj", "up_proj"]}),
    "patterns": (
        "llama",
        {},
        {
            "target_modules": ["q_proj", "k_proj", "gate_proj"],
            "rank_pattern": {"q_proj": 3, r"layers\.1\.self_attn\.k_proj": 5},
            "alpha_pattern": {"k_proj": 32, "^model.layers.2.mlp.gate_proj": 7},
        },
    ),
    "rslora-patterns": (
        "llama",
        {},
        {
            "target_modules": ["q_proj"],
            "use_rslora": True,
            "rank_pattern": {"1.self_attn.q_proj": 9},
        },
    ),
    "layers": ("qwen2", {}, {"target_modules": ["o_proj"], "layers_to_transform": [0, 2]}),
    "layer": (
        "qwen2",
        {},
        {"target_modules": ["o_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
    ),
    "bias-all": ("qwen2", {}, {"target_modules": ["q_proj", "o_proj"], "bias": "all"}),
    "bias-lora": ("qwen2", {}, {"target_modules": ["q_proj", "o_proj"], "bias": "lora_only"}),
    "bias-everywhere": (
        "llama",
        {"attention_bias": True, "mlp_bias": True},
        {"target_modules": ["v_proj"], "bias": "all"},
    ),
    "saved": (
        "qwen2",
        {},
        {
            "target_modules": ["q_proj"],
            "modules_to_save": ["embed_tokens", "lm_head", "model.norm"],
        },
    ),
    "norms": ("qwen3", {}, {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}),
    "norms-with-biases": (
        "starcoder2",
        {},
        {"target_modules": ["q_proj"], "modules_to_save": ["model.norm", "input_layernorm"]},
    ),
    "tied-head": ("llama", TIED, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "dropout": ("mistral", {}, {"target_modules": ["down_proj"], "lora_dropout": 0.3}),
    "excluded": (
        "llama",
        {},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.1.self_attn.q_proj"]},
    ),
}
# Those that mean the same in the model, but are not peft's own words for it.
OURS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "last-layers": ("llama", {}, {"finetune_last_n_layers": 2}),
    "gaussian": ("llama", {}, {"init_lora_weights": "gaussian"}),
    "random": ("llama", {}, {"init_lora_weights": False}),
    "orthogonal": ("llama", {}, {"init_lora_weights": "orthogonal"}),
    "pissa": ("llama", {}, {"init_lora_weights": "pissa", "lora_alpha": 6}),
    "pissa-niter": (
        "llama",
        {},
        {"init_lora_weights": "pissa_niter_4", "use_rslora": True, "rank_pattern": {"q_proj": 3}},
    ),
    "olora": ("qwen2", {}, {"init_lora_weights": "olora", "alpha_pattern": {"v_proj": 3}}),
    "tied-embedding": ("llama", TIED, {"modules_to_save": ["embed_tokens"]}),
    "tied-both": ("llama", TIED, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "moved": ("llama", {}, {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
}


def hf(family: str, switches: dict[str, Any], tmp_path: Path) -> tuple[Any, Path]:
    model = tiny.hf_model(family, **switches)
    return model, tiny.save(model, tmp_path / "base")


def adapted(folder: Path, **arguments: Any) -> CausalLM:
    model = bridged.bridge(folder)
    return peft_config.apply(model, **{"r": 4, "lora_alpha": 16, **arguments}).eval()


@pytest.mark.parametrize("case", [*CASES, *OURS])
def test_peft_loads_ours(case: str, tmp_path: Path) -> None:
    family, switches, arguments = {**CASES, **OURS}[case]
    base, folder = hf(family, switches, tmp_path)
    model = adapted(folder, **arguments)
    ids = bridged.ids()
    before = model(ids).logits.detach()
    if case not in ("random",):
        bridged.same_logits(before, base(ids).logits.detach())
    bridged.spread_trained(model)
    model.save_pretrained(tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    ours = model(ids).logits.detach()
    assert not torch.allclose(ours, before)
    # Of a start inside the weight two terms of its size are taken off each other.
    cancels = arguments.get("init_lora_weights") in ("olora", "pissa", "pissa_niter_4")
    bridged.same_logits(ours, theirs(ids).logits.detach(), limit=1e-5 if cancels else 5e-6)

    again = bridged.bridge(folder)
    names = again.origin.family.names
    adapters, trained, config = adapter_file.read_adapter(tmp_path / "adapter", again.spec, names)
    again.set_adapters(adapters, trained)
    assert torch.equal(again(ids).logits, ours)
    assert config.inference_mode and config.base_model_name_or_path == str(folder)


@pytest.mark.parametrize("case", CASES)
def test_we_load_pefts(case: str, tmp_path: Path) -> None:
    family, switches, arguments = CASES[case]
    base, folder = hf(family, switches, tmp_path)
    settings = {"r": 4, "lora_alpha": 16, "task_type": "CAUSAL_LM", **arguments}
    theirs = peft.get_peft_model(base, peft.LoraConfig(**settings)).eval()
    bridged.spread_trained(theirs)
    theirs.save_pretrained(tmp_path / "adapter")
    model = bridged.bridge(folder)
    adapters, trained, config = adapter_file.read_adapter(
        tmp_path / "adapter", model.spec, model.origin.family.names
    )
    model.set_adapters(adapters, trained)
    ids = bridged.ids()
    bridged.same_logits(model(ids).logits.detach(), theirs(ids).logits.detach())
    assert config.lora_dropout == arguments.get("lora_dropout", 0.0)
    # The same arguments give the same choice of weights here.
    fresh = adapted(folder, **arguments)
    assert shapes(fresh.adapters) == shapes(model.adapters)
    assert set(dict(tree.items(fresh.trained))) == set(dict(tree.items(model.trained)))
    # And written again, nothing is lost.
    model.set_adapters(adapters, trained, config=config)
    model.save_pretrained(tmp_path / "again")
    first = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    second = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def shapes(adapters: tree.Tree) -> dict[str, tuple[Any, ...]]:
    return {path: (tuple(x.a.shape), tuple(x.b.shape), x.scale) for path, x in tree.items(adapters)}


def test_an_embedding_that_peft_trained_apart_from_its_tied_head(tmp_path: Path) -> None:
    base, folder = hf("llama", TIED, tmp_path)
    settings = peft.LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"], task_type="CAUSAL_LM"
    )
    theirs = peft.get_peft_model(base, settings).eval()
    bridged.spread_trained(theirs)
    theirs.save_pretrained(tmp_path / "adapter")
    model = bridged.bridge(folder)
    arguments = tmp_path / "adapter", model.spec, model.origin.family.names
    with pytest.raises(AdapterError, match="apart from the head"):
        adapter_file.read_adapter(*arguments)
    adapters, trained, _ = adapter_file.read_adapter(*arguments, params=model.params)
    model.set_adapters(adapters, trained)
    ids = bridged.ids()
    bridged.same_logits(model(ids).logits.detach(), theirs(ids).logits.detach())


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_starts_are_pefts(kind: str, tmp_path: Path) -> None:
    """The start's product is peft's, and the model trains from there as peft's does."""
    base, folder = hf("llama", {}, tmp_path)
    arguments = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "down_proj"]}
    theirs = peft.get_peft_model(base, peft.LoraConfig(init_lora_weights=kind, **arguments))
    model = adapted(folder, init_lora_weights=kind, **arguments)
    layer = theirs.base_model.model.model.layers[1].self_attn.q_proj
    want = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    parameters = dict(model.named_parameters())
    a = parameters["model.layers.1.self_attn.q_proj.lora_A.weight"]
    b = parameters["model.layers.1.self_attn.q_proj.lora_B.weight"]
    assert (b @ a - want).norm() <= 1e-5 * want.norm()
    ids = bridged.ids()
    model(ids, labels=ids).loss.backward()
    theirs(ids, labels=ids).loss.backward()
    # Singular vectors have no sign, so only what does not depend on it is compared.
    product = b.grad @ b.grad.T
    wanted = layer.lora_B["default"].weight.grad
    wanted = wanted @ wanted.T
    assert (product - wanted).norm() <= 1e-4 * wanted.norm()


def test_starts_inside_4_bit_weights_are_refused(tmp_path: Path) -> None:
    _, folder = hf("llama", {}, tmp_path)
    with pytest.raises(ArgumentError, match=r"pissa.*q_proj is quantized"):
        peft_config.apply(bridged.bridge(folder, quantize="nf4"), r=4, init_lora_weights="pissa")


def test_one_seed_one_adapter(tmp_path: Path) -> None:
    _, folder = hf("llama", {}, tmp_path)
    for kind in (True, False, "gaussian", "orthogonal", "pissa_niter_2"):
        torch.manual_seed(5)
        state = torch.random.get_rng_state()
        one = adapted(folder, init_lora_weights=kind, random_state=1)
        assert torch.equal(torch.random.get_rng_state(), state)
        torch.manual_seed(6)
        same = adapted(folder, init_lora_weights=kind, random_state=1)
        pairs = zip(tree.tensors(one.adapters), tree.tensors(same.adapters), strict=True)
        assert all(torch.equal(x, y) for x, y in pairs)
        if kind != "pissa_niter_2":
            other = adapted(folder, init_lora_weights=kind, random_state=2)
            pairs = zip(tree.tensors(one.adapters), tree.tensors(other.adapters), strict=True)
            assert not all(torch.equal(x, y) for x, y in pairs)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"r": 0}, "r is 0"),
    ({"r": 2.0}, "r is 2.0"),
    ({"r": True}, "r is True"),
    ({"lora_alpha": 0}, "lora_alpha is 0"),
    ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
    ({"lora_dropout": 1.0}, "lora_dropout is 1.0"),
    ({"lora_dropout": -0.1}, "lora_dropout is -0.1"),
    ({"bias": "some"}, "bias is 'some'"),
    ({"use_rslora": 1}, "use_rslora is 1"),
    ({"target_modules": "nothing_here"}, r"'nothing_here'.*matches no projection.*q_proj, k_proj"),
    ({"target_modules": ["nothing_here"]}, r"'nothing_here'; this model has q_proj"),
    ({"target_modules": ["q_proj", "q_porj"]}, "'q_porj'"),
    ({"target_modules": []}, "no projection"),
    ({"target_modules": ["lm_head"]}, "no projection"),
    ({"target_modules": "(q_proj"}, "no regular expression"),
    ({"target_modules": 3}, "target_modules is 3"),
    ({"layers_to_transform": [0, 3]}, "from 0 to 2"),
    ({"layers_to_transform": -1}, "from 0 to 2"),
    ({"layers_to_transform": True}, "from 0 to 2"),
    ({"layers_to_transform": 1, "target_modules": ".*q_proj"}, "target_modules as a list"),
    ({"layers_to_transform": 1, "layers_pattern": "blocks"}, "matches no projection"),
    ({"layers_pattern": "layers"}, "give both"),
    ({"finetune_last_n_layers": 4}, "1 to 3"),
    ({"finetune_last_n_layers": 1, "layers_to_transform": 1}, "not both"),
    ({"modules_to_save": ["q_proj"]}, r"'q_proj'.*model.embed_tokens, lm_head, .*input_layernorm"),
    ({"modules_to_save": "lm_head"}, "a list of names"),
    ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\['q_proj'\] is 0"),
    ({"alpha_pattern": {"q_proj": "a"}}, "alpha_pattern"),
    ({"rank_pattern": {"(": 4}}, "no regular expression"),
    ({"init_lora_weights": "gausian"}, "init_lora_weights is 'gausian'"),
    ({"init_lora_weights": "orthogonal", "r": 3}, "even rank"),
    ({"init_lora_weights": "pissa", "r": 25}, "cannot give rank 25"),
    ({"random_state": -1}, "random_state"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[str(a) for a, _ in BAD])
def test_bad_arguments(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    _, folder = hf("llama", {}, tmp_path)
    model = bridged.bridge(folder)
    with pytest.raises(ArgumentError, match=message):
        peft_config.apply(model, **arguments)
    assert not model.peft_config and not model.adapters


@pytest.mark.parametrize("value", ["eva", "corda", "lora_ga", "mica"])
def test_what_is_begun_elsewhere(value: str, tmp_path: Path) -> None:
    _, folder = hf("llama", {}, tmp_path)
    with pytest.raises(ArgumentError, match=f"init_lora_weights='{value}'.*begin with peft"):
        adapted(folder, init_lora_weights=value)
    with pytest.raises(TypeError, match="unexpected keyword argument 'lora_aplha'"):
        adapted(folder, lora_aplha=3)


def test_tied_matrices_are_trained_as_one(tmp_path: Path) -> None:
    """As peft does it where `ensure_weight_tying` asks for it."""
    theirs, folder = hf("llama", {"tie_word_embeddings": True}, tmp_path)
    asked: dict[str, Any] = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}
    model = adapted(folder, ensure_weight_tying=True, **asked)
    plain = adapted(folder, **asked)
    assert dict(tree.items(model.trained)).keys() == dict(tree.items(plain.trained)).keys()
    with pytest.raises(ArgumentError, match="one matrix in this model"):
        adapted(folder, ensure_weight_tying=False, **asked)
    adapted(folder, ensure_weight_tying=False, target_modules=["q_proj"])
    with pytest.raises(ArgumentError, match="ensure_weight_tying is"):
        adapted(folder, ensure_weight_tying=1, **asked)
    bridged.spread_trained(model)
    config = peft.LoraConfig(r=4, lora_alpha=16, ensure_weight_tying=True, **asked)
    other = peft.get_peft_model(theirs, config).eval()
    state = peft.get_peft_model_state_dict(other)
    model.save_pretrained(tmp_path / "tied")
    ours = load_file(tmp_path / "tied" / "adapter_model.safetensors")
    peft.set_peft_model_state_dict(other, {name: ours[name] for name in state if name in ours})
    with torch.no_grad():
        bridged.same_logits(model(bridged.ids()).logits, other(bridged.ids()).logits)


def test_adapters_are_never_thrown_away(tmp_path: Path) -> None:
    _, folder = hf("llama", {}, tmp_path)
    model = adapted(folder, r=4)
    bridged.spread_trained(model)
    kept = [t.clone() for t in tree.tensors(model.adapters)]
    peft_config.apply(model, r=4, lora_alpha=16)
    pairs = zip(kept, tree.tensors(model.adapters), strict=True)
    assert model.training and all(torch.equal(x, y) for x, y in pairs)
    with pytest.raises(ArgumentError, match="already wears adapters"):
        peft_config.apply(model, r=8)


AGAIN: list[dict[str, Any]] = [
    {},
    {"target_modules": r".*\.(q|v)_proj"},
    {"target_modules": ["v_proj", "q_proj"], "layers_to_transform": [1]},
    {"finetune_last_n_layers": 2, "use_rslora": True, "lora_alpha": 7},
    {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 3}, "lora_dropout": 0.25},
    {"target_modules": ["q_proj", "lm_head"], "bias": "lora_only", "modules_to_save": ["norm"]},
    {"init_lora_weights": "gaussian", "bias": "all"},
]


@pytest.mark.parametrize("given", AGAIN, ids=str)
def test_a_reloaded_adapter_goes_on(given: dict[str, Any], tmp_path: Path) -> None:
    """The same get_peft_model keeps what was trained; another one throws nothing away."""
    folder = tmp_path / "base"
    folders.whole(folder, "qwen2")
    load = partial(FastLanguageModel.from_pretrained, dtype="float32", load_in_16bit=True)
    model = FastLanguageModel.get_peft_model(load(str(folder))[0], r=4, **given)
    bridged.spread_trained(model)
    model.save_pretrained(tmp_path / "adapter")
    again, _ = load(str(tmp_path / "adapter"))
    kept = {name: p.clone() for name, p in again.named_parameters()}
    FastLanguageModel.get_peft_model(again, r=4, **given)
    assert again.training and again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(p, kept[name]) for name, p in again.named_parameters())
    for other in ({"r": 3}, {"lora_alpha": 5}, {"lora_dropout": 0.5}, {"bias": "none"}):
        changed = {"r": 4, **given, **other}
        if changed == {"r": 4, **given} or other == {"bias": "none"} and "bias" not in given:
            continue
        with pytest.raises(ArgumentError, match="already wears adapters"):
            FastLanguageModel.get_peft_model(again, **changed)


def test_what_is_trained_is_what_was_asked(tmp_path: Path) -> None:
    _, folder = hf("qwen2", {}, tmp_path)
    model = adapted(
        folder, target_modules=["q_proj", "lm_head"], bias="lora_only", init_lora_weights="olora"
    )
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    want = {"lm_head.trained_weight"}
    for layer in range(3):
        q = f"model.layers.{layer}.self_attn.q_proj"
        want |= {f"{q}.lora_A.weight", f"{q}.lora_B.weight", f"{q}.trained_bias"}
    assert trained == want
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    assert any("lm_head is trained whole" in note for note in model.origin.notes)


def test_the_file_itself(tmp_path: Path) -> None:
    """Names, order of settings and header that peft writes; ours is where it does not look."""
    base, folder = hf("qwen2", {}, tmp_path)
    model = adapted(folder, target_modules=["q_proj", "v_proj"], bias="lora_only")
    model.save_pretrained(tmp_path / "ours")
    settings = peft.LoraConfig(
        r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"], bias="lora_only"
    )
    theirs = peft.get_peft_model(base, settings)
    theirs.save_pretrained(tmp_path / "theirs")
    have = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    want = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    assert {n: t.shape for n, t in have.items()} == {n: t.shape for n, t in want.items()}
    ours = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    known = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    assert ours.keys() <= known.keys()
    assert ours["target_modules"] == ["q_proj", "v_proj"]
    with safe_open(tmp_path / "ours" / "adapter_model.safetensors", "pt") as file:
        kept = file.metadata()
        assert kept.pop("purelm.base")
        assert kept == {"format": "pt", "purelm.stored_as": "16bit"}
    assert sorted(p.name for p in (tmp_path / "ours").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_trees_without_a_config(tmp_path: Path) -> None:
    """Functional adapters, with ranks and scales of their own, are described exactly."""
    base, folder = hf("llama", {}, tmp_path)
    model = bridged.bridge(folder)
    generator = torch.Generator().manual_seed(3)
    adapters = lora.init(model.spec, generator=generator, rank=3, alpha=5, start="random")
    adapters["layers"][1]["attn"]["q"] = lora.one(
        (48, 48), 7, 0.37, generator=generator, start="random"
    )
    adapters["layers"][2]["mlp"] = {"up": adapters["layers"][2]["mlp"]["up"]}
    names = model.origin.family.names
    adapter_write.write_adapter(tmp_path / "adapter", adapters, model.spec, names)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    ids = bridged.ids()
    ours = decoder.forward(model.params, model.spec, ids, adapters=adapters)
    bridged.same_logits(ours.detach(), theirs(ids).logits.detach())
    back, _, _ = adapter_file.read_adapter(tmp_path / "adapter", model.spec, names)
    for (path, x), (other, y) in zip(tree.items(adapters), tree.items(back), strict=True):
        assert path == other and torch.equal(x.a, y.a) and torch.equal(x.b, y.b)
        assert abs(x.scale - y.scale) <= 1e-12 * x.scale


class Refusing:
    def save_pretrained(self, folder: Path) -> None:
        raise OSError(28, "No space left on device")


def test_a_save_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    _, folder = hf("llama", {}, tmp_path)
    model = adapted(folder, target_modules=["q_proj"])
    model.save_pretrained(tmp_path / "adapter")
    before = {p.name: p.read_bytes() for p in (tmp_path / "adapter").iterdir()}
    bridged.spread_trained(model)
    model.tokenizer = Refusing()
    with pytest.raises(SaveError, match="No space left"):
        model.save_pretrained(tmp_path / "adapter")
    assert {p.name: p.read_bytes() for p in (tmp_path / "adapter").iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]
    with pytest.raises(SaveError, match="no adapter to save"):
        adapter_write.save_adapter(bridged.bridge(folder), tmp_path / "none")


KEY = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
SLOW = r"(a*)*\1(.*)*b"
EDITS: dict[str, tuple[dict[str, Any], str]] = {
    "method": ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
    "dora": ({"use_dora": True}, r"lora_magnitude_vector.*missing|missing.*lora_magnitude_vector"),
    "lora bias": ({"lora_bias": True}, "lora_bias=True"),
    "changed base": ({"init_lora_weights": "pissa"}, "path_initial_model_for_weight_conversion"),
    "future": ({"use_tomorrow": {"x": 1}}, "'use_tomorrow'"),
    "rank": ({"r": 5}, r"lora_A.weight.*"),
    "no rank": ({"r": 0}, "r is 0"),
    "text rank": ({"r": "4"}, "r is '4'"),
    "list": ({"rank_pattern": [1]}, "rank_pattern is"),
    "slow": ({"alpha_pattern": {SLOW: 3}}, "too intricate"),
    "slow layers": ({"layers_pattern": [".?" * 30], "layers_to_transform": 1}, "too intricate"),
    "slow groups": ({"rank_pattern": {"(.|..)" * 30: 3}}, "too intricate"),
    "broken": ({"rank_pattern": {"[": 3}}, "no regular expression"),
    "many": ({"rank_pattern": {f"x{i}": 3 for i in range(4001)}}, "4001 patterns"),
    "target": (
        {"target_modules": ["q_proj", "k_proj"]},
        "missing: .*k_proj.lora_A",
    ),
    "saved": ({"modules_to_save": ["lm_head"]}, "missing: lm_head.weight"),
    "bias": ({"bias": "all"}, "missing: .*bias"),
    "layers": ({"layers_pattern": 10**30, "layers_to_transform": 1}, "layers_pattern is 1000"),
    "a layer": ({"layers_to_transform": 0.5}, "layers_to_transform is 0.5"),
    "layers as text": ({"layers_to_transform": "1"}, "layers_to_transform is '1'"),
    "base": ({"base_model_name_or_path": ["x"]}, "base_model_name_or_path is"),
}


@pytest.fixture
def written(tmp_path: Path) -> tuple[CausalLM, Path]:
    _, folder = hf("qwen2", {}, tmp_path)
    model = adapted(folder, target_modules=["q_proj"])
    model.save_pretrained(tmp_path / "adapter")
    return model, tmp_path / "adapter"


def read(written: tuple[CausalLM, Path]) -> Any:
    model, folder = written
    return adapter_file.read_adapter(folder, model.spec, model.origin.family.names)


@pytest.mark.parametrize("edit", EDITS)
def test_configs_that_cannot_be_followed(edit: str, written: tuple[CausalLM, Path]) -> None:
    change, message = EDITS[edit]
    path = written[1] / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(AdapterError, match=message):
        read(written)


def test_thousands_of_patterns_take_no_time(tmp_path: Path) -> None:
    _, folder = hf("llama", {}, tmp_path)
    model = adapted(folder, target_modules="all-linear")
    model.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    patterns = {f"layers.{i}x.*a": 4 for i in range(2000)}
    change = {"rank_pattern": patterns, "alpha_pattern": patterns}
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with faults.bounded():
        read((model, path.parent))


def test_harmless_settings_are_read(written: tuple[CausalLM, Path]) -> None:
    """Other versions' settings at rest, and a slow expression that never needs to run."""
    path = written[1] / "adapter_config.json"
    extra = {
        "use_tomorrow": False,
        "later": None,
        "peft_version": "9",
        "megatron_core": "megatron.core",
        "auto_mapping": {"unsloth_fixed": True},
        "target_modules": SLOW,
        "task_type": None,
    }
    path.write_text(json.dumps({**json.loads(path.read_text()), **extra}))
    adapters, _, config = read(written)
    assert len(tree.leaves(adapters)) == 3 and config.target_modules == ("q_proj",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({KEY: None}, f"the tensor is missing.*{KEY}"),
        ({KEY: torch.zeros(4, 47)}, rf"found shape \[4, 47\].*\[4, 48\].*{KEY}"),
        ({KEY: torch.zeros(4, 48, dtype=torch.int32)}, f"found torch.int32.*{KEY}"),
        ({KEY.replace("q_proj", "z_proj"): torch.zeros(4, 48)}, "without a place.*z_proj"),
        ({KEY.replace("layers.1", "layers.7"): torch.zeros(4, 48)}, "without a place"),
        ({KEY.replace("lora_A.weight", "lora_magnitude_vector"): torch.zeros(48)}, "magnitude"),
        ({"base_model.model.lm_head.weight": torch.zeros(98, 48)}, r"\[98, 48\].*\[99, 48\]"),
    ],
)
def test_files_that_do_not_fit(
    change: dict[str, Any], message: str, written: tuple[CausalLM, Path]
) -> None:
    path = written[1] / "adapter_model.safetensors"
    tensors = {**load_file(path), **change}
    save_file({name: t for name, t in tensors.items() if t is not None}, path)
    with pytest.raises(AdapterError, match=message):
        read(written)


def test_absent_and_cut_files(written: tuple[CausalLM, Path]) -> None:
    folder = written[1]
    weights = folder / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-3])
    with pytest.raises(AdapterError, match="cut short"):
        read(written)
    weights.unlink()
    (folder / "adapter_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(AdapterError, match="never loaded because a pickle can run code"):
        read(written)
    (folder / "adapter_config.json").unlink()
    assert adapter_config.read_config(folder) is None
    with pytest.raises(AdapterError, match="no adapter_config.json"):
        read(written)
