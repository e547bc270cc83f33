"""Tiny random models in transformers' own classes, saved as HF folders: the oracle of parity
tests.
"""

from pathlib import Path
from typing import Any

import torch
import transformers

SIZES: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_KINDS = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}


def config(family: str, **fields: Any) -> Any:
    """transformers' config of a family, tiny unless `fields` say otherwise."""
    extra = {"head_dim": 12} if family == "qwen3" else {}
    return getattr(transformers, f"{_KINDS[family]}Config")(**{**SIZES, **extra, **fields})


def spread(model: Any, seed: int = 0) -> None:
    """Draw every parameter so that a mistake shows: norms off 1, biases off 0, large logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            drawn = torch.randn(p.shape, generator=generator)
            if p.ndim == 1:
                is_norm = "norm" in name
                p.copy_(drawn * 0.3 + (1.0 if is_norm else 0.0))
            else:
                p.copy_(drawn * (1.5 / p.shape[-1] ** 0.5))


def hf_model(family: str, *, seed: int = 0, **fields: Any) -> Any:
    """transformers' model in fp32 with spread weights, eager attention, in eval mode."""
    made = config(family, **fields)
    made._attn_implementation = "eager"
    cls = getattr(transformers, f"{_KINDS[family]}ForCausalLM")
    model = cls(made).float().eval()
    spread(model, seed)
    model.tie_weights()
    return model


def save(model: Any, folder: Path, **kwargs: Any) -> Path:
    """Write the model as transformers does."""
    model.save_pretrained(folder, **kwargs)
    return folder
