"""Mixtures of experts: each token passes a few of many MLPs, chosen and weighed by a router.

Tokens are sorted by expert, each expert multiplies its own, and a token sums up what its experts
made of it. The experts' weights of one projection are one leaf [x, out, in]. A GPU multiplies them
all in one launch that reads where an expert's tokens begin on the device (kernels/grouped.py),
4-bit ones packed. Elsewhere, and for what those products do not cover, the experts run one after
the other, which waits for how many tokens each has.
"""

from typing import Any

import torch

from ..kernels.launch import on_gpu
from ..quant import grouped
from . import tree
from .activation import activated, inputs
from .dispatch import combine, places, spread
from .linear import linear, seed_after
from .mlp import mlp
from .norm import norm
from .spec import MoESpec
from .stacks import apart, separated

# Dropout seeds of one layer's experts lie this far apart, beyond those of all other projections.
_SEED_STEP = 1_000_003


def moe(
    x: torch.Tensor, p: tree.Tree, adapters: tree.Tree, spec: MoESpec, seed: int | None = None
) -> torch.Tensor:
    """Normalised x [b, s, e] -> [b, s, e]: the weighed sum of each token's experts, plus `shared`.

    Differentiable in x, params and adapters; which experts a token gets is not. An expert without
    tokens is skipped, unless something of it is trained, which then gets zero gradients.
    """
    flat = x.reshape(-1, x.shape[-1])
    taken = flat if spec.norms is None else norm(flat, p["norm"], spec.norms)
    weights, chosen = route(flat, p["router"], spec)
    own = tree.get(separated({"experts": tree.get(adapters, "experts")}), "experts")
    mix: Any = _sorted_tokens
    if torch._C._are_functorch_transforms_active():
        mix = _every_token
    elif on_gpu(taken) and waits_for(p["experts"], own, spec, seed) is None:
        mix = _grouped
    out: torch.Tensor = mix(taken, weights, chosen, p["experts"], own, spec, seed)
    if spec.norms is not None:
        out = norm(out, p["post_norm"], spec.norms)
    if spec.shared is not None:
        taken = flat if spec.norms is None else norm(flat, p["shared_norm"], spec.norms)
        shared = mlp(taken, p["shared"], tree.get(adapters, "shared"), spec.shared, seed)
        if spec.shared_gate:
            shared = linear(flat, p["shared_gate"]).sigmoid() * shared
        if spec.norms is not None:
            shared = norm(shared, p["shared_post_norm"], spec.norms)
        out = out + shared
    return out.view(x.shape)


def route(
    x: torch.Tensor, router: dict[str, torch.Tensor], spec: MoESpec
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [t, e] -> each token's weights [t, active] (fp32 or wider) and experts [t, active]."""
    wide = torch.promote_types(x.dtype, torch.float32)
    source = x.to(wide) if spec.router == "sigmoid" else x
    if spec.router_norm is not None:
        source = norm(x, None, spec.router_norm) * router["scale"] * x.shape[-1] ** -0.5
    # What "sigmoid" calls a bias chooses alone.
    own = router if spec.router_bias else {"weight": router["weight"]}
    logits = linear(source, own).to(wide)
    if spec.router in ("top_softmax", "top_sigmoid"):
        top, chosen = logits.topk(spec.active, dim=-1)
        weights = top.softmax(-1) if spec.router == "top_softmax" else top.sigmoid()
    elif spec.router == "softmax":
        weights, chosen = logits.softmax(-1).topk(spec.active, dim=-1)
        if spec.normalise:
            weights = weights / weights.sum(-1, keepdim=True)
    elif spec.router == "sparse_mixer":
        weights, chosen = _sparse_mixer(logits, spec)
    else:
        scores = logits.sigmoid()
        chosen = _within_groups(scores.detach() + router["bias"].detach(), spec)
        weights = scores.gather(-1, chosen)
        if spec.normalise:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
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
        best = grouped.topk(2, dim=-1).values.sum(-1).topk(spec.active_groups, dim=-1).indices
        left_out = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter(-1, best, False)
        scores = grouped.masked_fill(left_out[..., None], -torch.inf).flatten(-2)
    return scores.topk(spec.active, dim=-1).indices


def waits_for(
    experts: tree.Tree, adapters: tree.Tree, spec: MoESpec, seed: int | None = None
) -> str | None:
    """What of a layer's experts and their adapters the grouped products do not cover, so that a
    pass waits for how many tokens each expert has; None: nothing.
    """
    if spec.expert.activation == "xielu":
        return "an activation with parameters of its own"
    if not all(grouped.covers(experts[name]["weight"]) for name in (*inputs(spec.expert), "down")):
        return "their format"
    if any(leaf.magnitude is not None for leaf in tree.leaves(adapters)):
        return "DoRA"
    if seed is not None and any(leaf.dropout for leaf in tree.leaves(adapters)):
        return "dropout"
    return None


def _grouped(
    x: torch.Tensor,
    weights: torch.Tensor,
    chosen: torch.Tensor,
    experts: tree.Tree,
    adapters: tree.Tree,
    spec: MoESpec,
    seed: int | None,
) -> torch.Tensor:
    """All experts in one launch a projection: x [t, e] -> [t, e], with no wait."""
    where = places(chosen, spec.experts)

    def project(rows: torch.Tensor, name: str) -> torch.Tensor:
        p, adapter = experts[name], tree.get(adapters, name)
        term = () if adapter is None else (adapter.a, adapter.b, adapter.scale)
        y = grouped.linear(rows, p["weight"], where.offsets, *term)
        if "bias" in p:
            y = y + p["bias"].to(y.dtype).index_select(0, where.ids)
        return y

    rows = spread(x, where, spec.active)
    if spec.weigh_inputs:
        rows = (rows * weights.flatten().index_select(0, where.order)[:, None]).to(x.dtype)
        weights = torch.ones_like(weights)
    parts = [project(rows, name) for name in inputs(spec.expert)]
    if spec.expert.gate_scale != 1.0:
        parts[0] = parts[0] * spec.expert.gate_scale
    out = project(activated(parts, spec.expert, {}), "down")
    return combine(
        out if spec.expert.down_scale == 1.0 else out * spec.expert.down_scale, weights, where
    )


def _sorted_tokens(
    x: torch.Tensor,
    weights: torch.Tensor,
    chosen: torch.Tensor,
    experts: tree.Tree,
    adapters: tree.Tree,
    spec: MoESpec,
    seed: int | None,
) -> torch.Tensor:
    """Each expert on its own tokens: x [t, e] -> [t, e]."""
    where = places(chosen, spec.experts)
    taken = x[where.order // spec.active]
    if spec.weigh_inputs:
        taken = (taken * weights.flatten()[where.order][:, None]).to(x.dtype)
    rows = taken.split_with_sizes(where.offsets.diff().tolist())
    owns = _adapters(adapters, spec)
    made = []
    for i, (p, adapter, own) in enumerate(zip(apart(experts), owns, rows, strict=True)):
        if len(own) or any(t.requires_grad for t in tree.tensors([p, adapter])):
            made.append(mlp(own, p, adapter, spec.expert, _seed(seed, i)))
    each = torch.cat(made)[where.back].view(*chosen.shape, -1)
    weighed = each if spec.weigh_inputs else each * weights[..., None]
    return weighed.sum(1).to(x.dtype)


def _every_token(
    x: torch.Tensor,
    weights: torch.Tensor,
    chosen: torch.Tensor,
    experts: tree.Tree,
    adapters: tree.Tree,
    spec: MoESpec,
    seed: int | None,
) -> torch.Tensor:
    """The same with every expert on every token, for transforms, which cannot sort by value."""
    out = torch.zeros_like(x, dtype=weights.dtype)
    for i, (p, adapter) in enumerate(zip(apart(experts), _adapters(adapters, spec), strict=True)):
        share = (weights * (chosen == i)).sum(-1, keepdim=True)
        taken = (x * share).to(x.dtype) if spec.weigh_inputs else x
        made = mlp(taken, p, adapter, spec.expert, _seed(seed, i))
        out = out + made * ((chosen == i).any(-1, keepdim=True) if spec.weigh_inputs else share)
    return out.to(x.dtype)


def _adapters(adapters: tree.Tree, spec: MoESpec) -> list[tree.Tree]:
    """Each expert's adapters."""
    return apart(adapters) or [None] * spec.experts


def _seed(seed: int | None, expert: int) -> int | None:
    return seed_after(seed, _SEED_STEP * (expert + 1))
