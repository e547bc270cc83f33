"""The bridge over a folder that transformers wrote, without a tokenizer."""

from pathlib import Path
from typing import Any

import torch

from purelm.convert.bridge import CausalLM, Origin
from purelm.convert.config import Config
from purelm.convert.load import load_folder


def bridge(
    folder: Path,
    *,
    quantize: Any = None,
    dtype: torch.dtype | None = torch.float32,
    train_all: bool = False,
) -> CausalLM:
    """The model in `folder` on the CPU, in eval mode."""
    loaded = load_folder(folder, quantize=quantize, dtype=dtype, device=torch.device("cpu"))
    origin = Origin(
        name=str(folder),
        revision=None,
        folder=folder,
        family=loaded.family,
        checkpoint=loaded.checkpoint,
        quantize=quantize,
    )
    model = CausalLM(
        loaded.spec,
        loaded.params,
        config=loaded.config,
        generation_config=Config({"eos_token_id": 2}),
        origin=origin,
        dtype=dtype or torch.float32,
        max_seq_length=64,
        train_all=train_all,
    )
    model.eval()
    return model


def spread_trained(model: torch.nn.Module, seed: int = 7) -> None:
    """Move everything that is trained away from where it began, so that a mistake shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += torch.randn(p.shape, generator=generator) * 0.05


def same_logits(ours: torch.Tensor, theirs: torch.Tensor, limit: float = 5e-6) -> None:
    """The parity rule for fp32."""
    off = float((ours - theirs).abs().max() / theirs.abs().max())
    assert off <= limit, f"{off:.2g} of the largest logit"
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))


def ids(seed: int = 1, rows: int = 2, length: int = 23) -> torch.Tensor:
    """Tokens of the tiny models' vocabulary."""
    return torch.randint(0, 99, (rows, length), generator=torch.Generator().manual_seed(seed))
