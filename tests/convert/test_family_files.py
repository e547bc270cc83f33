"""What families' files have beside what is read: other names, constants, odd configs."""

import json
from pathlib import Path
from typing import Any

import bridged
import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file

from purelm.convert import peft_config
from purelm.convert.load import load_folder
from purelm.convert.registry import family_of
from purelm.convert.resize import resized
from purelm.errors import CheckpointError, ConfigError
from purelm.nn import decoder, loss


def rewritten(folder: Path, change: Any) -> Path:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, {"format": "pt"})
    return folder


def test_either_name_of_a_head(tmp_path: Path) -> None:
    folder = tiny.save(tiny.hf_model("gpt_neox"), tmp_path / "model")
    assert "embed_out.weight" in load_file(folder / "model.safetensors")
    before = bridged.bridge(folder)(bridged.ids()).logits
    rewritten(folder, lambda t: {k.replace("embed_out", "lm_head"): v for k, v in t.items()})
    assert torch.equal(bridged.bridge(folder)(bridged.ids()).logits, before)


def test_files_without_a_prefix_and_with_masks(tmp_path: Path) -> None:
    """As GPT-2's first files are; weights are stored [in, out], and are not views of the file."""
    folder = tiny.save(tiny.hf_model("gpt2"), tmp_path / "model")
    before = bridged.bridge(folder)(bridged.ids()).logits
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 64, 64) for i in range(3)}
    rewritten(
        folder, lambda t: {**{k.removeprefix("transformer."): v for k, v in t.items()}, **masks}
    )
    model = bridged.bridge(folder)
    assert torch.equal(model(bridged.ids()).logits, before)
    stored = load_file(folder / "model.safetensors")["h.1.mlp.c_fc.weight"]
    up = model.params["layers"][1]["mlp"]["up"]["weight"]
    assert torch.equal(up, stored.T) and up.is_contiguous()


def test_transposed_weights_trained_whole_are_written_as_they_were(tmp_path: Path) -> None:
    folder = tiny.save(tiny.hf_model("gpt2"), tmp_path / "model")
    model = bridged.bridge(folder, train_all=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    model.save_pretrained_merged(tmp_path / "merged")
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "merged"))
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value * 1.5), name


def test_an_adapter_of_k_changes_the_rows_of_k_in_every_group(tmp_path: Path) -> None:
    """Two kv heads: each group has two heads of q, one of k and one of v, of 16 rows each."""
    folder = tiny.save(tiny.hf_model("falcon", new_decoder_architecture=True), tmp_path / "model")
    model = peft_config.apply(bridged.bridge(folder), r=4, target_modules=["k_proj"])
    bridged.spread_trained(model)
    model.save_pretrained_merged(tmp_path / "merged")
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "merged"))
    for name, value in before.items():
        if name.endswith("query_key_value.weight"):
            same = (after[name] == value).all(1).view(2, 4, 16)
            assert not same[:, 2].any() and same[:, [0, 1, 3]].all()
        else:
            assert torch.equal(after[name], value)


def test_dora_is_merged_onto_transposed_weights(tmp_path: Path) -> None:
    model = bridged.bridge(tiny.save(tiny.hf_model("gpt2"), tmp_path / "model"))
    model = peft_config.apply(model, r=4, use_dora=True, target_modules=["q_proj", "c_fc"]).eval()
    bridged.spread_trained(model)
    model.save_pretrained_merged(tmp_path / "merged")
    hf: Any = transformers
    theirs = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    ours = model(bridged.ids()).logits.detach()
    bridged.same_logits(theirs.eval()(bridged.ids()).logits.detach(), ours)


def test_a_constant_that_is_another(tmp_path: Path) -> None:
    folder = tiny.save(tiny.hf_model("apertus"), tmp_path / "model")
    name = "model.layers.1.mlp.act_fn.beta"
    rewritten(folder, lambda t: {**t, name: torch.tensor(0.25)})
    with pytest.raises(CheckpointError, match=r"other than 0\.5.*layers\.1\.mlp\.act_fn\.beta"):
        bridged.bridge(folder)


def test_a_head_with_a_bias_grows(tmp_path: Path) -> None:
    """Old tokens keep their logits; the new ones have the mean's."""
    folder = tiny.save(tiny.hf_model("phi"), tmp_path / "model")
    loaded = load_folder(folder, quantize=None, dtype=None, device=torch.device("cpu"))
    ids = bridged.ids()
    before = decoder.forward(loaded.params, loaded.spec, ids)
    spec, params = resized(loaded.spec, loaded.params, loaded.config, 107)
    after = decoder.forward(params, spec, ids)
    torch.testing.assert_close(after[..., :99], before, rtol=1e-6, atol=1e-6)
    mean = before.mean(-1, keepdim=True).expand(-1, -1, 8)
    torch.testing.assert_close(after[..., 99:], mean, rtol=1e-4, atol=1e-5)
    assert loss.loss(params, spec, ids, ids).isfinite()


@pytest.mark.parametrize(
    ("family", "changed", "said"),
    [
        ("falcon", {"parallel_attn": False, "new_decoder_architecture": True}, "parallel_attn"),
        ("falcon", {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn"),
        ("falcon", {"num_key_value_heads": 3}, "num_key_value_heads"),
        ("deepseek_v3", {"num_key_value_heads": 2}, "num_key_value_heads"),
        ("deepseek_v3", {"n_group": 3}, "n_group"),
        ("deepseek_v3", {"num_experts_per_tok": 9}, "num_experts_per_tok"),
        ("deepseek_v3", {"head_dim": 12}, "head_dim"),
        ("deepseek_v3", {"topk_method": "greedy"}, "topk_method"),
        ("llama4_text", {"attention_chunk_size": None}, "attention_chunk_size.*layer_types"),
        ("llama4_text", {"moe_layers": [3]}, "moe_layers"),
        ("llama4_text", {"num_experts_per_tok": 6}, "num_experts_per_tok.*num_local_experts"),
        ("llama4_text", {"no_rope_layers": [1, 0]}, "no_rope_layers"),
        ("phimoe", {"num_experts_per_tok": 3}, "num_experts_per_tok"),
        ("phimoe", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "linear"),
        ("gemma3_text", {"sliding_window": None}, "sliding_window.*layer_types"),
        ("olmoe", {"head_dim": 16}, "head_dim"),
        ("gpt_neox", {"rotary_emb_base": 5.0, "rope_theta": 6.0}, "rope_theta"),
        ("ministral3", {"rope_parameters": {"rope_theta": 1e4}}, "llama_4_scaling_beta"),
        ("hunyuan_v1_dense", {"rope_parameters": [1]}, "rope_parameters"),
    ],
)
def test_configs_that_no_model_has(
    family: str, changed: dict[str, Any], said: str, tmp_path: Path
) -> None:
    tiny.config(family).save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    family_of(fields).spec(fields)
    with pytest.raises(ConfigError, match=said):
        family_of(fields).spec({**fields, **changed})


def test_old_names_of_the_rotary_fields() -> None:
    fields = {**tiny.config("gpt_neox").to_dict(), "rotary_pct": 0.5, "rotary_emb_base": 77}
    del fields["rope_parameters"]
    rope = family_of(fields).spec(fields).layers[0].attention.rope
    assert rope is not None and (rope.dim, rope.theta) == (8, 77.0)
