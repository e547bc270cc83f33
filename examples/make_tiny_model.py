"""Makes the model that comes with purelm: a Llama of 0.9M parameters, from random weights.

    python examples/make_tiny_model.py OUT        # ten to twenty minutes on one CPU core

It writes OUT/tiny (config, weights, tokenizer) and OUT/instructions (train.jsonl, heldout.jsonl),
and prints the figures that MODEL_CARD.md quotes. The text is that of tiny_corpus.py; the training
is purelm's full fine-tuning.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from tiny_corpus import documents
from tiny_instructions import rows
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import purelm
from purelm.convert.bridge import CausalLM
from purelm.convert.registry import family_of
from purelm.convert.safetensors_write import entry, write_safetensors
from purelm.nn import params as P
from purelm.nn import tree

DOCUMENTS, HELD_OUT, TEXT_SEED, HELD_OUT_SEED = 60_000, 400, 1, 2
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
VOCAB = 1536
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "initializer_range": 0.02,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 3,
}
GENERATION = {
    "bos_token_id": 0,
    "eos_token_id": [2, 0],
    "pad_token_id": 3,
    "do_sample": False,
    "max_new_tokens": 64,
}
TOKENIZER = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": SPECIAL[0],
    "eos_token": SPECIAL[2],
    "pad_token": SPECIAL[3],
    "model_max_length": 512,
    "padding_side": "right",
    "clean_up_tokenization_spaces": False,
}
TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_tokenizer(text: Iterable[str]) -> purelm.Tokenizer:
    """A byte-level BPE of `VOCAB` tokens learned from the text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(text, trainer)
    return purelm.Tokenizer(backend, TOKENIZER, chat_template=TEMPLATE)


def write_model(
    folder: Path, params: tree.Tree, dtype: torch.dtype, tokenizer: purelm.Tokenizer
) -> None:
    """A checkpoint in the layout that purelm and transformers load."""
    names = family_of(CONFIG).names
    config = CONFIG | {"dtype": str(dtype).removeprefix("torch.")}
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (("config.json", config), ("generation_config.json", GENERATION)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    tensors = (
        entry(names.to_hf(path), leaf.detach().to(dtype)) for path, leaf in tree.items(params)
    )
    write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})
    tokenizer.save_pretrained(folder)


def load(folder: Path, *, to_train: bool) -> CausalLM:
    """The model, computing in fp32."""
    model, _ = purelm.FastLanguageModel.from_pretrained(
        str(folder),
        full_finetuning=to_train,
        load_in_16bit=not to_train,
        dtype=torch.float32,
        use_gradient_checkpointing=False,
    )
    return model


def batches(
    ids: Sequence[Sequence[int]], batch: int, length: int, generator: torch.Generator
) -> Iterator[torch.Tensor]:
    """Endless shuffled [batch, length] cuts of all documents in one stream, each after a 0."""
    stream = torch.tensor([i for document in ids for i in (0, *document)])
    windows = stream[: len(stream) // length * length].view(-1, length)
    while True:
        order = torch.randperm(len(windows), generator=generator)
        for chosen in order[: len(order) // batch * batch].view(-1, batch):
            yield windows[chosen]


def train(
    model: torch.nn.Module, data: Iterator[torch.Tensor], steps: int, peak: float, warm_up: int
) -> int:
    """AdamW with a linear rise and fall of the learning rate; the number of tokens seen."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.95), weight_decay=0.05)
    model.train()
    seen, start = 0, time.perf_counter()
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = peak * min(step / warm_up, 1 - 0.97 * step / steps)
        tokens = next(data)
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seen += tokens.numel()
        if step % 100 == 0:
            rate = seen / (time.perf_counter() - start)
            print(f"step {step}/{steps}  loss {loss.item():.3f}  {rate:.0f} tokens/s", flush=True)
    return seen


@torch.no_grad()
def bits(model: torch.nn.Module, ids: Sequence[Sequence[int]]) -> float:
    """How many bits the model needs for these documents, the separator after each included."""
    model.eval()
    total = 0.0
    for i in range(0, len(ids), 32):
        some = [[0, *document, 0] for document in ids[i : i + 32]]
        width = max(map(len, some))
        tokens = torch.tensor([row + [3] * (width - len(row)) for row in some])
        # What is judged follows from the lengths: a 0 inside is a token like any other.
        real = torch.arange(width) < torch.tensor([[len(row)] for row in some])
        labels = tokens.masked_fill(~real, -100)
        out = model(tokens, attention_mask=real.long(), labels=labels, num_items_in_batch=1)
        total += out.loss.item()
    return total / math.log(2)


def report(
    model: torch.nn.Module, text: list[str], held_out: list[str], tokenizer: purelm.Tokenizer
) -> None:
    """Prints bits per byte of the held-out documents that are not in the text, beside n-grams'."""
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    import ngram

    seen = set(text)
    fresh = [document for document in held_out if document not in seen]
    size = sum(len(document.encode()) for document in fresh)
    ids, fresh_ids = (tokenizer(s, add_special_tokens=False)["input_ids"] for s in (text, fresh))
    print(f"held out: {len(fresh)} new documents of {len(held_out)}, {size:,} bytes")
    print(f"bits per byte: {bits(model, fresh_ids) / size:.4f}")
    for order in (3, 4, 5):
        baseline = ngram.fit(ids, VOCAB, 0, order)
        print(f"bits per byte of a {order}-gram: {ngram.bits(baseline, fresh_ids) / size:.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=6e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    text, held_out = (
        list(documents(n, s)) for n, s in ((DOCUMENTS, TEXT_SEED), (HELD_OUT, HELD_OUT_SEED))
    )
    tokenizer = make_tokenizer(text)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    start = args.out / "start"
    spec = family_of(CONFIG).spec(CONFIG)
    drawn = P.init(spec, generator=torch.Generator().manual_seed(args.seed))
    write_model(start, drawn, torch.float32, tokenizer)
    model = load(start, to_train=True)
    print(f"{model.num_parameters():,} parameters, {sum(map(len, ids)):,} tokens of text")
    data = batches(ids, args.batch, args.length, torch.Generator().manual_seed(args.seed))
    seen = train(model, data, args.steps, args.learning_rate, warm_up=100)
    print(f"trained on {seen:,} tokens")
    write_model(args.out / "tiny", model.params, torch.bfloat16, tokenizer)
    shutil.rmtree(start)
    report(load(args.out / "tiny", to_train=False), text, held_out, tokenizer)

    sides = rows()
    (args.out / "instructions").mkdir(exist_ok=True)
    for name, side in zip(("train", "heldout"), sides, strict=True):
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in side)
        (args.out / "instructions" / f"{name}.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main()
