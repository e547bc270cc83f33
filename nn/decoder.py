"""The decoder: one function for every family, described by its `ModelSpec`.

Plain functions of (params, spec, tokens); see `spec` for the letters in the shapes.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from ..quant.linear import linear as base_linear
from . import cache as kv
from . import host_table, layer_inputs, recurrent, rope, tree, watch
from .attention import Heads, Visible, visible
from .cache import Buffers, Cache
from .experts import moe
from .fast_layer import Layer as FastLayer
from .halves import whole
from .layer_inputs import ended, ended_again
from .layout import Layout, dense
from .linear import linear, seed_after
from .mixer import lent, mixer
from .mlp import mlp
from .norm import add, norm
from .offload import Offload
from .remat import remat
from .residuals import Policy, Residuals, per_layer
from .spec import LayerSpec, ModelSpec, MoESpec, RopeSpec


def layer(
    x: torch.Tensor,
    p: tree.Tree,
    adapters: tree.Tree,
    table: rope.Table | None,
    seen: Visible,
    starts: torch.Tensor | None = None,
    heads: Heads | None = None,
    given: torch.Tensor | None = None,
    *,
    spec: LayerSpec,
    buffers: Buffers | None = None,
    seed: int | None = None,
    tile: int | None = None,
) -> torch.Tensor:
    """One decoder layer: x [b, s, e] -> [b, s, e]; `starts` as in `recurrent.mix`, `tile` as in
    `residuals.Policy`, for a dense MLP. heads: as in `mixer.attention`; given: as in
    `layer_inputs.ended`.
    """
    adapters = adapters or {}
    inner = norm(x, p.get("attn_norm"), spec.norm) if spec.pre_norm else x
    how: Any = {"spec": spec, "buffers": buffers, "seed": seed, "heads": heads}
    branch = mixer(inner, p, adapters, table, seen, starts, **how)
    mid = add(x, branch, p.get("attn_post_norm"), spec)
    if spec.own_norms or not spec.parallel:
        source = x if spec.parallel else mid
        inner = norm(source, p.get("mlp_norm"), spec.norm) if spec.mlp_normed else source
    made = fed(mid, inner, p, adapters, spec, seed, tile)
    return ended(made, p, adapters, given, spec, seed)


def fed(
    mid: torch.Tensor,
    inner: torch.Tensor,
    p: tree.Tree,
    adapters: tree.Tree,
    spec: LayerSpec,
    seed: int | None = None,
    tile: int | None = None,
) -> torch.Tensor:
    """mid [b, s, e] and what the layer's MLP or mixture makes of inner [b, s, e]."""
    mlp_args = inner, p["mlp"], (adapters or {}).get("mlp")
    if isinstance(spec.mlp, MoESpec):
        branch = moe(*mlp_args, spec.mlp, seed_after(seed, 4))
    else:
        branch = mlp(*mlp_args, spec.mlp, seed_after(seed, 4), tile)
    return add(mid, branch, p.get("mlp_post_norm"), spec)


def hidden(
    params: tree.Tree,
    spec: ModelSpec,
    tokens: torch.Tensor,
    *,
    layout: Layout | None = None,
    adapters: tree.Tree = None,
    residuals: Residuals | None = None,
    seed: int | None = None,
    debug: bool = False,
) -> torch.Tensor:
    """tokens [b, s] -> final normalised hidden states [b, s, e], ready for the head.

    layout: positions and segments (default: full rows from position 0). residuals: what becomes of
    each layer's residuals until its backward, one policy or one a layer; None leaves it to
    autograd, which keeps all. seed: drives the adapters' dropout; None leaves dropout out.
    debug: what is not finite first, now or in backward, raises TrainingError that names it
    (`watch`), for which each layer waits.
    """
    layout = layout or dense(*tokens.shape, device=tokens.device)
    out, _ = _run(params, spec, tokens, layout, adapters, None, residuals, seed, debug)
    return out


def extend(
    params: tree.Tree,
    spec: ModelSpec,
    tokens: torch.Tensor,
    cache: Cache,
    *,
    layout: Layout | None = None,
    adapters: tree.Tree = None,
) -> tuple[torch.Tensor, Cache]:
    """Run tokens [b, s] after those in `cache`: (hidden states [b, s, e], the grown cache).

    The given cache's buffers are written in place; use only the returned one afterwards.
    """
    layout = layout or dense(*tokens.shape, start=cache.length, device=tokens.device)
    out, grown = _run(params, spec, tokens, layout, adapters, cache, None, None)
    assert grown is not None
    return out, grown


def embed(params: tree.Tree, spec: ModelSpec, tokens: torch.Tensor) -> torch.Tensor:
    """tokens [b, s] -> their scaled embeddings [b, s, e], of a table there or on the host."""
    x = host_table.rows(params["embed"]["weight"], tokens)
    if spec.embed_scale == 1.0:
        return x
    rounded = torch.tensor(spec.embed_scale, dtype=x.dtype).item()
    return x * (rounded if spec.embed_scale_rounded else spec.embed_scale)


def placed(
    params: tree.Tree, spec: ModelSpec, tokens: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """What the first layer gets [b, s, e]: embeddings, plus learned ones of positions [b, s]."""
    x = embed(params, spec, tokens)
    if spec.learned_positions:
        x = x + F.embedding(positions, params["positions"]["weight"])
    return x


def _run(
    params: tree.Tree,
    spec: ModelSpec,
    tokens: torch.Tensor,
    layout: Layout,
    adapters: tree.Tree,
    cache: Cache | None,
    residuals: Residuals | None,
    seed: int | None,
    debug: bool = False,
) -> tuple[torch.Tensor, Cache | None]:
    if debug:
        watch.check_weights(params, adapters)
    x = placed(params, spec, tokens, layout.positions)
    if debug:
        x = watch.checked(x, "what is made of the embeddings")
    start, segments = 0, layout.segments
    if cache is not None:
        start = cache.length
        cache = kv.note(cache, layout)
        segments = None if cache.segments is None else cache.segments[:, : cache.length]
    tables: dict[RopeSpec | None, rope.Table | None] = {None: None}
    tables.update({r: rope.table(r, layout.positions) for r in spec.ropes()})
    sights = {layer_spec.sight for layer_spec in spec.layers}
    seen = {sight: visible(layout, segments, start, x.dtype, *sight) for sight in sights}
    recurs = any(layer_spec.recurrent is not None for layer_spec in spec.layers)
    starts = recurrent.starts(segments, start) if recurs else None
    policies: tuple[Policy | None, ...] = (None,) * len(spec.layers)
    if residuals is not None and torch.is_grad_enabled():
        policies = per_layer(residuals, len(spec.layers))
    offload = Offload(x.device) if any(p is not None and p.offloads for p in policies) else None
    further = layer_inputs.every(params, spec, tokens, x, adapters, seed)
    shared: dict[int | None, Heads] = {}
    for i, (layer_spec, p, policy) in enumerate(
        zip(spec.layers, params["layers"], policies, strict=True)
    ):
        layer_seed = seed_after(seed, 7 * i)
        own = tree.get(adapters, "layers", i)
        if debug:
            p, own = (watch.of_trained(one, f"layers.{i}") for one in (p, own))
        args = (x, p, own, tables[layer_spec.rope])
        how: Any = {"spec": layer_spec, "seed": layer_seed}
        if cache is not None:
            how["buffers"] = cache.layers[i], start
        if layer_spec.lends:
            lend = partial(lent, **how)
            shared[i] = (lend if cache is not None or policy is None else remat(lend))(*args)
        heads = shared.get(i if layer_spec.lends else layer_spec.kv_from)
        view = seen[layer_spec.sight], starts, heads, further[i]
        if cache is not None or policy is None:
            x = layer(*args, *view, **how)
        elif covers(p) and not whole(layer_spec, p, own, view[0], layer_seed):
            last = i == len(spec.layers) - 1  # its backward comes at once: nothing to gain
            fast = FastLayer(i, layer_spec, view[0], policy, offload, layer_seed, last)
            x = fast.run(*args, starts, heads)
            x = ended_again(x, p, own, further[i], layer_spec, layer_seed)
        else:
            x = remat(partial(layer, **how, tile=policy.tile))(*args, *view)
        if debug:
            told: Any = {"index": i, "spec": layer_spec, "seed": layer_seed}
            watch.check_layer(*args, *view[:3], **told)
            x = watch.checked(x, f"layers.{i}: its output")
    out = norm(x, params.get("norm"), spec.norm)
    return (watch.checked(out, "the final hidden states") if debug else out), cache


def covers(p: tree.Tree) -> bool:
    """Whether `fast_layer` can run it: frozen params, no transform."""
    if torch._C._are_functorch_transforms_active():
        return False
    return not any(t.requires_grad for t in tree.tensors(p))


def head_weight(params: tree.Tree, spec: ModelSpec) -> Any:
    """The leaf [v, e] that turns hidden states into logits."""
    return params["head" if "weight" in params.get("head", {}) else "embed"]["weight"]


def head_seed(spec: ModelSpec, seed: int | None) -> int | None:
    """The dropout seed of the head's adapter in a pass that `seed` drives."""
    return seed_after(seed, 7 * len(spec.layers))


def logits(
    params: tree.Tree,
    spec: ModelSpec,
    x: torch.Tensor,
    *,
    adapters: tree.Tree = None,
    seed: int | None = None,
) -> torch.Tensor:
    """Hidden states [..., e] -> logits [..., v], scaled and capped (in fp32, rounded once).

    Of adapters, that of the head; seed as in `hidden`.
    """
    weight = head_weight(params, spec)
    if (adapter := tree.get(adapters, "head")) is None:
        out = base_linear(x, weight)
    else:
        out = linear(x, {"weight": weight}, adapter, head_seed(spec, seed))
    if spec.head_bias:
        out = out + params["head"]["bias"].to(out.dtype)
    if spec.logit_scale == 1.0 and spec.logit_softcap is None:
        return out
    wide = out.to(torch.promote_types(out.dtype, torch.float32)) * spec.logit_scale
    if spec.logit_softcap is not None:
        wide = torch.tanh(wide / spec.logit_softcap) * spec.logit_softcap
    return wide.to(x.dtype)


def forward(
    params: tree.Tree,
    spec: ModelSpec,
    tokens: torch.Tensor,
    *,
    layout: Layout | None = None,
    adapters: tree.Tree = None,
    residuals: Residuals | None = None,
    seed: int | None = None,
) -> torch.Tensor:
    """tokens [b, s] -> logits [b, s, v]; the arguments are those of `hidden`."""
    x = hidden(
        params, spec, tokens, layout=layout, adapters=adapters, residuals=residuals, seed=seed
    )
    return logits(params, spec, x, adapters=adapters, seed=seed)
