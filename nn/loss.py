"""Next-token loss over hidden states, without materialising the logits."""

import torch
import torch.nn.functional as F

from ..kernels.cross_entropy import chunk_rows, linear_cross_entropy
from ..quant.linear import weight_of
from . import dora, tree
from .decoder import head_seed, head_weight, hidden, logits
from .layout import Layout
from .lora import LoRA
from .products import drop, scaled_b
from .remat import remat
from .residuals import Residuals
from .spec import ModelSpec

IGNORE = -100


def shift(labels: torch.Tensor, layout: Layout | None = None) -> torch.Tensor:
    """labels [b, s] -> what each position predicts: its segment's next label, or IGNORE."""
    target = F.pad(labels[:, 1:], (0, 1), value=IGNORE)
    if layout is None or layout.segments is None:
        return target
    following = F.pad(layout.segments[:, 1:], (0, 1), value=0)
    return torch.where(following == layout.segments, target, IGNORE)


def next_token(
    params: tree.Tree,
    spec: ModelSpec,
    x: torch.Tensor,
    labels: torch.Tensor,
    *,
    layout: Layout | None = None,
    adapters: tree.Tree = None,
    seed: int | None = None,
    count: torch.Tensor | float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    token_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cross entropy of hidden states x [b, s, e] against labels [b, s], in fp32.

    Sum over the predicted tokens divided by `count` (default: their number), so that n batches
    accumulated with the count of all of them equal one large batch. IGNORE labels do not count.
    token_weights [b, s] weigh the loss of predicting the label at their place; the default count
    is then the sum of those that count. Of adapters that of the head acts, within the chunks; only
    with DoRA is a matrix of the head's size made for it. seed: as in `hidden`. `label_smoothing`
    and `z_loss` are those of `kernels.cross_entropy.linear_cross_entropy`.
    """
    target = shift(labels, layout).reshape(-1)
    weight = weight_of(head_weight(params, spec), x.dtype)
    flat = x.reshape(-1, x.shape[-1])
    adapter: LoRA | None = tree.get(adapters, "head")
    low, b, following = None, None, None
    if adapter is not None:
        dropped = drop(flat, adapter, head_seed(spec, seed), 0)
        low, b = dropped @ adapter.a.to(flat.dtype).mT, scaled_b(adapter, flat.dtype)
        if adapter.magnitude is not None:
            flat, weight, b = _with_lengths(flat, weight, b, adapter, dropped)
    if token_weights is not None:
        wide = torch.promote_types(x.dtype, torch.float32)
        following = F.pad(token_weights[:, 1:], (0, 1)).reshape(-1).to(wide)
    if spec.head_bias:
        # A column of the matrix, whose feature is 1 in every row: one copy of the matrix a loss.
        # Seven columns of zeros keep its rows aligned for tensor cores.
        bias = params["head"]["bias"].to(weight.dtype)
        weight = torch.cat([weight, F.pad(bias[:, None], (0, 7))], 1)
        flat = F.pad(F.pad(flat, (0, 1), value=1.0), (0, 7))
    total = linear_cross_entropy(
        flat,
        weight,
        target,
        softcap=spec.logit_softcap,
        scale=spec.logit_scale,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        token_weights=following,
        low=low,
        b=b,
    )
    if count is None:
        counts = target != IGNORE
        count = (counts if following is None else torch.where(counts, following, 0.0)).sum()
    return total / count


def _with_lengths(
    x: torch.Tensor,
    weight: torch.Tensor,
    b: torch.Tensor,
    adapter: LoRA,
    dropped: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, weight and b of which products are what `dora.adapted` makes."""
    rows = dora.factor(weight, adapter).to(weight.dtype)[:, None]
    if dropped is x:
        return x, weight * rows, b * rows
    return torch.cat([x, dropped], 1), torch.cat([weight, weight * (rows - 1)], 1), b * rows


def token_logprobs(
    params: tree.Tree,
    spec: ModelSpec,
    x: torch.Tensor,
    labels: torch.Tensor,
    *,
    layout: Layout | None = None,
    adapters: tree.Tree = None,
) -> torch.Tensor:
    """log p of what each position predicts: x [b, s, e], labels [b, s] -> [b, s] in fp32 or wider.

    0 where nothing counts (IGNORE, a row's or document's end). Logits exist a chunk of rows at a
    time, in forward and again in backward. Differentiable in x, a dense head and its adapter: what
    preference and policy losses are made of (DPO, arXiv 2305.18290; GRPO, arXiv 2402.03300).
    """
    target = shift(labels, layout).reshape(-1)
    head = {"head": params["head"]} if "head" in params else {}
    if "weight" not in head.get("head", {}):
        head["embed"] = params["embed"]

    own = {"head": adapter} if (adapter := tree.get(adapters, "head")) is not None else None

    def some(
        x: torch.Tensor, target: torch.Tensor, head: tree.Tree, own: tree.Tree
    ) -> torch.Tensor:
        scores = logits(head, spec, x, adapters=own)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        picked = scores.gather(-1, target.clamp(min=0)[:, None])[:, 0]
        return torch.where(target == IGNORE, 0.0, picked - scores.logsumexp(-1))

    rows = chunk_rows(spec.vocab, spec.dim, 4)
    flat = x.reshape(-1, x.shape[-1])
    parts = [
        remat(some)(flat[i : i + rows], target[i : i + rows], head, own)
        for i in range(0, len(flat), rows)
    ]
    return torch.cat(parts).view(labels.shape)


def loss(
    params: tree.Tree,
    spec: ModelSpec,
    tokens: torch.Tensor,
    labels: torch.Tensor,
    *,
    layout: Layout | None = None,
    adapters: tree.Tree = None,
    count: torch.Tensor | float | None = None,
    residuals: Residuals | None = None,
    seed: int | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    token_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean next-token loss of tokens [b, s]; see `hidden` and `next_token`."""
    x = hidden(
        params, spec, tokens, layout=layout, adapters=adapters, residuals=residuals, seed=seed
    )
    return next_token(
        params,
        spec,
        x,
        labels,
        layout=layout,
        adapters=adapters,
        seed=seed,
        count=count,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        token_weights=token_weights,
    )
