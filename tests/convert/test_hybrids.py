"""Models with Mamba 2 or short convolutions: adapters in peft, generation, plans, bad configs."""

import copy
import json
from pathlib import Path
from typing import Any

import bridged
import peft
import pytest
import tiny
import torch
from torch.func import grad, vmap

from purelm.convert import peft_config
from purelm.convert.registry import family_of
from purelm.errors import ConfigError
from purelm.nn import decode, decoder, lora, loss, plan, tree
from purelm.quant.nf4 import NF4

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
# Projections that transformers' modules have too: Granite's others lie in matrices of several.
TARGETS = {
    "lfm2": ["q_proj", "out_proj", "in_proj", "w1", "w2", "w3"],
    "falcon_h1": "all-linear",
    "granitemoehybrid": ["q_proj", "o_proj", "in_proj", "out_proj"],
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
    assert any(".recurrent.in" in path for path, _ in tree.items(model.adapters))
    model.save_pretrained(tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(hf), tmp_path / "adapter").eval()
    with torch.no_grad():
        bridged.same_logits(model(bridged.ids()).logits, theirs(bridged.ids()).logits)
    for name in ("in_proj", "out_proj"):
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
    assert packed == {"in", "out"} and len(mixers) > 2 * sum(
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
}


@families
def test_fields_that_published_files_have_beside(family: str) -> None:
    """They mean the model that their absence means."""
    good = json.loads(tiny.config(family).to_json_string())
    more = good | PUBLISHED[family]
    assert family_of(more).spec(more) == family_of(good).spec(good)
