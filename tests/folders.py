"""Whole tiny model folders: transformers' weights and config with a tokenizer beside them."""

from pathlib import Path
from typing import Any

import tiny
import tiny_tokenizers

VOCAB = 420


def whole(folder: Path, family: str = "llama", *, seed: int = 0, **fields: Any) -> Any:
    """Write a model of `family` and a byte-level tokenizer into `folder`; returns HF's model."""
    model = tiny.hf_model(family, seed=seed, **{"vocab_size": VOCAB, **fields})
    tiny_tokenizers.byte_level(folder)
    tiny.save(model, folder)
    return model
