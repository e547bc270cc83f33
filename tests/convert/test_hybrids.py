"""Models with Mamba 2, delta nets or short convolutions: adapters, generation, plans, configs."""

import copy
import json
from pathlib import Path
from typing import Any

import bridged
import peft
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch.func import grad, vmap

from purelm.convert import peft_config
from purelm.convert.load import load_folder
from purelm.convert.registry import family_of
from purelm.errors import CheckpointError, ConfigError
from purelm.nn import decode, decoder, lora, loss, plan, tree
from purelm.quant.nf4 import NF4

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
# Projections that transformers' modules have too: Granite's others lie in matrices of several.
TARGETS = {
    "lfm2": ["q_proj", "out_proj", "in_proj", "w1", "w2", "w3"],
    "falcon_h1": "all-linear",
    "granitemoehybrid": ["q_proj", "o_proj", "in_proj", "out_proj"],
    "qwen3_next": ["q_proj", "o_proj", "in_proj_qkvz", "in_proj_ba", "out_proj"],
    "qwen3_5_text": "all-linear",
    "qwen3_5_moe_text": [
        "q_proj",
        "in_proj_qkv",
        "in_proj_z",
        "in_proj_a",
        "in_proj_b",
        "out_proj",
    ],
}
# Names of the projections of a recurrent mixer's input.
INPUTS = {
    "qwen3_next": {"qkv_gate", "beta_decay"},
    "qwen3_5_text": {"qkv", "gate", "beta", "decay"},
    "qwen3_5_moe_text": {"qkv", "gate", "beta", "decay"},
}
families = pytest.mark.parametrize("family", TARGETS)


@families
def test_adapters_in_peft(family: str, tmp_path: Path) -> None:
    """peft loads what was saved and computes the same; which modules it refuses is known."""
    hf = tiny.hf_model(family)
    folder = tiny.save(hf, tmp_path / "base")
    model = bridged.bridge(folder)
    peft_config.apply(model, r=4, lora_alpha=12, target_modules=TARGETS[family]).eval()
    bridged.spread_trained(model)
    for name in INPUTS.get(family, {"in"}):
        assert any(f".recurrent.{name}" in path for path, _ in tree.items(model.adapters))
    model.save_pretrained(tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(hf), tmp_path / "adapter").eval()
    with torch.no_grad():
        bridged.same_logits(model(bridged.ids()).logits, theirs(bridged.ids()).logits)
    own = {name.rpartition(".")[2] for name, _ in hf.named_modules()}
    for name in {"in_proj", "out_proj"} & own:
        config = peft.LoraConfig(target_modules=[name])
        try:
            peft.get_peft_model(copy.deepcopy(hf), config)
            refused = False
        except ValueError as problem:
            refused = "incompatible" in str(problem)
        assert refused == (name in model.origin.family.names.peft_refuses)


def test_what_adapters_leave_out_is_said(tmp_path: Path) -> None:
    folder = tiny.save(tiny.hf_model("falcon_h1"), tmp_path / "base")
    model = peft_config.apply(bridged.bridge(folder), r=4)
    assert any("leaves in_proj without adapters" in note for note in model.origin.notes)
    model = peft_config.apply(bridged.bridge(folder), r=4, target_modules=["out_proj"])
    assert any("no adapters on out_proj" in note for note in model.origin.notes)


@families
def test_generates_as_transformers_over_its_cache(family: str, tmp_path: Path) -> None:
    hf = tiny.hf_model(family)
    model = bridged.bridge(tiny.save(hf, tmp_path / "model"))
    ids, mask = bridged.ids(length=9), torch.ones(2, 9, dtype=torch.int64)
    mask[0, :7] = 0  # fewer tokens than a convolution sees
    ours = model.generate(ids, mask, max_new_tokens=12, do_sample=False, eos_token_id=[])
    want = hf.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert torch.equal(ours[:, 9:], want[:, 9:])
    assert decode.waits_for(model.params, model.spec) is None


@families
def test_only_projections_are_quantized(family: str, tmp_path: Path) -> None:
    """Convolutions, steps, decays, skips and norms stay as they are stored."""
    folder = tiny.save(tiny.hf_model(family), tmp_path / "model")
    model = bridged.bridge(folder, quantize="nf4")
    mixers = [(path, leaf) for path, leaf in tree.items(model.params) if ".recurrent." in path]
    packed = {path.split(".")[-2] for path, leaf in mixers if isinstance(leaf, NF4)}
    assert packed == INPUTS.get(family, {"in"}) | {"out"} and len(mixers) > 2 * sum(
        layer.recurrent is not None for layer in model.spec.layers
    )


@families
def test_transforms_and_plans(family: str, tmp_path: Path) -> None:
    """Gradients row by row at once, and a memory plan that fits its budget."""
    model = bridged.bridge(tiny.save(tiny.hf_model(family), tmp_path / "model"))
    adapters = lora.init(model.spec, rank=2, generator=torch.Generator().manual_seed(1))

    def one(adapters: Any, row: torch.Tensor) -> torch.Tensor:
        params = tree.map(torch.Tensor.detach, model.params)
        return loss.loss(params, model.spec, row[None], row[None], adapters=adapters)

    rows = bridged.ids(rows=3, length=7)
    every = tree.tensors(vmap(grad(one), (None, 0))(adapters, rows))
    for i, row in enumerate(rows):
        for ours, want in zip(every, tree.tensors(grad(one)(adapters, row)), strict=True):
            assert (ours[i] - want).norm() <= 1e-5 * want.norm()
    made = plan.plan(model.spec, plan.Shape(2, 512, 2), budget=2**28, fixed=0)
    assert 0 < made.peak <= 2**28
    longer = plan.plan(model.spec, plan.Shape(2, 1024, 2), budget=2**28, fixed=0)
    assert longer.peak > made.peak


@families
def test_bfloat16(family: str, tmp_path: Path) -> None:
    """As near to fp32 as transformers in bf16, whose convolutions and steps round more."""
    hf = tiny.hf_model(family)
    folder = tiny.save(hf, tmp_path / "model")
    exact = hf(bridged.ids()).logits
    model = bridged.bridge(folder, dtype=torch.bfloat16)
    ours = decoder.forward(model.params, model.spec, bridged.ids())
    theirs = hf.bfloat16()(bridged.ids()).logits
    assert ours.dtype == torch.bfloat16
    assert (ours - exact).norm() <= 2 * (theirs - exact).norm()


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("lfm2", {"full_attn_idxs": [3], "layer_types": None}, "full_attn_idxs"),
    ("lfm2", {"layer_types": ["conv", "conv", "mamba"]}, "layer_types has .*mamba"),
    ("lfm2", {"conv_dim": 7}, "conv_dim is 7"),
    ("lfm2", {"conv_L_cache": 0}, "conv_L_cache is 0"),
    ("falcon_h1", {"mamba_d_ssm": 66}, "do not make the mixer's 66"),
    ("falcon_h1", {"mamba_d_head": "wide"}, "mamba_d_head 'wide'"),
    ("falcon_h1", {"mamba_n_groups": 3}, "no multiple of mamba_n_groups 3"),
    ("falcon_h1", {"ssm_multipliers": [1.0, 2.0]}, "a list of 5 numbers"),
    ("falcon_h1", {"time_step_limit": [0.5, 0.1]}, "time_step_limit is 0.1"),
    ("falcon_h1", {"time_step_limit": 3.0}, "expected two numbers"),
    ("granitemoehybrid", {"normalization_function": "layernorm"}, "normalization_function"),
    ("granitemoehybrid", {"layer_types": ["conv"] * 3}, "layer_types has .*conv"),
    ("granitemoehybrid", {"num_experts_per_tok": 6}, "num_experts_per_tok is 6"),
    ("qwen3_next", {"linear_num_key_heads": 3}, "no multiple of linear_num_key_heads 3"),
    ("qwen3_next", {"layer_types": ["full_attention", "mamba", "conv"]}, "layer_types has .*conv"),
    ("qwen3_next", {"use_sliding_window": True}, "use_sliding_window is True"),
    ("qwen3_5_text", {"attn_output_gate": False}, "attn_output_gate is False"),
    ("qwen3_5_text", {"linear_conv_kernel_dim": 0}, "linear_conv_kernel_dim is 0"),
    ("qwen3_5_moe_text", {"num_experts_per_tok": 7}, "num_experts_per_tok is 7"),
]


@pytest.mark.parametrize(("family", "fields", "says"), WRONG)
def test_bad_configs(family: str, fields: dict[str, Any], says: str) -> None:
    good = json.loads(tiny.config(family).to_json_string())
    assert family_of(good).spec(good).layers
    bad = good | fields
    with pytest.raises(ConfigError, match=says):
        family_of(bad).spec(bad)


PUBLISHED = {
    "lfm2": {
        **{"block_dim": 48, "block_norm_eps": 1e-5, "block_use_swiglu": True},
        **{"block_mlp_init_scale": 1.0, "block_out_init_scale": 1.0},
        **{"block_use_xavier_init": True, "conv_use_xavier_init": True},
        **{"conv_dim": 48, "conv_dim_out": 48, "num_heads": 4, "use_pos_enc": True},
    },
    "falcon_h1": {
        **{"mamba_use_mlp": True, "mlp_expansion_factor": 8, "attn_layer_indices": None},
        **{"time_step_floor": 1e-4, "time_step_max": 0.1, "time_step_min": 0.001},
        **{"time_step_rank": 256, "num_logits_to_keep": 1},
    },
    "granitemoehybrid": {
        **{"layer_types": ["mamba", "attention", "mamba"], "init_method": "mup"},
        **{"normalization_function": "rmsnorm", "position_embedding_type": "nope"},
    },
    "qwen3_next": {"use_sliding_window": False, "full_attention_interval": 4},
    "qwen3_5_text": {
        **{"attn_output_gate": True, "mamba_ssm_dtype": "float32", "output_gate_type": "swish"},
        **{"mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": False},
    },
    "qwen3_5_moe_text": {"attn_output_gate": True, "mtp_num_hidden_layers": 1},
}


@families
def test_fields_that_published_files_have_beside(family: str) -> None:
    """They mean the model that their absence means."""
    good = json.loads(tiny.config(family).to_json_string())
    more = good | PUBLISHED[family]
    assert family_of(more).spec(more) == family_of(good).spec(good)


DELTA_NETS = pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"])


@DELTA_NETS
def test_attention_at_an_interval(family: str) -> None:
    """Where no layer_types say so, each fourth layer, or that of full_attention_interval."""
    given = json.loads(tiny.config(family, num_hidden_layers=9, layer_types=None).to_json_string())
    types = given.pop("layer_types")
    for interval, want in ((None, types), (3, (["linear_attention"] * 2 + ["full_attention"]) * 3)):
        found = family_of(given).spec({**given, "full_attention_interval": interval})
        assert found == family_of(given).spec({**given, "layer_types": want})
    assert [layer.attention is None for layer in found.layers] == [True, True, False] * 3


@DELTA_NETS
def test_layers_that_predict_further_tokens_are_left_out(family: str, tmp_path: Path) -> None:
    """Published checkpoints have a module `mtp` beside the model."""
    folder = tiny.save(tiny.hf_model(family), tmp_path / "model")
    want = bridged.bridge(folder)(bridged.ids()).logits
    tensors = load_file(folder / "model.safetensors")
    more = {name: torch.ones(4, 4) for name in ("mtp.fc.weight", "mtp.layers.0.mlp.gate.weight")}
    save_file({**tensors, **more}, folder / "model.safetensors", {"format": "pt"})
    assert torch.equal(bridged.bridge(folder)(bridged.ids()).logits, want)
    loaded = load_folder(folder, quantize=None, dtype=None, device=torch.device("cpu"))
    assert set(loaded.left_out) == set(more)
    save_file({**tensors, "mtq.fc.weight": torch.ones(1)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"mtq\.fc"):
        bridged.bridge(folder)
