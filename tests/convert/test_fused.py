"""Stored matrices that are several projections: taken apart, put together, or refused."""

from pathlib import Path
from typing import Any

import bridged
import pytest
import tiny
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from live_bytes import LiveBytes
from safetensors.torch import load_file, save_file

from purelm.convert import peft_config
from purelm.convert.fused import Fused
from purelm.convert.merge_tensor import Parts, changed, check_changed
from purelm.errors import CheckpointError, SaveError
from purelm.nn import decoder, lora, tree

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
QKV = "model.layers.1.self_attn.qkv_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.save(tiny.hf_model("phi3"), tmp_path / "base")


def adapted(folder: Path, **arguments: Any) -> Any:
    model = bridged.bridge(folder)
    peft_config.apply(model, **{"r": 4, "lora_alpha": 12, **arguments}).eval()
    bridged.spread_trained(model)
    return model


def test_the_parts_lie_above_each_other(folder: Path) -> None:
    model = bridged.bridge(folder)
    stored = load_file(folder / "model.safetensors")[QKV]
    attn = model.params["layers"][1]["attn"]
    assert torch.equal(torch.cat([attn[n]["weight"] for n in "qkv"]), stored)
    storages = {attn[n]["weight"].untyped_storage().data_ptr() for n in "qkv"}
    assert len(storages) == 3


@pytest.mark.parametrize("targets", [["q_proj", "v_proj", "up_proj"], ["k_proj"], "all-linear"])
def test_merged(folder: Path, targets: Any, tmp_path: Path) -> None:
    """transformers runs the merged file, fused as it was, with our logits."""
    model = adapted(folder, target_modules=targets)
    model.save_pretrained_merged(tmp_path / "merged")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    ids = bridged.ids()
    want = decoder.forward(lora.merge(model.params, model.adapters), model.spec, ids).detach()
    assert not torch.allclose(want, bridged.bridge(folder)(ids).logits)
    bridged.same_logits(theirs(ids).logits.detach(), want)
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "merged"))
    assert before.keys() == after.keys()
    if targets == ["k_proj"]:
        same = [torch.equal(*rows) for rows in zip(before[QKV], after[QKV], strict=True)]
        assert same == [True] * 48 + [False] * 24 + [True] * 24


def test_full_fine_tuning(folder: Path, tmp_path: Path) -> None:
    model = bridged.bridge(folder, train_all=True)
    bridged.spread_trained(model)
    model.save_pretrained(tmp_path / "saved")
    again = bridged.bridge(tmp_path / "saved")
    for path, leaf in tree.items(model.params):
        assert torch.equal(tree.at(again.params, path), leaf.detach()), path


def test_some_parts_trained_whole(folder: Path, tmp_path: Path) -> None:
    """The others stay, or have an adapter."""
    model = adapted(folder, target_modules=["k_proj"])
    whole = torch.randn(48, 48, generator=torch.Generator().manual_seed(3))
    copies = {"layers": [None, {"attn": {"q": {"weight": whole}}}, None]}
    model.set_adapters(model.adapters, copies)
    model.eval().save_pretrained_merged(tmp_path / "merged")
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "merged"))
    assert torch.equal(after[QKV][:48], whole)
    assert not (after[QKV][48:72] == before[QKV][48:72]).all(1).any()
    assert torch.equal(after[QKV][72:], before[QKV][72:])
    again = bridged.bridge(tmp_path / "merged")
    bridged.same_logits(again(bridged.ids()).logits, model(bridged.ids()).logits.detach())
    model.save_pretrained(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert torch.equal(saved[f"base_model.model.{QKV}"][72:], before[QKV][72:])


def test_not_finite(folder: Path, tmp_path: Path) -> None:
    model = adapted(folder, target_modules=["k_proj"])
    with torch.no_grad():
        tree.at(model.adapters, "layers.1.attn.k").b[3, 0] = float("nan")
    with pytest.raises(SaveError, match=r"layers\.1\.attn\.k\.weight in .*qkv_proj.* not finite"):
        model.save_pretrained_merged(tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@settings(deadline=None, max_examples=60)
@given(
    shares=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    groups=st.integers(1, 3),
    in_turn=st.booleans(),
    experts=st.integers(1, 4),
    row=st.sampled_from([(), (1,), (5,)]),
    turned=st.booleans(),
)
def test_parts_are_all_rows_each_once(
    shares: list[int], groups: int, in_turn: bool, experts: int, row: tuple[int, ...], turned: bool
) -> None:
    """Put together they come apart again, a stack [x, ...] or its transpose like one matrix."""
    if in_turn:  # of equal size, and not by head
        shares, groups = shares[:1] * len(shares), 1
    if experts > 1:
        groups = 1
    rows = tuple(share * groups for share in shares) * experts
    paths = tuple(f"{i}" for i in range(len(rows)))
    one = Fused("whole", paths, rows, row, groups, len(shares) if in_turn else 1)
    parts = [torch.randn(count, *row) for count in rows]
    whole = one.whole(parts)
    assert sorted(whole.flatten().tolist()) == sorted(
        x for p in parts for x in p.flatten().tolist()
    )
    shape = (experts, len(whole) // experts, *row) if experts > 1 else whole.shape
    stored = whole.view(shape)
    if turned and row:
        stored = stored.mT.contiguous().mT
    made = torch.empty_like(stored)
    for i, part in enumerate(parts):
        assert torch.equal(one.part(stored, i), part)
        one.put(made, i, part)
    assert torch.equal(made, stored)
    if not in_turn:  # each group has its share of every part, in order
        group = torch.cat([part[:share] for part, share in zip(parts, shares, strict=False)])
        assert torch.equal(whole[: len(group)], group)
    else:
        assert torch.equal(whole[: len(shares)], torch.stack([p[0] for p in parts[: len(shares)]]))


@pytest.mark.parametrize("turned", [False, True])
def test_a_stack_is_merged_expert_by_expert(turned: bool) -> None:
    """Beside the stacks and adapters never more than some experts' matrices are there at a time."""
    count, rows, width = 128, (12, 12), 40
    paths = tuple(f"experts.{i}.{part}" for i in range(count) for part in ("gate", "up"))
    whole = Fused("stack", paths, rows * count, (width,), turns=2 if turned else 1)
    g = torch.Generator().manual_seed(0)
    leaves = tuple(
        lora.LoRA(torch.randn(2, width, generator=g), torch.randn(12, 2, generator=g), 0.5)
        for _ in paths
    )
    shape = (count, width, 24) if turned else (count, 24, width)
    base = torch.randn(shape, generator=g)
    before, change = base.clone(), Parts(whole, leaves, turned)
    with LiveBytes() as live:
        changed(base, change, "stack")
        check_changed(before, base, change, "stack")
    adapters = sum(t.nbytes for t in tree.tensors(leaves))
    a_few = 16 * 8 * rows[0] * width  # in float64
    assert base.nbytes < live.most < 2 * base.nbytes + adapters + a_few
    assert a_few < base.nbytes / 6
    seen, was = (t.mT if turned else t for t in (base, before))
    for i, leaf in enumerate(leaves):
        assert torch.equal(whole.part(seen, i), lora.merged(whole.part(was, i), leaf))


def test_other_rows(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[QKV] = tensors[QKV][:-1].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"(?s)\[95, 48\].* 96 rows.*qkv_proj"):
        bridged.bridge(folder)
