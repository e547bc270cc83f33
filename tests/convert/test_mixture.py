"""Mixtures of experts in files: both spellings, merging, further layers, bad configs."""

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
from purelm.convert.registry import FAMILIES
from purelm.errors import CheckpointError, ConfigError
from purelm.nn import decoder, lora, tree

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
TARGETS = {
    "mixtral": ["q_proj", "w1", "w2"],
    "qwen2_moe": ["v_proj", "gate_proj", "down_proj"],
    "granitemoe": ["q_proj", "up_proj", "down_proj"],
    "gpt_oss": ["q_proj", "up_proj", "down_proj"],
}


def load(folder: Path, **options: Any) -> Any:
    options = {"quantize": None, "dtype": None, "device": torch.device("cpu"), **options}
    return load_folder(folder, **options)


def rewritten(folder: Path, **fields: Any) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    return folder


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe", "granitemoe", "glm4_moe"])
def test_stacks_as_transformers_has_them_in_memory(family: str, tmp_path: Path) -> None:
    model = tiny.hf_model(family)
    folder = tiny.save(model, tmp_path / "one by one")
    stacked = tiny.save(model, tmp_path / "stacked")
    state = {name: t.contiguous() for name, t in model.state_dict().items()}
    save_file(state, stacked / "model.safetensors", {"format": "pt"})
    one, other = (dict(tree.items(load(f).params)) for f in (folder, stacked))
    assert list(one) == list(other)
    assert all(torch.equal(one[path], other[path]) for path in one)


@pytest.mark.parametrize("family", TARGETS)
@pytest.mark.parametrize("four_bits", [False, True], ids=["16 bits", "4 bits"])
def test_merged(family: str, four_bits: bool, tmp_path: Path) -> None:
    """transformers runs the merged file, its tensors named as they were, with our logits."""
    folder = tiny.save(tiny.hf_model(family), tmp_path / "base")
    model = bridged.bridge(folder, quantize="nf4" if four_bits else None)
    peft_config.apply(model, r=4, lora_alpha=12, target_modules=TARGETS[family]).eval()
    bridged.spread_trained(model)
    assert any("experts" in path for path, _ in tree.items(model.adapters))
    model.save_pretrained_merged(tmp_path / "merged")
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "merged"))
    assert {n: t.shape for n, t in before.items()} == {n: t.shape for n, t in after.items()}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    ids = bridged.ids()
    base = load(folder)  # adapters of 4-bit weights too are merged onto the 16-bit file
    want = decoder.forward(lora.merge(base.params, model.adapters), model.spec, ids).detach()
    assert not torch.allclose(want, decoder.forward(base.params, base.spec, ids))
    bridged.same_logits(theirs(ids).logits.detach(), want)


def test_adapters_go_to_peft_files_and_back(tmp_path: Path) -> None:
    folder = tiny.save(tiny.hf_model("mixtral"), tmp_path / "base")
    model = bridged.bridge(folder)
    peft_config.apply(model, r=4, lora_alpha=12, target_modules=["w1", "w2", "w3"]).eval()
    bridged.spread_trained(model)
    model.save_pretrained(tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.block_sparse_moe.experts.3.w2.lora_A.weight"
    assert torch.equal(stored[name], model.adapters["layers"][1]["mlp"]["experts"]["down"].a[3])


def test_layers_for_further_tokens_are_left_out(tmp_path: Path) -> None:
    folder = tiny.save(tiny.hf_model("glm4_moe"), tmp_path / "model")
    file = folder / "model.safetensors"
    stored = load_file(file)
    extra = {
        n.replace("layers.2", "layers.3"): t.clone() for n, t in stored.items() if "layers.2" in n
    }
    save_file({**stored, **extra, "model.layers.3.eh_proj.weight": torch.ones(2)}, file)
    assert set(load(folder).left_out) == {*extra, "model.layers.3.eh_proj.weight"}
    rewritten(folder, num_hidden_layers=4)
    with pytest.raises(CheckpointError, match=r"not expected model.layers.3.eh_proj.weight"):
        load(folder)


def test_the_bias_that_chooses_stays_fp32(tmp_path: Path) -> None:
    model = tiny.hf_model("glm4_moe")
    folder = tiny.save(model, tmp_path / "model")
    loaded = load(folder, dtype=torch.bfloat16)
    router = loaded.params["layers"][1]["mlp"]["router"]
    assert router["weight"].dtype == torch.bfloat16
    assert torch.equal(router["bias"], model.model.layers[1].mlp.gate.e_score_correction_bias)


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("mixtral", {"num_experts_per_tok": 6}, "num_experts_per_tok is 6, and num_local_experts is 5"),
    ("mixtral", {"num_local_experts": 0}, "num_local_experts is 0"),
    ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise is 0.1"),
    ("mixtral", {"output_router_logits": True}, "output_router_logits is True"),
    ("qwen2_moe", {"mlp_only_layers": [3]}, r"mlp_only_layers is \[3\]"),
    ("qwen2_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
    ("olmoe", {"clip_qkv": 8.0}, "clip_qkv is 8.0"),
    ("glm4_moe", {"n_group": 3}, "n_group is 3 and topk_group 2: n_routed_experts 8"),
    ("glm4_moe", {"n_group": 8}, "n_group is 8"),
    ("glm4_moe", {"num_experts_per_tok": 5}, "num_experts_per_tok 5"),
]


@pytest.mark.parametrize(("family", "fields", "message"), WRONG, ids=[m for _, _, m in WRONG])
def test_configs_that_do_not_fit(
    family: str, fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    tiny.config(family).save_pretrained(tmp_path)
    rewritten(tmp_path, **fields)
    with pytest.raises(ConfigError, match=message):
        load(tmp_path)


def test_explain_names_what_runs_again(tmp_path: Path) -> None:
    model = bridged.bridge(tiny.save(tiny.hf_model("qwen2_moe", mlp_only_layers=[0]), tmp_path))
    text = model.explain()
    assert "run again" not in text
    assert "layers.1.mlp.experts.down: 6 experts, each " in text
    assert "layers.0.mlp.down: " in text
    peft_config.apply(model, r=3, use_dora=True, target_modules=["q_proj", "down_proj"])
    text = model.explain()
    assert "attention run again" not in text and "layers 0" not in text
    assert "layers 1, 2: the MLP run again by autograd, for experts one after the other" in text


# What published files have beside the fields that transformers writes.
FURTHER: dict[str, dict[str, Any]] = {
    "deepseek_v2": {
        **{"aux_loss_alpha": 0.001, "moe_layer_freq": 1, "pretraining_tp": 1, "seq_aux": True},
        **{"scoring_func": "softmax", "ep_size": 1, "auto_map": {}},
    },
    "glm4_moe_lite": {
        **{"first_k_dense_replace": 1, "num_nextn_predict_layers": 1, "topk_method": "noaux_tc"},
        **{"partial_rotary_factor": 1.0, "rope_scaling": None},
    },
    "dots1": {
        **{"moe_layer_freq": 1, "pretraining_tp": 1, "scoring_func": "noaux_tc"},
        **{"topk_method": "noaux_tc", "rope_scaling": None},
    },
}


@pytest.mark.parametrize("family", FURTHER)
def test_fields_of_published_files(family: str) -> None:
    """They say what is meant anyway; what they say otherwise is an error."""
    fields = json.loads(tiny.config(family).to_json_string(use_diff=False))
    known = FAMILIES[family]
    further = FURTHER[family]
    assert known.spec({**fields, **further}) == known.spec(fields)
    for name in ("scoring_func", "topk_method", "moe_layer_freq", "first_k_dense_replace"):
        if name in further:
            with pytest.raises(ConfigError, match=name):
                known.spec({**fields, **further, name: 7})
