"""Every family from its files to a merged model: 4 bits, adapters, training, generation."""

from pathlib import Path
from typing import Any

import bridged
import pytest
import tiny
import torch
import transformers
from family_cases import FAMILIES, LONGROPE, VARIANTS, name_of

from purelm.convert import peft_config
from purelm.convert.bridge import CausalLM
from purelm.convert.registry import FAMILIES as REGISTERED
from purelm.nn import decoder, lora, stacks, tree
from purelm.nn.residuals import RECOMPUTE
from purelm.quant.nf4 import NF4

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


MODELS = [*((family, {}) for family in FAMILIES), *VARIANTS]
# What takes seconds each and is made of the same parts as others.
LONG = """
    deepseek_v2 dots1 glm4_moe glm4_moe_lite granitemoe granitemoehybrid granitemoeshared lfm2_moe
    mixtral olmoe phimoe qwen3_5_moe_text qwen3_moe qwen3_next
""".split()
EVERY = [
    pytest.param(
        *model, id=name_of(model)[:40], marks=[pytest.mark.full] if model[0] in LONG else []
    )
    for model in MODELS
]


def trained(folder: Path) -> CausalLM:
    """The model in `folder` in NF4, with adapters of all that families have by default, after
    three steps in which its loss falls.
    """
    model = bridged.bridge(folder, quantize="nf4")
    leaves = tree.leaves(stacks.one_by_one(model.params))
    quantized = sum(isinstance(leaf, NF4) for leaf in leaves)
    assert quantized == sum(p.quantize for p in tree.leaves(stacks.each_spec(model.spec)))
    # The usual names are of attention and MLP, of which hybrids have others too.
    hybrid = any(layer.recurrent is not None for layer in model.spec.layers)
    targets = "all-linear" if hybrid else peft_config.DEFAULT_TARGETS
    model = peft_config.apply(model, r=4, lora_alpha=16, target_modules=targets)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    model.residuals, losses = RECOMPUTE, []
    for _ in range(4):
        loss = model.train()(bridged.ids(), labels=bridged.ids()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.95 * losses[0]
    assert "the recurrent mixer run again" not in model.explain()
    return model.eval()


@pytest.mark.parametrize(("family", "switches"), EVERY)
def test_journey(family: str, switches: dict[str, Any], tmp_path: Path) -> None:
    """Every family that there is, with no exception."""
    folder = tiny.save(tiny.hf_model(family, **switches), tmp_path / "base")
    model, ids = trained(folder), bridged.ids()
    out = model.generate(ids[:1, :7], max_new_tokens=5, do_sample=False, eos_token_id=[])
    for end in range(7, 12):  # as without a cache
        assert model(out[:, :end]).logits[0, -1].argmax() == out[0, end]
    # The adapter, on the same base read again.
    model.save_pretrained(tmp_path / "adapter")
    again = bridged.bridge(folder, quantize="nf4")
    again.load_adapter(str(tmp_path / "adapter"), "again")
    again.set_adapter("again", inference_mode=True)
    with torch.no_grad():
        bridged.same_logits(again(ids).logits, model(ids).logits)
    # The whole model in 16 bits, read by transformers and by us.
    model.save_pretrained_merged(tmp_path / "merged")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    base = bridged.bridge(folder)
    with torch.no_grad():
        want = decoder.forward(lora.merge(base.params, model.adapters), base.spec, ids)
        bridged.same_logits(theirs(ids).logits, want)
        bridged.same_logits(bridged.bridge(tmp_path / "merged")(ids).logits, want)


def test_every_family_makes_the_journey() -> None:
    assert {family for family, _ in MODELS} == set(REGISTERED)


@pytest.mark.parametrize("padded", [False, True])
def test_generating_past_the_turn_of_longrope(padded: bool, tmp_path: Path) -> None:
    """Where the frequencies change, the cache is made anew: every token is as without one."""
    switches = {"rope_parameters": LONGROPE, "original_max_position_embeddings": 16}
    folder = tiny.save(tiny.hf_model("phi3", **switches), tmp_path / "base")
    model = bridged.bridge(folder)
    prompt, mask = bridged.ids(length=12), torch.ones(2, 12, dtype=torch.int64)
    mask[0, :4] = 1 - int(padded)
    out = model.generate(prompt, mask, max_new_tokens=10, do_sample=False, eos_token_id=[])
    assert not torch.equal(model(out[1:, :17]).logits[0, 3], model(out[1:, :16]).logits[0, 3])
    for end in range(12, 22):
        seen = torch.cat([mask, torch.ones(2, end - 12, dtype=torch.int64)], 1)
        logits = model(out[:, :end], attention_mask=seen).logits[:, -1]
        assert torch.equal(logits.argmax(-1), out[:, end])
