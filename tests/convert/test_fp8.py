"""load_in_fp8 and compute="fp8": stored bytes are kept; training, report, generation, merging."""

import copy
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import bridged
import folders
import pytest
import torch
from fp8_folders import stored
from safetensors.torch import load_file, save_file

import purelm
from purelm.errors import ArgumentError, CheckpointError, KernelError
from purelm.kernels import fp8 as kernel
from purelm.nn import decoder, fast_mlp, half, lora, loss, tree
from purelm.nn.residuals import KEEP, RECOMPUTE, Policy
from purelm.quant.fp8 import Fp8
from purelm.quant.fp8_product import computes
from purelm.quant.linear import weight_of
from purelm.quant.nf4 import NF4

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
FP8 = {"load_in_fp8": True}
COMPUTE = {"compute": "fp8"}
EVERY = [FP8, {"load_in_fp8": "block"}, COMPUTE, {**FP8, **COMPUTE}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("fp8")
    folders.whole(path, "qwen2")
    return path


def load(folder: Path, **options: Any) -> Any:
    given = {"dtype": torch.float32, "device_map": "cpu", **options}
    return purelm.FastLanguageModel.from_pretrained(folder, **given)[0]


def adapted(folder: Path, **options: Any) -> Any:
    model = purelm.FastLanguageModel.get_peft_model(load(folder, **options), r=4)
    bridged.spread_trained(model)
    return model


@pytest.mark.parametrize("kind", ["block", "row", "tensor"])
def test_stored_bytes_are_kept(kind: str, tmp_path: Path) -> None:
    model = stored(tmp_path, kind)
    files = load_file(tmp_path / "model.safetensors")
    spec, params = purelm.load(tmp_path, quantize="fp8", device="cpu", dtype=torch.float32)
    for name, theirs in (("q", "self_attn.q_proj"), ("down", "mlp.down_proj")):
        leaf = params["layers"][1]["attn" if name == "q" else "mlp"][name]["weight"]
        codes = files[f"model.layers.1.{theirs}.weight"]
        assert isinstance(leaf, Fp8) and leaf.blocks == (kind == "block")
        assert torch.equal(leaf.codes.view(torch.uint8), codes.view(torch.uint8))
        assert torch.equal(weight_of(leaf, torch.float32), model.get_parameter(
            f"model.layers.1.{theirs}.weight"
        ))  # fmt: skip
    with torch.no_grad():
        want = model(bridged.ids()).logits
    bridged.same_logits(decoder.forward(params, spec, bridged.ids()), want)


def test_a_stored_nan_is_an_error(tmp_path: Path) -> None:
    stored(tmp_path, "row")
    files = load_file(tmp_path / "model.safetensors")
    files["model.layers.0.mlp.up_proj.weight"].view(torch.uint8)[3, 4] = 0x7F
    save_file(files, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        purelm.load(tmp_path, quantize="fp8", device="cpu")


@pytest.mark.parametrize("options", EVERY, ids=str)
def test_it_trains_the_same_whatever_is_kept(folder: Path, options: Any) -> None:
    model = adapted(folder, **options)
    bridged.assert_trains(model)


def gradients(spec: Any, params: Any, adapters: Any) -> list[torch.Tensor]:
    def value(adapters: Any) -> torch.Tensor:
        return loss.loss(params, spec, bridged.ids(), labels=bridged.ids(), adapters=adapters)

    return tree.tensors(torch.func.grad(value)(adapters))


def test_gradients_stray_as_e4m3_does(folder: Path) -> None:
    """Against the same 4-bit weights, and less than those stray from the exact ones."""
    made = {}
    for name, options in {
        "exact": {},
        "nf4": {"quantize": "nf4"},
        "fp8": {"quantize": "nf4", "compute": "fp8"},
    }.items():
        spec, params = purelm.load(folder, device="cpu", dtype=torch.float32, **options)
        g = torch.Generator().manual_seed(0)
        adapters = lora.init(spec, rank=4, generator=g, start="random")
        made[name] = gradients(spec, params, adapters)

    def apart(a: str, b: str) -> torch.Tensor:
        pairs = zip(made[a], made[b], strict=True)
        return torch.stack([1 - torch.cosine_similarity(x.ravel(), y.ravel(), 0) for x, y in pairs])

    lost = apart("fp8", "nf4")
    assert (lost > 1e-6).all() and lost.mean() < 0.5 * apart("nf4", "exact").mean()


@pytest.mark.parametrize("policy", [KEEP, RECOMPUTE], ids=["keep", "recompute"])
def test_rows_rounded_where_they_are_made_are_the_same(
    tmp_path: Path, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those that a product rounds for itself, to the bit, forward and backward."""
    folders.whole(tmp_path, "qwen3", head_dim=16)
    model = adapted(tmp_path, **COMPUTE)
    packed = [w for w in tree.leaves(model.params["layers"]) if isinstance(w, NF4)]
    assert packed and all(map(computes, packed))
    model.residuals = policy
    found, made = [], []

    def watched(f: Any) -> Any:
        def called(*args: Any, **how: Any) -> Any:
            made.append(f.__name__)
            return f(*args, **how)

        return called

    monkeypatch.setattr(fast_mlp, "activated_rows", watched(fast_mlp.activated_rows))
    monkeypatch.setattr(fast_mlp, "pull_rows", watched(fast_mlp.pull_rows))
    monkeypatch.setattr(half, "norm_rows", watched(half.norm_rows))
    for apart in (False, True):
        if apart:
            for module in (fast_mlp, half):
                monkeypatch.setattr(module, "rounds", lambda *_: False)
            monkeypatch.setattr(fast_mlp, "computes", lambda _: False)
        value = model(bridged.ids(), labels=bridged.ids()).loss
        grads = torch.autograd.grad(value, [t for t in model.parameters() if t.requires_grad])
        found.append([value.detach(), *grads])
    layers = len(model.params["layers"])
    norms = 2 if policy == KEEP else 4  # of each layer, where both products run again
    wanted = {"activated_rows": layers, "norm_rows": norms * layers, "pull_rows": layers}
    assert Counter(made) == wanted
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_per_sample_gradients(folder: Path) -> None:
    spec, params = purelm.load(folder, quantize="nf4", compute="fp8", device="cpu")
    adapters = lora.init(spec, rank=2, generator=torch.Generator().manual_seed(0), start="random")
    for a, b in bridged.per_sample(spec, params, adapters):
        # Two orders of a sum may round a value of the next product apart.
        assert torch.cosine_similarity(a.ravel(), b.ravel(), 0) > 0.99


@pytest.mark.parametrize("options", EVERY, ids=str)
def test_report_generation_and_merge(folder: Path, tmp_path: Path, options: Any) -> None:
    model = adapted(folder, quant_skip=["q_proj"], **options)
    lines = dict(line.split(": ", 1) for line in model.explain().split("\n"))
    stored_as = "in NF4" if options == COMPUTE else "in fp8 (e4m3, a scale a "
    assert f"18 of 39 weights {stored_as}" in model.report()
    assert "fp8" in lines["layers.0.mlp.up"] and "fp8" not in lines["layers.0.attn.q"]
    assert ("product of fp8 rows" in lines["layers.0.mlp.up"]) == ("compute" in options)
    model.eval()
    out = model.generate(bridged.ids(length=5), max_new_tokens=4, do_sample=False)
    assert out.shape == (2, 9)
    model.save_pretrained_merged(tmp_path / "merged")
    name = "model.layers.1.mlp.down_proj.weight"
    change = lora.delta(model.adapters["layers"][1]["mlp"]["down"]).detach()
    base = load_file(folder / "model.safetensors")[name]
    torch.testing.assert_close(
        load_file(tmp_path / "merged/model.safetensors")[name], base + change
    )
    dense = lora.merge(model.params, model.adapters)
    near = decoder.forward(dense, model.spec, bridged.ids()).detach()
    far = model(bridged.ids()).logits.detach()
    assert (near - far).abs().mean() < 0.2 * far.abs().mean()
    if options == COMPUTE:
        model.save_pretrained_merged(tmp_path / "four", save_method="merged_4bit")
        assert not computes(tree.leaves(load(tmp_path / "four").params)[1])
    else:
        with pytest.raises(ArgumentError, match="merged_4bit"):
            model.save_pretrained_merged(tmp_path / "four", save_method="merged_4bit")


def test_the_base_is_frozen_and_keeps_its_dtypes(folder: Path) -> None:
    model = load(folder, **FP8, **COMPUTE)
    leaf = model.params["layers"][0]["mlp"]["up"]["weight"]
    assert not any(t.requires_grad for t in leaf.tensors) and leaf.codes.dtype == kernel.E4M3
    names = {name for name, _ in model.named_parameters()}
    assert {
        f"model.layers.0.mlp.up_proj.weight{end}" for end in ("", "_scale", "_fp8_rows")
    } < names
    again = copy.deepcopy(model).to("cpu").params["layers"][0]["mlp"]["up"]["weight"]
    assert again.codes.dtype == kernel.E4M3 and again.fp8_columns.dtype == torch.float32
    assert model.num_parameters() == load(folder).num_parameters() and model.state_dict() == {}


def test_four_bits_with_fp8_products_are_the_same_four_bits(folder: Path) -> None:
    plain, eight = (dict(tree.items(load(folder, **o).params)) for o in ({}, COMPUTE))
    found = []
    for path, leaf in plain.items():
        if isinstance(leaf, NF4):
            found.append(computes(eight[path]))
            assert torch.equal(eight[path].packed, leaf.packed)
            assert computes(eight[path]) == kernel.takes(leaf.shape)
    # Keys and values are 24 wide here, no multiple of 16, and the report says so.
    assert (found.count(True), found.count(False)) == (5 * 3, 2 * 3)
    lines = dict(line.split(": ", 1) for line in load(folder, **COMPUTE).explain().split("\n"))
    assert "no multiple of 16" in lines["layers.0.attn.k"]
    assert "no multiple of 16" not in lines["layers.0.attn.q"]


def test_what_does_not_go_with_it(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    for given, message in (
        ({"full_finetuning": True, **FP8}, "full_finetuning"),
        ({"load_in_16bit": True, **COMPUTE}, "16 bits"),
        ({"load_in_8bit": True, **COMPUTE}, "int8"),
        ({"compute": "fp4"}, "compute is 'fp4'"),
        ({"load_in_fp8": "tile"}, "load_in_fp8 is 'tile'"),
    ):
        with pytest.raises(ArgumentError, match=message):
            load(folder, **given)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(KernelError, match="capability 8.0"):
        load(folder, device_map="cuda", **COMPUTE)


def test_a_mixture_keeps_its_experts_products(tmp_path: Path) -> None:
    folders.whole(tmp_path, "qwen3_moe")
    _, params = purelm.load(tmp_path, quantize="nf4", compute="fp8", device="cpu")
    layer = params["layers"][0]
    assert computes(layer["attn"]["q"]["weight"])
    assert not any(map(computes, tree.leaves(layer["mlp"])))


def test_a_stored_checkpoint_is_reported_and_merged(tmp_path: Path) -> None:
    stored(tmp_path / "m", "row")
    tiny_folder = Path(purelm.__file__).parent / "data" / "tiny"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny_folder / name, tmp_path / "m" / name)
    model = load(tmp_path / "m", **FP8, max_seq_length=None, fix_tokenizer=False)
    assert "in fp8 (e4m3, a scale a row)" in model.report()
    assert "dequantized" not in model.report()
    model.save_pretrained_merged(tmp_path / "merged")
    assert "quantization_config" not in json.loads((tmp_path / "merged/config.json").read_text())
    found = load_file(tmp_path / "merged/model.safetensors")
    leaf = model.params["layers"][0]["attn"]["q"]["weight"]
    q = found["model.layers.0.self_attn.q_proj.weight"]
    assert torch.equal(q, weight_of(leaf, q.dtype))
