"""Mixtures of experts: each token passes a few of many MLPs, chosen and weighed by a router.

Tokens are sorted by expert, each expert multiplies its own, and a token sums up what its experts
made of it. The experts' weights of one projection are one leaf [x, out, in], multiplied at once: on
a GPU in one launch that reads where an expert's tokens begin on the device (kernels/grouped.py),
4-bit ones packed. What those products do not cover runs one expert after the other, which waits for
how many tokens each has.
"""

from typing import Any

import torch

from ..quant import grouped
from . import tree
from .activation import activated, inputs
from .dispatch import combine, places, spread
from .linear import linear, scaled, seed_after
from .mlp import mlp
from .norm import norm
from .router import route
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
    mix: Any = _one_by_one
    if torch._C._are_functorch_transforms_active():
        mix = _every_token
    elif waits_for(p["experts"], own, spec, seed) is None:
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
    """All experts at once, a projection at a time: x [t, e] -> [t, e], with no wait."""
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
    parts[0] = scaled(parts[0], spec.expert.gate_scale)
    out = project(activated(parts, spec.expert, {}), "down")
    return combine(scaled(out, spec.expert.down_scale), weights, where)


def _one_by_one(
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
