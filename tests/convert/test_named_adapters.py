"""Several adapters by name on one base, against peft's own model: equal logits after each step."""

from pathlib import Path
from typing import Any

import bridged
import peft
import pytest
import tiny
import torch
from safetensors.torch import load_file

from purelm.convert import peft_config
from purelm.convert.bridge import CausalLM
from purelm.errors import AdapterError, ArgumentError
from purelm.nn import tree

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

# One in the root of the folder, two in folders of their names, of different ranks and modules.
ADAPTERS: dict[str, dict[str, Any]] = {
    "default": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"]},
    "math": {"r": 4, "lora_alpha": 2, "target_modules": ["q_proj", "v_proj"]},
    "code": {"r": 3, "use_rslora": True, "target_modules": ["down_proj", "v_proj"]},
}


def place(folder: Path, name: str) -> Path:
    return folder if name == "default" else folder / name


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tiny.hf_model("llama"), tmp_path_factory.mktemp("base"))


@pytest.fixture
def theirs() -> Any:
    """peft's model with the three adapters, each moved from where it began."""
    made = None
    for name, settings in ADAPTERS.items():
        config = peft.LoraConfig(task_type="CAUSAL_LM", **settings)
        if made is None:
            made = peft.get_peft_model(tiny.hf_model("llama"), config, adapter_name=name)
        else:
            made.add_adapter(name, config)
    assert made is not None
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in made.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.3, generator=generator)
    return made.eval()


@pytest.fixture
def pair(theirs: Any, base: Path, tmp_path: Path) -> tuple[CausalLM, Any]:
    """The same adapters here and in peft, loaded from peft's files."""
    theirs.save_pretrained(tmp_path / "peft")
    model = bridged.bridge(base)
    for name in ADAPTERS:
        model.load_adapter(place(tmp_path / "peft", name), name)
    assert model.active_adapters == [] and not tree.leaves(model.adapters)
    return model, theirs


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(bridged.ids()).logits
    return found


def test_switched_and_several_at_once(pair: tuple[CausalLM, Any]) -> None:
    model, theirs = pair
    plain = logits(model)
    for names in ("math", "default", ["default", "math"], ["code", "math", "default"], "code"):
        model.set_adapter(names)
        theirs.base_model.set_adapter(names)
        assert model.active_adapters == theirs.base_model.active_adapters
        found = logits(model)
        bridged.same_logits(found, logits(theirs))
        assert not torch.allclose(found, plain)
    with model.disable_adapter(), theirs.disable_adapter():
        assert torch.equal(logits(model), plain)
        bridged.same_logits(logits(model), logits(theirs))
    assert torch.equal(logits(model), found)


@pytest.mark.parametrize(
    ("kind", "names", "weights", "rank"),
    [
        ("linear", ["default", "math"], [0.7, -1.5], None),
        ("cat", ["default", "math", "code"], [0.7, -0.4, 1.2], None),
        ("svd", ["math", "code"], [1.0, 0.6], None),
        ("svd", ["default", "code"], [1.0, -0.6], 6),
        ("cat", ["math"], [2.0], None),
    ],
)
def test_weighted(
    kind: Any,
    names: list[str],
    weights: list[float],
    rank: int | None,
    pair: tuple[CausalLM, Any],
    tmp_path: Path,
) -> None:
    model, theirs = pair
    theirs.add_weighted_adapter(names, weights, "mix", combination_type=kind, svd_rank=rank)
    model.add_weighted_adapter(names, weights, "mix", kind, rank)
    theirs.set_adapter("mix")
    model.set_adapter("mix")
    bridged.same_logits(logits(model), logits(theirs))
    # Its file says all of it.
    model.save_pretrained(tmp_path / "mix", selected_adapters=["mix"])
    again = peft.PeftModel.from_pretrained(tiny.hf_model("llama"), tmp_path / "mix" / "mix")
    bridged.same_logits(logits(model), logits(again.eval()))


def test_deleted(pair: tuple[CausalLM, Any]) -> None:
    model, theirs = pair
    model.set_adapter(["math", "code"])
    theirs.base_model.set_adapter(["math", "code"])
    model.delete_adapter("math")
    theirs.delete_adapter("math")
    assert model.active_adapters == ["code"] == theirs.base_model.active_adapters
    bridged.same_logits(logits(model), logits(theirs))
    with pytest.warns(UserWarning, match="'default' is active now"):
        model.delete_adapter("code")
    with pytest.warns(UserWarning, match="Setting active adapter to default"):
        theirs.delete_adapter("code")
    bridged.same_logits(logits(model), logits(theirs))
    model.delete_adapter("default")
    assert model.active_adapters == [] and not model.worn
    assert not [name for name, _ in model.named_parameters() if "lora" in name]


def test_saved_as_peft_saves_them(pair: tuple[CausalLM, Any], tmp_path: Path) -> None:
    model, theirs = pair
    model.save_pretrained(tmp_path / "ours")
    for name in ADAPTERS:
        ours, other = (
            load_file(place(tmp_path / folder, name) / "adapter_model.safetensors")
            for folder in ("ours", "peft")
        )
        assert ours.keys() == other.keys()
        assert all(torch.equal(ours[key], other[key]) for key in ours)
    made = peft.PeftModel.from_pretrained(tiny.hf_model("llama"), tmp_path / "ours")
    made.load_adapter(tmp_path / "ours" / "math", "math")
    made.base_model.set_adapter(["default", "math"])
    model.set_adapter(["default", "math"])
    bridged.same_logits(logits(model), logits(made.eval()))
    # A second save leaves what it does not write, and no old shard beside what it does.
    stale = tmp_path / "ours" / "math" / "adapter_model-00001-of-00002.safetensors"
    stale.write_bytes(b"old")
    model.save_pretrained(tmp_path / "ours", selected_adapters=["math"])
    assert not stale.exists()
    assert (tmp_path / "ours" / "code" / "adapter_model.safetensors").exists()


def test_several_are_merged(pair: tuple[CausalLM, Any], tmp_path: Path) -> None:
    model, _ = pair
    model.set_adapter(["default", "code"])
    model.save_pretrained_merged(tmp_path / "merged")
    bridged.same_logits(logits(bridged.bridge(tmp_path / "merged")), logits(model))


def test_only_the_active_are_trained(pair: tuple[CausalLM, Any]) -> None:
    model, theirs = pair
    model.set_adapter(["math", "default"])
    theirs.base_model.set_adapter(["math", "default"])
    ids = bridged.ids()
    model.train()
    model(ids, labels=ids).loss.backward()
    theirs.train()(ids, labels=ids).loss.backward()
    theirs_grads = {
        name.removeprefix("base_model.model."): p.grad
        for name, p in theirs.named_parameters()
        if p.grad is not None
    }
    found = 0
    for name, p in model.named_parameters():
        assert (p.grad is not None) == p.requires_grad
        if p.grad is None:
            continue
        module, _, rest = name.rpartition(".lora_")
        named = "math" if module.endswith(".adapter_math") else "default"
        kind = rest.partition(".")[0]
        want = theirs_grads[f"{module.removesuffix('.adapter_math')}.lora_{kind}.{named}.weight"]
        assert (p.grad - want).abs().max() <= 2e-5 * want.abs().max()
        found += 1
    assert found == len(theirs_grads) == len(model.state_dict())
    before = {name: p for name, p in model.named_parameters() if "adapter_math" in name}
    model.set_adapter("default")
    model.set_adapter("math")
    after = {name: p for name, p in model.named_parameters() if "adapter_math" in name}
    assert all(before[name] is after[name] for name in before)  # an optimizer goes on with them


def test_a_fresh_one_beside_the_first(base: Path) -> None:
    model = peft_config.apply(bridged.bridge(base), r=4).eval()
    bridged.spread_trained(model)
    first, plain = logits(model), logits(bridged.bridge(base))
    model.add_adapter("next", r=2, target_modules=["o_proj"], init_lora_weights="pissa")
    model.add_adapter("theirs", peft.LoraConfig(r=2, target_modules=["o_proj"], bias="none"))
    assert torch.equal(logits(model), first)
    assert model.peft_config["theirs"].target_modules == ("o_proj",)
    model.set_adapter(["next", "default"])
    bridged.same_logits(logits(model), first)
    model.set_adapter("next")
    bridged.same_logits(logits(model), plain)
    copied = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(copied) == 6 and all("o_proj.adapter_next.lora_" in name for name in copied)


def test_copies_of_modules_belong_to_their_adapter(base: Path) -> None:
    model = peft_config.apply(bridged.bridge(base), r=2, modules_to_save=["lm_head"]).eval()
    model.add_adapter("other", r=2, modules_to_save=["lm_head"])
    model.add_adapter("plain", r=2)
    bridged.spread_trained(model)
    plain, first = logits(bridged.bridge(base)), logits(model)
    model.set_adapter("other")
    assert torch.equal(logits(model), plain)
    model.set_adapter(["plain", "default"])
    bridged.same_logits(logits(model), first)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    with pytest.raises(ArgumentError, match="only one of them can be active"):
        model.set_adapter(["other", "default"])
    assert model.active_adapters == ["plain", "default"]
    with pytest.raises(ArgumentError, match="cannot be mixed"):
        model.add_weighted_adapter(["other", "plain"], [1, 1], "mix")


def test_dropout_is_of_one_rate(base: Path, tmp_path: Path) -> None:
    model = peft_config.apply(bridged.bridge(base), r=2, lora_dropout=0.5)
    model.add_adapter("dry", r=2)
    model.set_adapter(["default", "dry"])
    with pytest.raises(ArgumentError, match="different dropout"):
        model.train()(bridged.ids())
    bridged.spread_trained(model)
    # Merging drops nothing, in training mode too.
    model.train().save_pretrained_merged(tmp_path / "merged")
    bridged.same_logits(logits(bridged.bridge(tmp_path / "merged")), logits(model.eval()))


@pytest.mark.parametrize("name", ["", "a.b", "../up", "a/b", 3, "x" * 200, "default"])
def test_names_that_cannot_be(name: Any, base: Path) -> None:
    model = peft_config.apply(bridged.bridge(base), r=2)
    with pytest.raises(ArgumentError, match="adapter"):
        model.add_adapter(name, r=2)


def test_what_is_not_there(base: Path, tmp_path: Path) -> None:
    model = peft_config.apply(bridged.bridge(base), r=2)
    for act in (model.set_adapter, model.delete_adapter):
        with pytest.raises(ArgumentError, match="no adapter 'math'; it has default"):
            act("math")
    for names in ([], ["default", "default"]):
        with pytest.raises(ArgumentError, match="one or more, each once"):
            model.set_adapter(names)
    with pytest.raises(ArgumentError, match="no adapter 'math'"):
        model.save_pretrained(tmp_path, selected_adapters=["math"])
    with pytest.raises(ArgumentError, match="found also r"):
        model.add_adapter("next", model.peft_config["default"], r=3)
    with pytest.raises(ArgumentError, match="expected a PeftConfig"):
        model.add_adapter("next", {"r": 3})
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdapterError, match="no adapter"):
        model.load_adapter(tmp_path / "empty", "next")
