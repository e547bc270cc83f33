"""The torch bridge: transformers' losses and gradients, one tree behind it, and what it refuses."""

import copy
import gc
import resource
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from bridged import bridge, ids, same_logits, spread_trained

from purelm import FastLanguageModel
from purelm.convert.batch import layout_of
from purelm.convert.bridge import CausalLM
from purelm.errors import ArgumentError, InputError
from purelm.nn import decoder, layout, loss, tree
from purelm.nn.residuals import KEEP, OFFLOAD, RECOMPUTE
from purelm.quant.nf4 import NF4

IGNORE = -100


@pytest.fixture(scope="module")
def hf() -> Any:
    return tiny.hf_model("llama")


@pytest.fixture(scope="module")
def folder(hf: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(hf, tmp_path_factory.mktemp("bridge"))


def adapted(folder: Path, *, quantize: Any = None, dtype: Any = torch.float32, **lora: Any) -> Any:
    model = bridge(folder, quantize=quantize, dtype=dtype)
    model = FastLanguageModel.get_peft_model(model, **{"r": 4, **lora})
    spread_trained(model)
    return model


def padded(lengths: tuple[int, ...], side: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows of these lengths as (input_ids, attention_mask, labels), padded on one side."""
    width = max(lengths)
    rows, masks = [], []
    for i, n in enumerate(lengths):
        place = (width - n, 0) if side == "left" else (0, width - n)
        rows.append(torch.nn.functional.pad(ids(10 + i, 1, n), place))
        masks.append(torch.nn.functional.pad(torch.ones(1, n, dtype=torch.long), place))
    tokens, mask = torch.cat(rows), torch.cat(masks)
    return tokens, mask, tokens.masked_fill(mask == 0, IGNORE)


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=0)


# Losses and logits.


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("items", [None, 7, torch.tensor(40)])
def test_loss(folder: Path, hf: Any, side: str, items: Any) -> None:
    tokens, mask, labels = padded((5, 17, 11), side)
    labels[1, 3:8] = IGNORE
    # transformers would also predict a row's first token from the padding before it.
    labels[mask.cumsum(-1) == 1] = IGNORE
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    model = bridge(folder)
    ours = model(tokens, attention_mask=mask, labels=labels, num_items_in_batch=items)
    theirs = hf(
        tokens,
        attention_mask=mask,
        position_ids=positions,
        labels=labels,
        num_items_in_batch=items,
    )
    close(ours.loss, theirs.loss)
    same_logits(ours.logits[mask == 1].detach(), theirs.logits[mask == 1].detach())


def test_loss_does_not_know_the_side_of_the_padding(folder: Path) -> None:
    """A row's first token is predicted by nothing, whatever stands before it."""
    model, losses = bridge(folder), []
    for side in ("left", "right"):
        tokens, mask, labels = padded((5, 17, 11), side)
        losses.append(model(tokens, attention_mask=mask, labels=labels).loss)
    close(*losses)


@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_beside_a_mask(folder: Path, side: str) -> None:
    """What trainers pass: plain, shifted or HF's own positions, the padding said by the mask."""
    tokens, mask, labels = padded((5, 17, 11), side)
    model = bridge(folder)
    want = model(tokens, attention_mask=mask, labels=labels)
    hfs = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    for positions in (hfs, torch.arange(17)[None], torch.arange(17).expand(3, 17)):
        got = model(tokens, attention_mask=mask, position_ids=positions, labels=labels)
        torch.testing.assert_close(got.logits[mask == 1], want.logits[mask == 1])
        torch.testing.assert_close(got.loss, want.loss)


def test_padding_wider_than_the_context(folder: Path) -> None:
    """Rows count, not the width of the batch."""
    model, row = bridge(folder), ids(3, 1, 40)
    mask = torch.nn.functional.pad(torch.ones_like(row), (30, 0))
    wide = torch.nn.functional.pad(row, (30, 0))
    torch.testing.assert_close(model(wide, attention_mask=mask).logits[:, 30:], model(row).logits)


def test_packed_documents(folder: Path) -> None:
    model = bridge(folder)
    one, two = ids(1, 1, 9), ids(2, 1, 14)
    row, ends = torch.cat([one, two], 1), torch.tensor([0, 9, 23])
    packed = model(row, labels=row, cu_seqlens=ends)
    total = model(one, labels=one).loss * 8 + model(two, labels=two).loss * 13
    close(packed.loss, total / 21)
    same_logits(packed.logits, torch.cat([model(one).logits, model(two).logits], 1))
    again = model(
        row, labels=row, position_ids=torch.cat([torch.arange(9), torch.arange(14)])[None]
    )
    assert torch.equal(again.loss, packed.loss)


def test_position_ids_say_which_documents_a_packed_row_holds(folder: Path) -> None:
    """So that rows without padding from other libraries' collators run fused too."""
    spec, cpu = bridge(folder).spec, torch.device("cpu")
    lengths = (9, 1, 14)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    found = layout_of(ids(1, 1, 24), spec, cpu, position_ids=positions)
    want = layout_of(ids(1, 1, 24), spec, cpu, cu_seqlens=torch.tensor([0, 9, 10, 24]))
    assert found.documents is not None and want.documents is not None
    assert torch.equal(found.documents.cu_seqlens, want.documents.cu_seqlens)
    assert found.documents.longest == want.documents.longest == 14
    assert torch.equal(found.positions, want.positions)
    assert torch.equal(found.segments, want.segments)
    # Positions that do not count on, or do not begin, are no documents.
    for odd in (positions + 1, positions * 2):
        assert layout_of(ids(1, 1, 24), spec, cpu, position_ids=odd).documents is None


def test_accumulation(folder: Path) -> None:
    """The gradients of n small batches with the count of all are one large batch's."""
    tokens, mask, labels = padded((5, 17, 11, 8), "right")
    count = int((labels[:, 1:] != IGNORE).sum())
    large = adapted(folder)
    want = large(tokens, attention_mask=mask, labels=labels).loss
    want.backward()
    small, total = adapted(folder), 0.0
    for rows in (slice(0, 1), slice(1, 2), slice(2, 4)):
        got = small(
            tokens[rows],
            attention_mask=mask[rows],
            labels=labels[rows],
            num_items_in_batch=count,
        ).loss
        got.backward()
        total += got.detach()
    close(total, want.detach())
    for (name, one), other in zip(gradients(large).items(), gradients(small).values(), strict=True):
        assert (one - other).norm() <= 1e-5 * one.norm(), name


def test_output(folder: Path) -> None:
    """Logits wait until they are read, then stay, and carry gradients."""
    model = adapted(folder)
    out = model(ids(), labels=ids())
    assert out._logits is None
    assert out.logits is out.logits and out.logits.shape == (2, 23, 99)
    assert out["loss"] is out.loss is out[0] and out["logits"] is out[1] is out[-1]
    assert out[:2] == (out.loss, out.logits) == out.to_tuple() and out[1:] == (out.logits,)
    assert list(out) == out.keys() == ["loss", "logits"] and len(out) == 2 and "loss" in out
    assert dict(out) == dict(out.items()) and out.get("attentions") is None
    with pytest.raises(KeyError):
        out["hidden_states"]
    bare = model(ids())
    assert bare.loss is None and list(bare) == ["logits"] and "loss" not in bare
    assert bare[0] is bare.logits
    bare.logits.square().mean().backward()
    assert all(grad.abs().max() > 0 for grad in gradients(model).values())
    with torch.no_grad():
        assert not model(ids()).logits.requires_grad


# Gradients.


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_the_functional_gradient_is_the_bridges(folder: Path, quantize: Any) -> None:
    model = adapted(folder, quantize=quantize)
    tokens, mask, labels = padded((5, 17), "left")
    out = model(tokens, attention_mask=mask, labels=labels).loss
    out.backward()
    adapters = tree.map(lambda leaf: leaf, model.adapters)

    def loss_fn(adapters: Any) -> torch.Tensor:
        return loss.loss(
            model.params,
            model.spec,
            tokens,
            labels,
            layout=layout.from_mask(mask),
            adapters=adapters,
        )

    grads, value = torch.func.grad_and_value(loss_fn)(adapters)
    torch.testing.assert_close(value, out, rtol=1e-6, atol=0)
    found = dict(tree.items(grads))
    for path, leaf in tree.items(model.adapters):
        for mine, theirs in ((leaf.a, found[path].a), (leaf.b, found[path].b)):
            assert (mine.grad - theirs).norm() <= 1e-5 * theirs.norm(), path
    assert len(found) == 21


def test_residual_policies_agree_to_the_bit(folder: Path) -> None:
    """What is kept, sent away or computed again changes no gradient."""
    for dtype in (torch.float32, torch.bfloat16):
        found = []
        for residuals in (KEEP, RECOMPUTE, OFFLOAD):
            model = adapted(folder, quantize="nf4", dtype=dtype)
            model.residuals = residuals
            out = model(ids(), labels=ids()).loss
            out.backward()
            found.append((out, gradients(model)))
        for value, grads in found[1:]:
            assert torch.equal(value, found[0][0])
            assert all(torch.equal(grads[name], g) for name, g in found[0][1].items())


def test_gradient_checkpointing_by_hfs_names(folder: Path) -> None:
    model = bridge(folder)
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert model.is_gradient_checkpointing
    assert not model.for_training(False).is_gradient_checkpointing
    assert model.for_training("unsloth").is_gradient_checkpointing and model.training
    assert not model.for_inference().training
    with pytest.raises(ArgumentError, match="unslotht"):
        model.for_training("unslotht")


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "apart"])
def test_full_finetuning_has_transformers_gradients(
    family: str, tied: bool, tmp_path: Path
) -> None:
    hf = tiny.hf_model(family, tie_word_embeddings=tied)
    model = bridge(tiny.save(hf, tmp_path), train_all=True).train()
    out = model(ids(), labels=ids())
    theirs = hf(ids(), labels=ids())
    out.loss.backward()
    theirs.loss.backward()
    ours, want = dict(model.named_parameters()), dict(hf.named_parameters())
    assert ours.keys() == want.keys() and all(p.requires_grad for p in ours.values())
    for name, p in want.items():
        assert (ours[name].grad - p.grad).norm() <= 1e-5 * p.grad.norm(), name
    assert (
        model.num_parameters() == model.num_parameters(only_trainable=True) == hf.num_parameters()
    )


# The Module: names, states, moves.


def test_names(folder: Path) -> None:
    model = adapted(folder, quantize="nf4")
    names = dict(model.named_parameters())
    layer = "model.layers.0.self_attn.q_proj."
    assert {"model.embed_tokens.weight", layer + "weight", layer + "weight_absmax"} < names.keys()
    trained = {name for name, p in names.items() if p.requires_grad}
    assert trained == {
        f"model.layers.{i}.{module}.lora_{ab}.weight"
        for i in range(3)
        for module in (
            *(f"self_attn.{n}_proj" for n in "qkvo"),
            *(f"mlp.{n}_proj" for n in ("gate", "up", "down")),
        )
        for ab in "AB"
    }
    assert model.get_nb_trainable_parameters()[0] == sum(names[n].numel() for n in trained)
    assert (
        model.num_parameters() - model.num_parameters(True)
        == tiny.hf_model("llama").num_parameters()
    )


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_trainable_parameters_in_pefts_words(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import peft

    adapted(folder).print_trainable_parameters()
    ours = capsys.readouterr().out
    config = peft.LoraConfig(r=4, target_modules="all-linear")
    peft.get_peft_model(tiny.hf_model("llama"), config).print_trainable_parameters()
    assert ours == capsys.readouterr().out


def test_state_dict_is_what_is_trained(folder: Path) -> None:
    model = adapted(folder, quantize="nf4")
    state = model.state_dict()
    assert state.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    other = FastLanguageModel.get_peft_model(bridge(folder, quantize="nf4"), r=4, random_state=1)
    assert not torch.equal(other(ids()).logits, model(ids()).logits)
    other.load_state_dict(state)
    assert torch.equal(other(ids()).logits, model(ids()).logits)
    first = next(iter(state))
    with pytest.raises(ArgumentError, match=first):
        other.load_state_dict({n: t for n, t in state.items() if n != first})
    with pytest.raises(ArgumentError, match="stranger"):
        other.load_state_dict({**state, "stranger": torch.ones(1)})
    with pytest.raises(ArgumentError, match="assign"):
        other.load_state_dict(state, assign=True)


def test_state_dict_inside_another_module(folder: Path) -> None:
    """A parent's dict keeps what its other children put there."""
    model = adapted(folder)
    parent = torch.nn.Module()
    parent.before, parent.model, parent.after = (
        torch.nn.Linear(2, 2),
        model,
        torch.nn.BatchNorm1d(2),
    )
    own = {f"model.{name}" for name in model.state_dict()}
    others = {f"before.{n}" for n in parent.before.state_dict()}
    others |= {f"after.{n}" for n in parent.after.state_dict()}
    assert parent.state_dict().keys() == own | others


def test_to(folder: Path) -> None:
    """A move keeps every dtype; the dtype itself is chosen when loading."""
    model = adapted(folder, quantize="nf4", dtype=torch.bfloat16)
    before = {n: (p.dtype, p.clone()) for n, p in model.named_parameters()}
    assert model.to("cpu") is model and model.to(torch.bfloat16) is model
    assert model.to(device="cpu", dtype=torch.bfloat16) is model.bfloat16()
    for name, p in model.named_parameters():
        dtype, value = before[name]
        assert p.dtype == dtype and torch.equal(p, value), name
    for change in (model.half, model.float, model.double, lambda: model.to(torch.float16)):
        with pytest.raises(ArgumentError, match="dtype"):
            change()
    assert {p.dtype for p in model.state_dict().values()} == {torch.float32}
    stats = [leaf for leaf in tree.leaves(model.params) if isinstance(leaf, NF4)]
    assert {leaf.absmax_scale.dtype for leaf in stats} == {torch.float32}
    assert model.dtype == torch.bfloat16 and model.device == torch.device("cpu")


def test_the_tree_and_the_module_are_one(folder: Path) -> None:
    """A step on `parameters()` shows in the trees, also after a move."""
    model = adapted(folder).to("cpu")
    trained = [p for p in model.parameters() if p.requires_grad]
    before = [leaf.a.clone() for leaf in tree.leaves(model.adapters)]
    optimizer = torch.optim.AdamW(trained, lr=0.1)
    model(ids(), labels=ids()).loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    assert norm > 0.5
    clipped = torch.cat([p.grad.flatten() for p in trained]).norm()
    torch.testing.assert_close(clipped, torch.tensor(0.5), rtol=1e-4, atol=0)
    optimizer.step()
    after = [leaf.a for leaf in tree.leaves(model.adapters)]
    assert all(not torch.equal(x, y) for x, y in zip(before, after, strict=True))
    assert {id(leaf) for leaf in after} < {id(p) for p in trained}


def test_deepcopy(folder: Path) -> None:
    model = adapted(folder, quantize="nf4")
    other = copy.deepcopy(model)
    want = model(ids()).logits
    assert torch.equal(other(ids()).logits, want)
    spread_trained(other, seed=8)
    assert torch.equal(model(ids()).logits, want)
    assert not torch.equal(other(ids()).logits, want)
    ours = {p.data_ptr() for p in model.parameters()}
    assert not ours & {p.data_ptr() for p in other.parameters()}
    tensors = {id(t) for t in tree.tensors(other.params)}
    assert tensors <= {id(p) for p in other.parameters()}


def test_two_models_side_by_side(folder: Path, tmp_path: Path) -> None:
    """Different families, formats, dtypes and policies in one process, in any order of use."""
    other = tiny.save(tiny.hf_model("qwen3", rope_parameters={"rope_theta": 50.0}), tmp_path)

    def first() -> CausalLM:
        return adapted(folder, quantize="nf4", lora_dropout=0.5).train()

    def second() -> CausalLM:
        model = adapted(other, r=8, dtype=torch.bfloat16).train()
        model.gradient_checkpointing_disable()
        return model

    def step(model: CausalLM) -> torch.Tensor:
        out = model(ids(), labels=ids()).loss
        out.backward()
        return out.detach()

    alone = [step(first()), step(second())]
    one, two = first(), second()
    outputs = [m(ids(), labels=ids()).loss for m in (one, two)]
    for out in reversed(outputs):
        out.backward()
    assert [out.item() for out in outputs] == [a.item() for a in alone]


def test_inputs_and_frozen_weights_stay(folder: Path) -> None:
    model = adapted(folder, quantize="nf4")
    tokens, mask, labels = padded((5, 17), "left")
    given = [t.clone() for t in (tokens, mask, labels)]
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    losses = []
    for _ in range(2):
        out = model(tokens, attention_mask=mask, labels=labels).loss
        out.backward()
        losses.append(out.detach())
    assert torch.equal(*losses)
    assert all(torch.equal(x, y) for x, y in zip((tokens, mask, labels), given, strict=True))
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


def test_memory_stays_constant(folder: Path) -> None:
    model = adapted(folder, quantize="nf4")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)

    def steps(n: int) -> None:
        for _ in range(n):
            model(ids(1, 1, 5), labels=ids(1, 1, 5)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())

    steps(5)
    count, memory = tensors(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    steps(100)
    assert tensors() <= count
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 8 * 1024  # KiB


# Dropout.


def test_dropout(folder: Path) -> None:
    """Drawn from (seed, step): other in each step, repeatable, absent outside of training."""
    model = adapted(folder, lora_dropout=0.3)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first, second = model(ids()).logits, model(ids()).logits
    assert not torch.equal(first, second)
    model.dropout_step = 0
    assert torch.equal(model(ids()).logits, first) and torch.equal(model(ids()).logits, second)
    model.dropout_step, model.dropout_seed = 0, 1
    assert not torch.equal(model(ids()).logits, first)
    assert torch.equal(torch.get_rng_state(), state)
    plain = adapted(folder).eval()(ids()).logits
    assert torch.equal(model.eval()(ids()).logits, plain)
    model.train()
    kwargs = {"max_new_tokens": 4, "do_sample": False}
    want = adapted(folder).eval().generate(ids(1, 1, 5), **kwargs)
    assert torch.equal(model.generate(ids(1, 1, 5), **kwargs), want)


def test_dropout_repeats_itself_in_backward(folder: Path) -> None:
    found = []
    for residuals in (KEEP, RECOMPUTE, OFFLOAD):
        model = adapted(folder, lora_dropout=0.3)
        model.residuals = residuals
        model(ids(), labels=ids()).loss.backward()
        found.append(gradients(model))
    for grads in found[1:]:
        assert all(torch.equal(grads[name], g) for name, g in found[0].items())


# What is refused.

BAD_BATCHES: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({"input_ids": None}, "input_ids"),
    "a list": ({"input_ids": [[1, 2]]}, "list"),
    "one row": ({"input_ids": ids()[0]}, r"\(23,\)"),
    "no tokens": ({"input_ids": ids()[:, :0]}, r"\(2, 0\)"),
    "floats": ({"input_ids": ids().float()}, "float32"),
    "an id too high": ({"input_ids": ids() + 60}, "0..98"),
    "an id below 0": ({"input_ids": ids() - 99}, "vocabulary"),
    "a row too long": ({"input_ids": ids(1, 1, 65)}, "65 tokens .* 64"),
    "labels of another shape": ({"labels": ids()[:, 1:]}, r"\(2, 22\)"),
    "labels all ignored": ({"labels": torch.full((2, 23), IGNORE)}, "learn"),
    "labels only first": (
        {"labels": torch.full((2, 23), IGNORE).index_fill(1, torch.tensor(0), 5)},
        "learn",
    ),
    "a label too high": ({"labels": ids() + 60}, "labels lie in"),
    "a label of -1": ({"labels": torch.full((2, 23), -1)}, "labels lie in -1"),
    "float labels": ({"labels": ids().float()}, "float32"),
    "no items": ({"labels": ids(), "num_items_in_batch": 0}, "num_items_in_batch"),
    "a mask of another shape": ({"attention_mask": torch.ones(2, 22)}, "attention_mask"),
    "a mask of four axes": ({"attention_mask": torch.ones(2, 1, 23, 23)}, "attention_mask"),
    "positions of another shape": ({"position_ids": torch.arange(22)[None]}, "position_ids"),
    "positions below 0": ({"position_ids": torch.arange(-1, 22)[None]}, "below 0"),
    "positions beyond": ({"position_ids": torch.arange(50, 73)[None]}, "73 tokens"),
    "float positions": ({"position_ids": torch.arange(23.0)[None]}, "position_ids"),
    "packed rows": ({"cu_seqlens": torch.tensor([0, 23])}, "one packed row"),
}
BAD_ENDS = [[1, 23], [0, 24], [0, 9, 5, 23], [0], []]


@pytest.mark.parametrize("name", BAD_BATCHES)
def test_bad_batches(folder: Path, name: str) -> None:
    batch, match = BAD_BATCHES[name]
    model = bridge(folder)
    with pytest.raises(InputError, match=match):
        model(**{"input_ids": ids(), **batch})


@pytest.mark.parametrize("ends", BAD_ENDS, ids=str)
def test_bad_ends_of_documents(folder: Path, ends: list[int]) -> None:
    with pytest.raises(InputError, match="cu_seqlens"):
        bridge(folder)(ids(1, 1, 23), cu_seqlens=torch.tensor(ends, dtype=torch.long))


def test_unknown_keyword(folder: Path) -> None:
    with pytest.raises(TypeError, match="input_idz"):
        bridge(folder)(input_idz=ids())


# What it says of itself.


def test_reports(folder: Path) -> None:
    dense, four, whole = (
        adapted(folder, dtype=torch.bfloat16, lora_alpha=8),
        bridge(folder, quantize="nf4"),
        bridge(folder, train_all=True),
    )
    lines = dict(line.split(": ", 1) for line in dense.explain().splitlines())
    assert "bfloat16" in lines["layers.0.attn.q"] and "LoRA r=4 scale=2" in lines["layers.0.attn.q"]
    assert "LoRA" not in lines["head"] and "backward" in lines
    lines = dict(line.split(": ", 1) for line in four.explain().splitlines())
    assert lines["layers.2.mlp.down"].startswith("NF4") and "NF4" not in lines["embed"]
    assert "21 of 30 weights in NF4" in four.report() and "float32" in four.report()
    assert str(folder) in four.report() and "llama, 3 layers" in four.report()
    assert all("trained" in line for line in whole.explain().splitlines()[:-1])
    assert "trained" not in four.explain() and "0 of 30" in whole.report()


def test_embeddings_by_hfs_names(folder: Path) -> None:
    model = bridge(folder)
    assert model.get_input_embeddings().weight is model.params["embed"]["weight"]
    assert model.get_output_embeddings().weight is model.params["head"]["weight"]
    with torch.no_grad():
        logits = decoder.forward(model.params, model.spec, ids())
    assert torch.equal(logits, model(ids()).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_autocast_changes_nothing(folder: Path, dtype: torch.dtype) -> None:
    """Trainers run models under autocast; ours computes in its own dtypes all the same."""
    model = adapted(folder, dtype=dtype).train()
    batch = ids(1, 2, 9)
    found = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            output = model(batch, labels=batch)
            logits = output.logits
        output.loss.backward()
        found.append([output.loss, logits, *gradients(model).values()])
    assert found[0][1].dtype == dtype
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
