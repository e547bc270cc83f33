"""Log-probabilities of tokens against the softmax of whole logits."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from purelm.nn import decoder, layout, loss, params
from purelm.nn.spec import AttentionSpec, LayerSpec, MLPSpec, ModelSpec, NormSpec, RopeSpec


def built(**changes: Any) -> tuple[ModelSpec, Any]:
    norm = NormSpec(1e-5)
    layer = LayerSpec(norm, AttentionSpec(4, 2, 8, 0.35, RopeSpec(8, 1e4)), MLPSpec(40))
    spec = replace(ModelSpec(50, 32, (layer,), norm, 64, init_std=0.3), **changes)
    generator = torch.Generator().manual_seed(0)
    return spec, params.init(spec, generator=generator, dtype=torch.float64)


def whole(spec: ModelSpec, p: Any, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """By the whole logits: zero for the last place and for ignored labels."""
    every = decoder.forward(p, spec, ids)[:, :-1].log_softmax(-1)
    target = labels[:, 1:]
    found = every.gather(-1, target.clamp(min=0)[..., None])[..., 0]
    return torch.nn.functional.pad(torch.where(target == loss.IGNORE, 0.0, found), (0, 1))


KINDS = [{}, {"tied": True}, {"logit_softcap": 3.0, "logit_scale": 0.7}, {"head_bias": True}]


@pytest.mark.parametrize("changes", KINDS, ids=["plain", "tied", "capped", "bias"])
def test_token_logprobs(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "chunk_rows", lambda *_: 5)  # chunks that end within rows
    spec, p = built(**changes)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 50, (3, 9), generator=generator)
    labels = torch.where(torch.rand(3, 9, generator=generator) < 0.3, loss.IGNORE, ids)
    weights = torch.randn(3, 9, generator=generator, dtype=torch.float64)
    head = p["embed" if "head" not in p else "head"]["weight"].requires_grad_()

    def ours() -> torch.Tensor:
        x = decoder.hidden(p, spec, ids)
        return loss.token_logprobs(p, spec, x, labels)

    found, want = ours(), whole(spec, p, ids, labels)
    torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-9)
    grads = [torch.autograd.grad((y * weights).sum(), head)[0] for y in (found, want)]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)
    counted = (loss.shift(labels) != loss.IGNORE).sum()
    torch.testing.assert_close(-found.sum() / counted, loss.loss(p, spec, ids, labels))


@pytest.mark.parametrize("changes", KINDS, ids=["plain", "tied", "capped", "bias"])
def test_options_of_the_loss(changes: dict[str, Any]) -> None:
    """Smoothing, z-loss and weights from whole logits; a weight belongs to the label there."""
    spec, p = built(**changes)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 50, (3, 9), generator=generator)
    labels = torch.where(torch.rand(3, 9, generator=generator) < 0.3, loss.IGNORE, ids)
    weights = torch.rand(3, 9, generator=generator, dtype=torch.float64)
    z = decoder.forward(p, spec, ids)[:, :-1]
    target, w = labels[:, 1:], weights[:, 1:]
    rows = torch.nn.functional.cross_entropy(
        z.flatten(0, 1), target.flatten(), reduction="none", label_smoothing=0.1
    )
    rows = rows.view(target.shape) + 0.01 * z.logsumexp(-1) ** 2
    w = torch.where(target == loss.IGNORE, 0.0, w)
    options: dict[str, Any] = {"label_smoothing": 0.1, "z_loss": 0.01, "token_weights": weights}
    found = loss.loss(p, spec, ids, labels, **options)
    torch.testing.assert_close(found, (rows * w).sum() / w.sum())
    found = loss.loss(p, spec, ids, labels, count=4.0, **options)
    torch.testing.assert_close(found, (rows * w).sum() / 4)


def test_documents_end_where_they_end() -> None:
    spec, p = built()
    one, two = torch.arange(6)[None], torch.arange(20, 28)[None]
    row, ends = torch.cat([one, two], 1), torch.tensor([0, 6, 14])
    packed = layout.from_cu_seqlens(ends, 14)
    x = decoder.hidden(p, spec, row, layout=packed)
    found = loss.token_logprobs(p, spec, x, row, layout=packed)
    alone = [loss.token_logprobs(p, spec, decoder.hidden(p, spec, d), d) for d in (one, two)]
    torch.testing.assert_close(found, torch.cat(alone, 1))
    assert found[0, 5] == 0 == found[0, 13]


def test_transforms() -> None:
    spec, p = built()
    x = torch.randn(2, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    labels = torch.arange(10).view(2, 5)

    def total(x: torch.Tensor) -> torch.Tensor:
        return loss.token_logprobs(p, spec, x[None], labels[:1]).sum()

    grads = torch.func.vmap(torch.func.grad(total))(x)
    torch.testing.assert_close(grads, torch.stack([torch.func.grad(total)(one) for one in x]))
