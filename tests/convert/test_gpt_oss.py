"""gpt-oss in its published forms: stacks in 16 bits and in MXFP4, row by row in turn."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import bridged
import gguf
import gguf_models
import numpy as np
import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file

import purelm
from purelm.convert import bnb_file, fused, fused_read, mxfp4_file, peft_config
from purelm.convert.adapter_file import read_adapter
from purelm.convert.encoded import Encoded
from purelm.convert.gguf_file import open_gguf, read_tensor
from purelm.convert.registry import family_of
from purelm.convert.safetensors_file import read
from purelm.errors import CheckpointError, ConfigError
from purelm.nn import decoder, lora, stacks, tree
from purelm.quant.nf4 import NF4, quantize

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
SIZES = {"hidden_size": 64, "intermediate_size": 32}
# config.json as openai/gpt-oss-20b has it.
PUBLISHED: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": 200002,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "output_router_logits": False,
    "pad_token_id": 199999,
    "quantization_config": {
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
        "quant_method": "mxfp4",
    },
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "transformers_version": "4.55.0.dev0",
    "use_cache": True,
    "vocab_size": 201088,
}


@pytest.fixture
def both(tmp_path: Path) -> tuple[Path, Any]:
    """A folder in MXFP4, and transformers' model of what it stands for."""
    return mxfp4_model(tmp_path)


def mxfp4_model(tmp_path: Path, **fields: Any) -> tuple[Path, Any]:
    """A folder in MXFP4, and transformers' model of what it stands for."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    model = tiny.hf_model("gpt_oss", **SIZES, **fields)
    folder = tiny.save(model, tmp_path / "mxfp4")
    generator = torch.Generator().manual_seed(5)
    stored = load_file(folder / "model.safetensors")
    for name in [n for n in stored if n.endswith(("gate_up_proj", "down_proj"))]:
        count, inputs, outputs = stored.pop(name).shape
        places = count, outputs, inputs // 32
        blocks = torch.randint(256, (*places, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(121, 126, places, dtype=torch.uint8, generator=generator)
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        dense = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
        with torch.no_grad():
            model.get_parameter(name).copy_(dense)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    file = folder / "config.json"
    fields = {**json.loads(file.read_text()), "quantization_config": {"quant_method": "mxfp4"}}
    file.write_text(json.dumps(fields))
    return folder, model


def test_the_published_config() -> None:
    spec = family_of(PUBLISHED).spec(PUBLISHED)
    assert [layer.sight[0] for layer in spec.layers] == [128, None] * 12
    (rope,) = spec.ropes()
    assert (rope.kind, rope.factor, rope.truncate, rope.theta) == ("yarn", 32.0, False, 150000.0)
    moe = spec.layers[0].mlp
    assert (moe.experts, moe.active, moe.router_bias) == (32, 4, True)
    assert (moe.expert.alpha, moe.expert.limit, moe.expert.bias) == (1.702, 7.0, True)
    with pytest.raises(ConfigError, match="experts_per_token and num_experts_per_tok"):
        family_of(PUBLISHED).spec({**PUBLISHED, "experts_per_token": 5})
    # Without rotary fields it is what its class has by default.
    bare = {k: v for k, v in PUBLISHED.items() if k != "rope_scaling"}
    assert family_of(bare).spec(bare) == spec


def test_mxfp4_dequantized(both: tuple[Path, Any]) -> None:
    folder, model = both
    ours, ids = bridged.bridge(folder), bridged.ids()
    bridged.same_logits(ours(ids).logits.detach(), model(ids).logits.detach())


@pytest.mark.parametrize("method", ["f32", "q8_0"])
def test_mxfp4_as_gguf(method: str, tmp_path: Path) -> None:
    """Its experts' values are whole in fp32; in Q8_0 they are what the gguf library rounds to."""
    fields = {"vocab_size": 1600, "head_dim": 16, "swiglu_limit": 7.0}
    rope = gguf_models.EXACT_YARN
    folder, model = mxfp4_model(tmp_path, rope_parameters=rope, **fields)
    ours, ids = bridged.bridge(folder), bridged.ids()
    (path,) = ours.save_pretrained_gguf(tmp_path / "out", gguf_models.tokenizer(), method)
    info = open_gguf(path).tensors["blk.1.ffn_up_exps.weight"]
    dense = model.model.layers[1].mlp.experts.gate_up_proj[..., 1::2].mT.detach().numpy()
    kind = gguf.GGMLQuantizationType[info.kind]
    want = gguf.quants.dequantize(gguf.quants.quantize(dense, kind), kind)
    assert info.kind == method.upper() and np.array_equal(read_tensor(info).numpy(), want)
    if method == "f32":
        spec, params = purelm.load(path, device="cpu", dtype=torch.float32)
        bridged.same_logits(decoder.forward(params, spec, ids), ours(ids).logits.detach())


def test_mxfp4_is_read_expert_by_expert(both: tuple[Path, Any]) -> None:
    """No more than one matrix of a stack is in fp32 at a time."""
    folder, _ = both
    loaded = bridged.bridge(folder).origin.checkpoint
    (info,) = (i for n, i in loaded.tensors.items() if n.endswith("layers.1.mlp.experts.down_proj"))
    sizes = []

    def counted(*parts: torch.Tensor) -> torch.Tensor:
        sizes.append(len(parts[0]))
        return mxfp4_file.dequantize(*parts)

    assert isinstance(info, Encoded)
    info = replace(info, decode=counted)
    paths = [f"layers.1.mlp.experts.{i}.down.weight" for i in range(5)]
    want = dict(tree.items(stacks.each_spec(bridged.bridge(folder).spec)))
    whole = fused.Fused(info.name, tuple(paths), (64,) * 5, (32,))
    assert [want[path].shape for path in paths] == [(64, 32)] * 5
    parts = fused_read.split(fused_read.turned(info), whole)
    of = fused_read.reader(read)
    made = torch.cat([of(parts[path]) for path in paths])
    assert sizes == [1] * 5
    whole_at_once = info.decode(*map(read, info.parts))
    assert torch.equal(made, whole_at_once.mT.flatten(0, 1))
    # So it is where it is merged.
    del sizes[:]
    assert torch.equal(bnb_file.read_dense(info), whole_at_once.to(info.dtype))
    assert sizes == [1] * 5


def test_mxfp4_in_nf4(both: tuple[Path, Any], tmp_path: Path) -> None:
    """Each expert's slice in 4 bits anew; trained through, merged, and read by transformers."""
    folder, model = both
    ours = bridged.bridge(folder, quantize="nf4")
    leaves = dict(tree.items(stacks.one_by_one(ours.params)))
    whole = model.model.layers[1].mlp.experts.gate_up_proj.detach()
    for i, name in ((3, "gate"), (4, "up")):
        leaf = leaves[f"layers.1.mlp.experts.{i}.{name}.weight"]
        rows = whole[i].mT[0 if name == "gate" else 1 :: 2].contiguous()
        assert isinstance(leaf, NF4) and torch.equal(leaf.packed, quantize(rows).packed)
    peft_config.apply(ours, r=4, lora_alpha=12, target_modules="all-linear").train()
    ids = bridged.ids()
    optimizer = torch.optim.Adam([p for p in ours.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = ours(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    ours.eval().save_pretrained_merged(tmp_path / "merged")
    assert "quantization_config" not in json.loads((tmp_path / "merged/config.json").read_text())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    base = bridged.bridge(folder)
    merged = lora.merge(base.params, ours.adapters)
    # What MXFP4 stands for is written in 16 bits, the rest as it was stored.
    rounded = {
        path: leaf.bfloat16().float() if ".experts." in path and path.endswith("weight") else leaf
        for path, leaf in tree.items(merged)
    }
    want = decoder.forward(tree.from_items(rounded), base.spec, ids).detach()
    bridged.same_logits(theirs(ids).logits.detach(), want)


def test_trained_whole_and_saved(tmp_path: Path) -> None:
    """Every tensor goes back to its own rows, biases and sinks too."""
    folder = tiny.save(tiny.hf_model("gpt_oss"), tmp_path / "base")
    model = bridged.bridge(folder, train_all=True)
    same = tmp_path / "same"
    model.save_pretrained_merged(same)
    before, after = (load_file(f / "model.safetensors") for f in (folder, same))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    bridged.spread_trained(model)
    model.save_pretrained_merged(tmp_path / "new")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "new", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    ids = bridged.ids()
    bridged.same_logits(theirs(ids).logits.detach(), model(ids).logits.detach())


def test_adapters_and_biases_go_to_files_and_back(tmp_path: Path) -> None:
    folder = tiny.save(tiny.hf_model("gpt_oss"), tmp_path / "base")
    model = bridged.bridge(folder)
    targets = ["q_proj", "up_proj", "down_proj"]
    peft_config.apply(model, r=4, lora_alpha=12, target_modules=targets, bias="lora_only").eval()
    bridged.spread_trained(model)
    model.save_pretrained(tmp_path / "adapter")
    adapters, copies, _ = read_adapter(tmp_path / "adapter", model.spec, model.origin.family.names)
    for found, want in ((adapters, model.adapters), (copies, model.trained)):
        found, want = dict(tree.items(found)), dict(tree.items(want))
        assert found.keys() == want.keys() and found
        for path, leaf in found.items():
            pairs = zip(tree.tensors(leaf), tree.tensors(want[path]), strict=True)
            assert all(torch.equal(a, b.detach()) for a, b in pairs), path


def test_rows_that_do_not_fit(tmp_path: Path) -> None:
    folder = tiny.save(tiny.hf_model("gpt_oss"), tmp_path / "base")
    file = folder / "model.safetensors"
    stored = load_file(file)
    name = "model.layers.0.mlp.experts.gate_up_proj_bias"
    save_file({**stored, name: stored[name][:, :-1].contiguous()}, file)
    message = r"found shape \[5, 159\], config.json makes it 800 rows"
    with pytest.raises(CheckpointError, match=message) as caught:
        bridged.bridge(folder)
    assert name in str(caught.value)
