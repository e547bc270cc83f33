"""Every family from its files to a merged model: 4 bits, adapters, training, generation."""

from pathlib import Path

import bridged
import pytest
import tiny
import torch
import transformers
from family_cases import FAMILIES, LONGROPE

from purelm.convert import peft_config
from purelm.nn import decoder, lora, stacks, tree
from purelm.nn.residuals import RECOMPUTE
from purelm.quant.nf4 import NF4

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


@pytest.mark.parametrize("family", FAMILIES)
def test_journey(family: str, tmp_path: Path) -> None:
    folder = tiny.save(tiny.hf_model(family), tmp_path / "base")
    model = bridged.bridge(folder, quantize="nf4")
    leaves = tree.leaves(stacks.one_by_one(model.params))
    quantized = sum(isinstance(leaf, NF4) for leaf in leaves)
    assert quantized == sum(p.quantize for p in tree.leaves(stacks.each_spec(model.spec)))
    # The usual names are of attention and MLP, of which hybrids have others too.
    hybrid = any(layer.recurrent is not None for layer in model.spec.layers)
    targets = "all-linear" if hybrid else peft_config.DEFAULT_TARGETS
    model = peft_config.apply(model, r=4, lora_alpha=16, target_modules=targets)
    ids = bridged.ids()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.residuals = RECOMPUTE
    losses = []
    for _ in range(6):
        loss = model.train()(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    # What no fast path covers is said.
    assert ("mixers other than attention" in model.explain()) == hybrid
    model.eval()
    out = model.generate(ids[:1, :7], max_new_tokens=5, do_sample=False, eos_token_id=[])
    for end in range(7, 12):  # as without a cache
        assert model(out[:, :end]).logits[0, -1].argmax() == out[0, end]
    model.save_pretrained(tmp_path / "adapter")
    model.save_pretrained_merged(tmp_path / "merged")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    base = bridged.bridge(folder)
    want = decoder.forward(lora.merge(base.params, model.adapters), base.spec, ids).detach()
    bridged.same_logits(theirs(ids).logits.detach(), want)


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
