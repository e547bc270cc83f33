"""Which experts each token passes, and how what they make of it is weighed."""

import torch

from .linear import linear
from .norm import norm
from .spec import MoESpec


def route(
    x: torch.Tensor, router: dict[str, torch.Tensor], spec: MoESpec
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [t, e] -> each token's weights [t, active] (fp32 or wider) and experts [t, active]."""
    wide = torch.promote_types(x.dtype, torch.float32)
    source = x.to(wide) if spec.wide_router else x
    if spec.router_norm is not None:
        source = norm(x, None, spec.router_norm) * router["scale"] * x.shape[-1] ** -0.5
    # With `choice_bias` what is called a bias chooses alone.
    own = router if spec.router_bias else {"weight": router["weight"]}
    logits = linear(source, own).to(wide)
    if spec.router in ("top_softmax", "top_sigmoid"):
        top, chosen = logits.topk(spec.active, dim=-1)
        weights = top.softmax(-1) if spec.router == "top_softmax" else top.sigmoid()
    elif spec.router == "sparse_mixer":
        weights, chosen = _sparse_mixer(logits, spec)
    else:
        scores = logits.softmax(-1) if spec.router == "softmax" else logits.sigmoid()
        ranks = scores.detach()
        if spec.choice_bias:
            ranks = ranks + router["bias"].detach()
        chosen = _within_groups(ranks, spec)
        weights = scores.gather(-1, chosen)
        if spec.normalise:
            weights = weights / (weights.sum(-1, keepdim=True) + spec.normalise_eps)
    if spec.router_norm is not None:
        weights = weights * router["expert_scale"][chosen]
    return (weights if spec.scale == 1.0 else weights * spec.scale), chosen


def _sparse_mixer(logits: torch.Tensor, spec: MoESpec) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [t, x] -> weights and experts [t, active], each among those within tolerance of it."""
    weights, chosen, left = [], [], logits
    for _ in range(spec.active):
        best, index = left.max(-1, keepdim=True)
        far = (best - logits) / logits.abs().clamp(min=best) > spec.tolerance
        weights.append(left.masked_fill(far, -torch.inf).softmax(-1).gather(-1, index))
        chosen.append(index)
        left = left.scatter(-1, index, -torch.inf)
    return torch.cat(weights, -1), torch.cat(chosen, -1)


def _within_groups(scores: torch.Tensor, spec: MoESpec) -> torch.Tensor:
    """scores [t, x] -> the experts [t, active] with the largest, in the best groups only."""
    if spec.active_groups < spec.groups:
        grouped = scores.view(len(scores), spec.groups, -1)
        best = (
            grouped.topk(spec.group_best, dim=-1)
            .values.sum(-1)
            .topk(spec.active_groups, dim=-1)
            .indices
        )
        left_out = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter(-1, best, False)
        scores = grouped.masked_fill(left_out[..., None], -torch.inf).flatten(-2)
    return scores.topk(spec.active, dim=-1).indices
