"""The bridge over a folder that transformers wrote, without a tokenizer."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from purelm.convert.bridge import CausalLM, Origin
from purelm.convert.config import Config
from purelm.convert.load import load_folder
from purelm.nn import loss, tree
from purelm.nn.residuals import KEEP, OFFLOAD, RECOMPUTE


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


def left_padded(lengths: tuple[int, ...], seed: int, pad: int) -> dict[str, torch.Tensor]:
    """Rows of drawn tokens, none of which is special, and their mask."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.full((len(lengths), max(lengths)), pad)
    mask = torch.zeros_like(ids)
    for i, n in enumerate(lengths):
        ids[i, -n:] = torch.randint(4, 99, (n,), generator=g)
        mask[i, -n:] = 1
    return {"input_ids": ids, "attention_mask": mask}


def assert_trains(model: CausalLM) -> None:
    """Gradients are the same to the bit whatever is kept, and the loss falls."""
    found = []
    for policy in (KEEP, RECOMPUTE, OFFLOAD):
        model.residuals, model.dropout_step = policy, 0
        model.zero_grad()
        model(ids(), labels=ids()).loss.backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
    for name, grad in found[0].items():
        assert grad.abs().max() > 0 and all(torch.equal(grad, other[name]) for other in found)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        total = model(ids(), labels=ids()).loss
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total.item())
    assert losses[-1] < 0.8 * losses[0]


def per_sample(spec: Any, params: Any, adapters: Any) -> Iterator[tuple[torch.Tensor, ...]]:
    """Every gradient of three rows by themselves: of all at once by torch.func, and of it alone."""
    rows = ids(rows=3, length=9)[:, None]

    def value(adapters: Any, row: torch.Tensor) -> torch.Tensor:
        return loss.loss(params, spec, row, labels=row, adapters=adapters)

    every = torch.func.vmap(torch.func.grad(value), in_dims=(None, 0))(adapters, rows)
    for i, row in enumerate(rows):
        one = tree.tensors(torch.func.grad(value)(adapters, row))
        yield from ((a[i], b) for a, b in zip(tree.tensors(every), one, strict=True))
