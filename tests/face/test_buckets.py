"""Packed rows filled up to a bucket: few shapes, and the loss and gradients of the rows alone."""

from itertools import accumulate
from pathlib import Path
from typing import Any

import folders
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from purelm import FastLanguageModel
from purelm.buckets import bucket_for, filled
from purelm.graphed import value_of
from purelm.nn import layout
from purelm.nn.residuals import RECOMPUTE
from purelm.rows import Row, pack

lengths = st.lists(st.integers(1, 700), min_size=1, max_size=40)


def ends(of: list[int]) -> torch.Tensor:
    return torch.tensor([0, *accumulate(of)], dtype=torch.int32)


@given(lengths)
def test_a_bucket_holds_its_row(of: list[int]) -> None:
    bucket, total = bucket_for(ends(of)), sum(of)
    assert total <= bucket.tokens <= max(total + 127, total * 1.25)
    ids = torch.arange(1, total + 1)[None]
    made = filled(ids, ids, ends(of), bucket)
    cu = made["cu_seqlens"]
    assert cu.dtype == torch.int32 and cu.shape == (bucket.documents + 1,)
    assert made["input_ids"].shape == made["labels"].shape == (1, bucket.tokens)
    assert torch.equal(cu[: len(of) + 1], ends(of)) and cu[-1] == bucket.tokens
    assert 0 <= cu.diff().min() and cu.diff().max() <= max(of) <= bucket.longest
    assert torch.equal(made["input_ids"][:, :total], ids)
    assert (made["labels"][:, total:] == -100).all()


@given(st.integers(1, 40), st.data())
@settings(max_examples=20)
def test_few_shapes_for_many_batches(documents: int, data: Any) -> None:
    """All sums from 1024 to 8192 have 12 sizes."""
    found = set()
    for total in range(1024, 8193, 41):
        cuts = sorted(data.draw(st.permutations(range(1, 9)), label="cuts")[:3])
        of = [max(1, total * c // 40) for c in cuts]
        of.append(total - sum(of))
        found.add(bucket_for(ends(of)).tokens)
    assert len(found) <= 13


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    folders.whole(path)
    return path


@pytest.mark.parametrize("of", [[5, 3, 9], [7], [30, 2], [60, 60]])
def test_what_is_captured_is_the_rows_own_step(folder: Path, of: list[int]) -> None:
    model, _ = FastLanguageModel.from_pretrained(str(folder), dtype=torch.float32, device_map="cpu")
    model = FastLanguageModel.get_peft_model(model, r=4, init_lora_weights="gaussian").train()
    trained = [p for p in model.parameters() if p.requires_grad]
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in trained:
            p.normal_(0, 0.1, generator=g)
    drawn = [torch.randint(4, 290, (n + 1,), generator=g).tolist() for n in of]
    batch = pack([Row(tuple(ids), (-100, *ids[1:])) for ids in drawn])
    count = torch.tensor(7.0)
    value = model(**batch, num_items_in_batch=count).loss
    want = [value, *torch.autograd.grad(value, trained)]
    bucket = bucket_for(batch["cu_seqlens"])
    made = filled(batch["input_ids"], batch["labels"], batch["cu_seqlens"], bucket)
    rows = layout.from_cu_seqlens(made["cu_seqlens"], bucket.tokens, bucket.longest)
    more: Any = {"count": count, "residuals": RECOMPUTE}
    value = value_of(model, made["input_ids"], made["labels"], rows, **more)
    got = [value, *torch.autograd.grad(value, trained)]
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()
