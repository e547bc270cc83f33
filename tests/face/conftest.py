"""A random tiny checkpoint with a tokenizer and a chat template, and rows to train it on."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import embedded_model
import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from purelm import Tokenizer
from purelm.convert.registry import family_of
from purelm.convert.safetensors_write import entry, write_safetensors
from purelm.nn import params, tree

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "initializer_range": 0.02,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 3,
    "torch_dtype": "float32",
}
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOWNS = ("Aldburg", "Brenn", "Corvik", "Dahl", "Estmere", "Farrow", "Galt", "Hulme")


def conversation(question: str, answer: str) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["Where is the town? It lies in the north. "] * 20, trainer)
    config = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[2], "pad_token": SPECIAL[3]}
    return Tokenizer(backend, config, chat_template=TEMPLATE)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """The checkpoint."""
    path = tmp_path_factory.mktemp("checkpoint") / "random"
    tokenizer.save_pretrained(path)
    family = family_of(CONFIG)
    drawn = params.init(family.spec(CONFIG), generator=torch.Generator().manual_seed(0))
    # A head (tied to it) strong enough to be worth adapting to.
    drawn["embed"]["weight"] *= 10
    (path / "config.json").write_text(json.dumps(CONFIG))
    entries = [entry(family.names.to_hf(name), leaf.float()) for name, leaf in tree.items(drawn)]
    write_safetensors(path / "model.safetensors", entries, {"format": "pt"})
    return path


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten conversations."""
    rows = [conversation(f"Where is {town}?", f"{town} is in the north.") for town in TOWNS]
    rows += [conversation("Who are you?", "A model."), conversation("And?", "No more.")]
    return write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", rows)


@pytest.fixture(scope="module")
def loaded() -> Any:
    """The carried model and its tokenizer."""
    return embedded_model.load()


@pytest.fixture(scope="module")
def site(loaded: Any) -> Iterator[Any]:
    """A server of the carried model."""
    from served import Site  # its clients are imported where one is wanted

    with Site(loaded, max_tokens=200, max_body=20_000) as site:
        yield site


@pytest.fixture(scope="module")
def client(site: Any) -> Iterator[Any]:
    """A client of that server."""
    with site.client() as client:
        yield client
