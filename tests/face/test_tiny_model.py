"""The embedded model and its instruction set: what their card says of them."""

from __future__ import annotations

import importlib
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ngram
import pytest
import torch

import purelm
from purelm import sft
from purelm.sft_options import embedded_options

ROOT = Path(__file__).parents[2]
DATA = ROOT / "src" / "purelm" / "data"
TINY = DATA / "tiny"
ROWS = DATA / "instructions"
ROLES = ("user", "assistant")


@pytest.fixture(scope="module")
def example() -> Iterator[Callable[[str], Any]]:
    """Imports a program of examples/ by its name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "examples"))
        yield importlib.import_module


def load() -> tuple[Any, Any]:
    return purelm.FastLanguageModel.from_pretrained(
        str(TINY), load_in_16bit=True, dtype=torch.float32
    )


def read(name: str) -> list[tuple[str, str]]:
    """(question, answer) of every row."""
    rows = [json.loads(line) for line in (ROWS / name).read_text("utf-8").splitlines()]
    out = []
    for row in rows:
        assert set(row) == {"messages"}
        question, answer = row["messages"]
        assert (question["role"], answer["role"]) == ROLES
        out.append((question["content"], answer["content"]))
    return out


def test_it_is_small() -> None:
    model, tokenizer = load()
    assert sum(f.stat().st_size for f in TINY.iterdir()) <= 3_000_000
    assert model.num_parameters() <= 1_000_000
    assert len(tokenizer) == model.spec.vocab
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id, tokenizer.bos_token_id)
    weights = model.origin.checkpoint.tensors.values()
    assert {info.dtype for info in weights} == {torch.bfloat16}


@torch.no_grad()
def test_transformers_reads_it_too() -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    model, tokenizer = load()
    chat = [
        {"role": role, "content": text}
        for role, text in zip(ROLES, read("train.jsonl")[0], strict=True)
    ]
    ids = tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]
    assert ids == their_tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]
    want = theirs(torch.tensor([ids])).logits
    got = model(torch.tensor([ids])).logits
    assert (got - want).abs().max() <= 5e-6 * want.abs().max()
    assert theirs.generation_config.pad_token_id == tokenizer.pad_token_id


def test_the_files_are_what_the_examples_make(example: Callable[[str], Any]) -> None:
    make, sides = example("make_tiny_model"), example("tiny_instructions").rows()
    for name, side in zip(("train", "heldout"), sides, strict=True):
        assert read(f"{name}.jsonl") == [tuple(m["content"] for m in r["messages"]) for r in side]
    _, tokenizer = load()
    assert tokenizer.get_chat_template() == make.TEMPLATE
    text = example("tiny_corpus").documents(make.DOCUMENTS, make.TEXT_SEED)
    assert make.make_tokenizer(text).get_vocab() == tokenizer.get_vocab()


def test_no_held_out_fact_is_in_the_training_rows() -> None:
    train, held_out = read("train.jsonl"), read("heldout.jsonl")
    assert len(train) >= 400 and len(held_out) >= 100
    for side in range(2):
        assert not {row[side] for row in train} & {row[side] for row in held_out}
    assert len(set(held_out)) == len(held_out)


def test_whom_held_out_rows_ask_about_no_training_row_does(example: Callable[[str], Any]) -> None:
    world = example("tiny_world").world()
    asked = [
        {word for question, _ in read(name) for word in question.rstrip("?.").split()}
        for name in ("train.jsonl", "heldout.jsonl")
    ]
    for things in (world.people, world.towns):
        names = {thing.name for thing in things}
        train, held_out = (words & names for words in asked)
        assert len(train) >= 12 and len(held_out) >= 6
        assert not train & held_out


def test_the_text_has_no_chat(example: Callable[[str], Any]) -> None:
    make, corpus = example("make_tiny_model"), example("tiny_corpus")
    for document in corpus.documents(make.DOCUMENTS, make.TEXT_SEED):
        assert "<|im_start|>user" not in document and "<|im_start|>assistant" not in document


def test_it_beats_a_5_gram_model(example: Callable[[str], Any]) -> None:
    """In bits per byte of text that neither has seen; what both texts have is left out."""
    make, corpus = example("make_tiny_model"), example("tiny_corpus")
    model, tokenizer = load()
    text = list(corpus.documents(make.DOCUMENTS, make.TEXT_SEED))
    seen = set(text)
    held_out = [d for d in corpus.documents(make.HELD_OUT, make.HELD_OUT_SEED) if d not in seen]
    assert len(held_out) > 0.9 * make.HELD_OUT
    size = sum(len(d.encode()) for d in held_out)

    def ids(documents: Sequence[str]) -> list[list[int]]:
        encoded: list[list[int]] = tokenizer(documents, add_special_tokens=False)["input_ids"]
        return encoded

    model_bits = make.bits(model, ids(held_out)) / size
    # Over the same tokens.
    baseline = ngram.fit(ids(text), model.spec.vocab, 0, order=5)
    ngram_bits = ngram.bits(baseline, ids(held_out)) / size
    assert model_bits < 0.85 * ngram_bits
    card = (DATA / "MODEL_CARD.md").read_text("utf-8")
    for name, bits in (("this model", model_bits), ("5-gram", ngram_bits)):
        quoted = re.search(rf"^\| {name} \| ([\d.]+) \|$", card, re.MULTILINE)
        assert quoted and math.isclose(float(quoted[1]), bits, rel_tol=0.01), (name, bits)


def test_the_ngram_model_is_a_distribution_and_knows_its_text() -> None:
    text = [[1, 2, 3, 1, 2, 4], [1, 2, 3], [2, 2, 5]] * 7
    model = ngram.fit(text, vocab=8, separator=0, order=3)
    for context in ([], [1], [1, 2], [6, 7], [2, 5]):
        total = sum(2 ** -ngram.token_bits(model, [[*context, i]])[len(context)] for i in range(8))
        assert math.isclose(total, 1.0, rel_tol=1e-9)
    unigram = ngram.fit(text, vocab=8, separator=0, order=1)
    assert ngram.bits(model, text) < 0.6 * ngram.bits(unigram, text)


def exact(model: Any, tokenizer: Any, rows: Sequence[tuple[str, str]]) -> float:
    """The share of the questions that greedy decoding answers to the letter, and then ends."""
    right = 0
    for i in range(0, len(rows), 50):
        some = rows[i : i + 50]
        chats = [[{"role": "user", "content": question}] for question, _ in some]
        batch = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        out = model.generate(**batch, max_new_tokens=24, do_sample=False)
        texts = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :])
        for text, (_, answer) in zip(texts, some, strict=True):
            right += text.replace("<|pad|>", "") == answer + "<|im_end|>"
    return right / len(rows)


def test_the_base_answers_next_to_none() -> None:
    assert exact(*load(), read("heldout.jsonl")) <= 0.02


@pytest.mark.parametrize("seed", [0, *(pytest.param(i, marks=pytest.mark.full) for i in (1, 2))])
def test_fine_tuning_teaches_what_was_never_asked(tmp_path: Path, seed: int) -> None:
    """The run of `purelm sft` without arguments, with this seed: its adapter over the 4-bit base
    answers questions about people, towns and words that no training row asks about.
    """
    options = replace(embedded_options(), output=str(tmp_path), seed=seed, merge=False)
    result = sft.run(options, say=lambda line: None)
    assert result.loss_before is not None and result.loss_after is not None
    assert result.loss_after <= 0.75 * result.loss_before
    model, tokenizer = purelm.FastLanguageModel.from_pretrained(
        str(result.adapter), dtype=torch.float32
    )
    assert exact(model, tokenizer, read("heldout.jsonl")) >= 1 / 3
