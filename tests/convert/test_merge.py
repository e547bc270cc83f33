"""Merged models: transformers runs them with our logits, right to the byte, or absent."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import bridged
import pytest
import tiny
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file

from purelm.convert import adapter_config, merge, merge_tensor, peft_config, shard_size
from purelm.convert.bridge import CausalLM
from purelm.convert.shards import open_checkpoint
from purelm.errors import ArgumentError, SaveError
from purelm.nn import decoder, lora, tree

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

TIED = {"tie_word_embeddings": True}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {}, {}),
    "mistral": ("mistral", {"sliding_window": 7}, {"use_rslora": True}),
    "qwen2": ("qwen2", {}, {"bias": "all", "modules_to_save": ["embed_tokens", "norm"]}),
    "qwen3": ("qwen3", {}, {"modules_to_save": ["lm_head", "norm"]}),
    "tied": ("llama", TIED, {}),
    "tied-embedding": ("llama", TIED, {"modules_to_save": ["embed_tokens"]}),
    "tied-head": ("llama", TIED, {"modules_to_save": ["lm_head"]}),
    "pissa": ("llama", {}, {"init_lora_weights": "pissa"}),
}


def base(tmp_path: Path, family: str = "llama", /, **options: Any) -> Path:
    """A folder that transformers wrote; `dtype` and `max_shard_size` are of the files."""
    dtype, size = options.pop("dtype", torch.float32), options.pop("max_shard_size", "1GB")
    model = tiny.hf_model(family, **options).to(dtype)
    return tiny.save(model, tmp_path / "base", max_shard_size=size)


def adapted(folder: Path, *, quantize: Any = None, **arguments: Any) -> CausalLM:
    model = bridged.bridge(folder, quantize=quantize)
    peft_config.apply(model, **{"r": 4, "lora_alpha": 16, **arguments}).eval()
    bridged.spread_trained(model)
    return model


def reload(folder: Path) -> Any:
    made, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return made.eval()


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize("source", ["60KB", "1GB"])
@pytest.mark.parametrize("asked", ["50KB", 70_000, "0.001GiB"])
def test_files_are_as_large_as_asked(source: str, asked: Any, tmp_path: Path) -> None:
    model = adapted(base(tmp_path, max_shard_size=source))
    model.save_pretrained_merged(tmp_path / "merged", max_shard_size=asked)
    files = sorted((tmp_path / "merged").glob("*.safetensors"))
    limit = shard_size.to_bytes(asked)
    for file in files:
        found = load_file(file)
        size = sum(t.numel() * t.element_size() for t in found.values())
        assert size <= limit or len(found) == 1
    whole = model.num_parameters(exclude_embeddings=False) * 4
    assert len(files) == 1 if limit > whole else len(files) >= whole / limit
    index = tmp_path / "merged" / "model.safetensors.index.json"
    assert index.exists() == (len(files) > 1)
    if len(files) > 1:
        assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    with torch.no_grad():
        bridged.same_logits(reload(tmp_path / "merged")(bridged.ids()).logits,
                            model(bridged.ids()).logits)  # fmt: skip
    # Another size replaces all of it.
    model.save_pretrained_merged(tmp_path / "merged", max_shard_size="1GB")
    assert [p.name for p in (tmp_path / "merged").glob("*.safetensors*")] == ["model.safetensors"]


def test_the_parts_of_a_weight_in_4_bits_stay_together(tmp_path: Path) -> None:
    model = adapted(base(tmp_path), quantize="nf4")
    model.save_pretrained_merged(tmp_path / "four", None, "merged_4bit", max_shard_size="3KB")
    where = json.loads((tmp_path / "four" / "model.safetensors.index.json").read_text())
    files: dict[str, set[str]] = {}
    for name, file in where["weight_map"].items():
        files.setdefault(name.partition(".weight")[0], set()).add(file)
    assert len(files) > 20 and all(len(found) == 1 for found in files.values())
    assert len(set(where["weight_map"].values())) > 10
    again = bridged.bridge(tmp_path / "four", quantize="nf4")
    assert again(bridged.ids()).logits.isfinite().all()


@pytest.mark.parametrize("size", [0, -1, "5", "GB", "5 TB", 1.5, True, ""])
def test_sizes_that_are_none(size: Any, tmp_path: Path) -> None:
    model = adapted(base(tmp_path))
    with pytest.raises(ArgumentError, match="max_shard_size is"):
        model.save_pretrained_merged(tmp_path / "merged", max_shard_size=size)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_transformers_runs_what_was_merged(case: str, sharded: bool, tmp_path: Path) -> None:
    family, switches, arguments = CASES[case]
    folder = base(tmp_path, family, max_shard_size="60KB" if sharded else "1GB", **switches)
    model = adapted(folder, **arguments)
    before = contents(folder)
    model.save_pretrained_merged(tmp_path / "merged")
    assert contents(folder) == before
    ids = bridged.ids()
    dense = lora.merge(model.params, model.adapters)
    want = decoder.forward(dense, model.spec, ids).detach()
    assert not torch.allclose(want, bridged.bridge(folder)(ids).logits)
    bridged.same_logits(want, model(ids).logits.detach())
    bridged.same_logits(reload(tmp_path / "merged")(ids).logits.detach(), want)
    again = bridged.bridge(tmp_path / "merged")
    bridged.same_logits(again(ids).logits.detach(), want)
    assert again.spec.tied == (case in ("tied", "tied-embedding"))
    shards = sorted(p.name for p in folder.glob("*.safetensors*"))
    assert sorted(p.name for p in (tmp_path / "merged").glob("*.safetensors*")) == shards
    assert (len(shards) > 2) == sharded


def test_full_fine_tuning(tmp_path: Path) -> None:
    folder = base(tmp_path, "qwen2", max_shard_size="60KB")
    model = bridged.bridge(folder, train_all=True)
    bridged.spread_trained(model)
    model.save_pretrained(tmp_path / "saved")
    ids = bridged.ids()
    want = model(ids).logits.detach()
    bridged.same_logits(reload(tmp_path / "saved")(ids).logits.detach(), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_bytes(dtype: torch.dtype, quantize: Any, tmp_path: Path) -> None:
    """fp32 sums rounded once to the stored dtype; everything else as it was, shard by shard."""
    folder = base(tmp_path, dtype=dtype, max_shard_size="40KB")
    model = adapted(folder, quantize=quantize, target_modules=["q_proj", "down_proj"])
    model.save_pretrained_merged(tmp_path / "merged")
    names = model.origin.family.names
    deltas = {
        names.to_hf(f"{path}.weight"): lora.delta(leaf).detach()
        for path, leaf in tree.items(model.adapters)
    }
    assert len(deltas) == 6
    for path in folder.glob("*.safetensors"):
        stored, merged = load_file(path), load_file(tmp_path / "merged" / path.name)
        assert stored.keys() == merged.keys()
        for name, tensor in stored.items():
            want = tensor
            if name in deltas:
                want = (tensor.float() + deltas.pop(name)).to(dtype)
                assert not torch.equal(want, tensor)
            assert merged[name].dtype == dtype
            assert torch.equal(merged[name], want), name
        with safe_open(path, "pt") as one, safe_open(tmp_path / "merged" / path.name, "pt") as two:
            assert one.metadata() == two.metadata()
    assert not deltas
    index = "model.safetensors.index.json"
    kept, made = (json.loads((f / index).read_text()) for f in (folder, tmp_path / "merged"))
    assert made == {**kept, "metadata": made["metadata"]}
    assert made["metadata"]["total_size"] == kept["metadata"]["total_size"]
    ours, theirs = (
        json.loads((f / "config.json").read_text()) for f in (tmp_path / "merged", folder)
    )
    assert ours == {k: v for k, v in theirs.items() if not k.startswith("_")}


@pytest.mark.parametrize("trained", ["embed_tokens", "lm_head"])
def test_a_tied_head_that_is_stored_all_the_same(trained: str, tmp_path: Path) -> None:
    folder = base(tmp_path, **TIED)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    from safetensors.torch import save_file

    save_file(tensors, path, {"format": "pt"})
    model = adapted(folder, modules_to_save=[trained])
    model.save_pretrained_merged(tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    head, embed = merged["lm_head.weight"], merged["model.embed_tokens.weight"]
    assert torch.equal(head, embed) == (trained == "embed_tokens")
    want = model(bridged.ids()).logits.detach()
    bridged.same_logits(reload(tmp_path / "merged")(bridged.ids()).logits.detach(), want)


def test_more_rows_of_vocabulary(tmp_path: Path) -> None:
    folder = base(tmp_path, max_shard_size="40KB")
    small = bridged.bridge(folder)

    def grow(path: str, leaf: torch.Tensor) -> torch.Tensor:
        rows = path in ("embed.weight", "head.weight")
        return torch.cat([leaf, leaf[:5] * 0.5]) if rows else leaf

    small.config.vocab_size = 104
    model = CausalLM(
        replace(small.spec, vocab=104),
        tree.map_with_path(grow, small.params),
        config=small.config,
        generation_config=small.generation_config,
        origin=small.origin,
        dtype=torch.float32,
        max_seq_length=64,
    ).eval()
    model.save_pretrained_merged(tmp_path / "merged")
    ids = bridged.ids() % 5 + 99
    theirs = reload(tmp_path / "merged")
    bridged.same_logits(theirs(ids).logits.detach(), model(ids).logits.detach())
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    grown = 2 * 5 * 48 * 4
    total = sum(t.nbytes for t in open_checkpoint(folder).tensors.values())
    assert index["metadata"]["total_size"] == total + grown


@pytest.mark.parametrize("size", ["1GB", "60KB"])
def test_a_snapshot_of_the_cache(size: str, tmp_path: Path) -> None:
    """Its files are links to blobs that are named by their hash; what is written is not."""
    folder = base(tmp_path, max_shard_size=size)
    root = tmp_path / "hub" / "models--a--b"
    snapshot = root / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (root / "blobs").mkdir()
    for i, path in enumerate(sorted(folder.iterdir())):
        shutil.copyfile(path, root / "blobs" / f"{i:064x}")
        os.symlink(f"../../blobs/{i:064x}", snapshot / path.name)
    (snapshot / "tokenizer_config.json").write_text("{}")
    adapted(snapshot).save_pretrained_merged(tmp_path / "merged")
    have = {p.name for p in (tmp_path / "merged").iterdir()}
    assert have == {p.name for p in folder.iterdir()} | {"tokenizer_config.json"}
    assert not any(p.is_symlink() for p in (tmp_path / "merged").iterdir())
    reload(tmp_path / "merged")


class Saved:
    """A tokenizer that can be saved."""

    def save_pretrained(self, folder: Path) -> None:
        (Path(folder) / "tokenizer.json").write_text("mine")


def test_what_goes_along(tmp_path: Path) -> None:
    """Tokenizer, generation config; stale weights go, and other files of the folder stay."""
    folder = base(tmp_path, max_shard_size="60KB")
    (folder / "tokenizer.json").write_text("theirs")
    (folder / "chat_template.jinja").write_text("template")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text("tools")
    model = adapted(folder)
    target = tmp_path / "merged"
    model.save_pretrained_merged(target, save_method="lora")
    assert (target / "adapter_config.json").exists() and not (target / "config.json").exists()
    (target / "model-00009-of-00009.safetensors").write_text("stale")
    (target / "notes.txt").write_text("kept")
    model.save_pretrained_merged(target)
    assert not list(target.glob("adapter*")) and not list(target.glob("*00009.*"))
    assert (target / "notes.txt").read_text() == "kept"
    assert (target / "tokenizer.json").read_text() == "theirs"
    assert (target / "additional_chat_templates" / "tool.jinja").read_text() == "tools"
    assert json.loads((target / "generation_config.json").read_text()) == {"eos_token_id": 2}
    model.save_pretrained_merged(target, Saved())
    assert (target / "tokenizer.json").read_text() == "mine"


def refused(model: CausalLM, target: Path, message: str) -> None:
    """Merging raises, and neither the folder nor its neighbours are any different."""
    before = sorted(p.name for p in target.parent.iterdir())
    inside = contents(target) if target.exists() else None
    with pytest.raises(SaveError, match=message):
        model.save_pretrained_merged(target)
    assert sorted(p.name for p in target.parent.iterdir()) == before
    assert (contents(target) if target.exists() else None) == inside


def test_sources_that_changed_or_vanished(tmp_path: Path) -> None:
    folder = base(tmp_path)
    model = adapted(folder)
    target = tmp_path / "merged"
    model.save_pretrained_merged(target)
    weights = folder / "model.safetensors"
    content, times = weights.read_bytes(), weights.stat()
    weights.write_bytes(content + b"x")
    refused(model, target, r"followed by other bytes.*model.safetensors")
    weights.write_bytes(content)
    refused(model, target, "changed since it was opened")
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    model.save_pretrained_merged(target)
    weights.unlink()
    refused(model, target, "model.safetensors")
    refused(model, tmp_path / "new", "model.safetensors")


def test_the_source_itself_is_no_target(tmp_path: Path) -> None:
    folder = base(tmp_path)
    refused(adapted(folder), folder, "what the model was loaded from")
    os.symlink(folder, tmp_path / "link")
    refused(adapted(folder), tmp_path / "link", "what the model was loaded from")


def test_values_that_the_stored_dtype_cannot_hold(tmp_path: Path) -> None:
    model = adapted(base(tmp_path, dtype=torch.float16))
    with torch.no_grad():
        tree.leaves(model.adapters)[3].b[2] = 1e6
    refused(model, tmp_path / "merged", r"layers.0.self_attn.o_proj.*not finite in torch.float16")
    model = adapted(base(tmp_path, dtype=torch.float16), modules_to_save=["norm"])
    with torch.no_grad():
        tree.leaves(model.trained)[-1][0] = float("nan")
    refused(model, tmp_path / "merged", "norm.weight has values that are not finite")


RIGHT = merge_tensor.merged


def wrong_scale(base: torch.Tensor, adapter: lora.LoRA, name: str) -> torch.Tensor:
    return RIGHT(base, replace(adapter, scale=adapter.scale * 1.01), name)


def transposed(base: torch.Tensor, adapter: lora.LoRA, name: str) -> torch.Tensor:
    square = base.shape[0] == base.shape[1]
    turned = lora.LoRA(adapter.b.mT, adapter.a.mT, adapter.scale) if square else adapter
    return RIGHT(base, turned, name)


def nothing_added(base: torch.Tensor, adapter: lora.LoRA, name: str) -> torch.Tensor:
    return base


@pytest.mark.parametrize("mistake", [wrong_scale, transposed, nothing_added])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_sum_is_noticed(
    mistake: Any, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(base(tmp_path, dtype=dtype))
    monkeypatch.setattr(merge_tensor, "merged", mistake)
    refused(model, tmp_path / "merged", "is not its base plus its adapter")


def test_bytes_that_the_disk_changed_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(base(tmp_path))
    write = merge.atomic.write_safetensors

    def flip(path: Path, *rest: Any) -> None:
        write(path, *rest)
        content = bytearray(path.read_bytes())
        content[-40] ^= 1
        path.write_bytes(content)

    monkeypatch.setattr(merge.atomic, "write_safetensors", flip)
    refused(model, tmp_path / "merged", "reads back with other bytes")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_right_sums_pass_the_check(dtype: torch.dtype) -> None:
    """The bound is wide enough for every rounding: small, large, cancelling, subnormal."""
    generator = torch.Generator().manual_seed(0)
    for size in (1e-7, 1e-3, 1.0, 100.0):
        for scale in (0.01, 2.0, 64.0):
            weight = (torch.randn(70, 90, generator=generator) * size).to(dtype)
            leaf = lora.one((70, 90), 16, scale, generator=generator, start="random")
            done = merge_tensor.merged(weight.clone(), leaf, "w")
            merge_tensor.check(weight, done, leaf, "w")
            inverse = replace(leaf, b=-leaf.b)
            merge_tensor.check(done, merge_tensor.merged(done.clone(), inverse, "w"), inverse, "w")


def test_what_save_pretrained_takes(tmp_path: Path) -> None:
    model = bridged.bridge(base(tmp_path))
    model.save_pretrained(tmp_path / "x", max_shard_size="20KB", safe_serialization=True)
    assert len(list((tmp_path / "x").glob("model-*.safetensors"))) > 1
    with pytest.raises(ArgumentError, match="selected_adapters is .* the model wears none"):
        model.save_pretrained(tmp_path / "y", selected_adapters=["default"])
    with pytest.raises(ArgumentError, match=r"model\.push_to_hub\(repo_id\)"):
        model.save_pretrained(tmp_path / "y", push_to_hub=True)
    assert not (tmp_path / "y").exists()


def test_methods(tmp_path: Path) -> None:
    model = adapted(base(tmp_path))
    for method, way in (("torchao", "TorchAoConfig"), ("fp8", "quantization='fp8'")):
        with pytest.raises(ArgumentError, match=f"save_method='{method}'.*'merged_16bit'.*{way}"):
            model.save_pretrained_merged(tmp_path / "x", save_method=method)
    with pytest.raises(ArgumentError, match="save_method is 'merged'"):
        model.save_pretrained_merged(tmp_path / "x", save_method="merged")
    assert not (tmp_path / "x").exists()
    model.save_pretrained_merged(tmp_path / "x", Saved(), save_method="lora")
    assert adapter_config.read_config(tmp_path / "x") is not None
    assert (tmp_path / "x" / "tokenizer.json").read_text() == "mine"


def test_chunks_of_rows_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(37, 64, generator=generator).bfloat16()
    leaf = lora.one((37, 64), 4, 2.0, generator=generator, start="random")
    whole = merge_tensor.merged(weight.clone(), leaf, "w")
    monkeypatch.setattr(merge_tensor, "_CHUNK", 64 * 5 + 3)
    parts = merge_tensor.merged(weight.clone(), leaf, "w")
    merge_tensor.check(weight, parts, leaf, "w")
    assert (whole != parts).sum() <= 0.01 * whole.numel()  # products may be summed in other orders
    torch.testing.assert_close(whole, parts)
