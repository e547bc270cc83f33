"""What mixes the tokens of a layer: attention, a recurrent mixer, or both."""

import torch

from . import cache as kv
from . import recurrent, rope, tree
from .attention import (
    Heads,
    Visible,
    attend,
    gated,
    gates,
    keys_values,
    prepared,
    queries,
    reach,
    terms,
)
from .cache import Buffers
from .latent import latent_attention
from .linear import linear, project, scaled, seed_after
from .norm import norm
from .spec import AttentionSpec, LayerSpec


def attention(
    x: torch.Tensor,
    p: tree.Tree,
    adapters: tree.Tree,
    spec: AttentionSpec,
    table: rope.Table | None,
    seen: Visible,
    buffers: Buffers | None = None,
    seed: int | None = None,
    heads: Heads | None = None,
) -> torch.Tensor:
    """Normalised x [b, s, e] -> [b, s, e]; `buffers` are a layer's cache and where to write,
    `heads` keys and values to take in place of those that x would make.
    """
    if spec.latent is not None:
        return latent_attention(x, p, adapters, spec, table, seen, buffers, seed)
    b, s, _ = x.shape
    get = (adapters or {}).get
    x = scaled(x, spec.in_scale)
    names = ("q",) if heads is not None else spec.projections
    q, *made = project(x, [p[name] for name in names], [get(name) for name in names], seed)
    q, gate = gates(q.view(b, s, spec.heads, -1), spec)
    if heads is not None:
        k, v = heads
        q = queries(q, p, spec, table)
    else:
        k, v = (y.view(b, s, spec.kv_heads, spec.head_dim) for y in (made[0], made[-1]))
        q, k, v = prepared(q, k, v, p, spec, table)
        k, v = _stored(k, v, buffers)
    how = terms(spec, p, reach(k, seen), k.device)
    out = attend(q, k, v, seen=seen, window=spec.window, **how)
    out = gated(out, gate).reshape(b, s, -1)
    out = linear(out, p["o"], get("o"), seed_after(seed, 3))
    return scaled(out, spec.out_scale)


def lent(
    x: torch.Tensor,
    p: tree.Tree,
    adapters: tree.Tree,
    table: rope.Table | None,
    *,
    spec: LayerSpec,
    buffers: Buffers | None = None,
    seed: int | None = None,
) -> Heads:
    """The keys and values that a layer whose input is x [b, s, e] has, and lends to others.

    With `buffers` they are written there, and all that is there is given.
    """
    a, own = spec.attention, p["attn"]
    assert a is not None
    inner = norm(x, p.get("attn_norm"), spec.norm) if spec.pre_norm else x
    names = a.projections[1:]
    worn = [tree.get(adapters, "attn", name) for name in names]
    inner = scaled(inner, a.in_scale)
    made = project(inner, [own[name] for name in names], worn, seed_after(seed, 1))
    k, v = (y.view(*x.shape[:2], a.kv_heads, a.head_dim) for y in (made[0], made[-1]))
    return _stored(*keys_values(k, v, own, a, table), buffers)


def _stored(k: torch.Tensor, v: torch.Tensor, buffers: Buffers | None) -> Heads:
    """New keys and values, or with a cache all that it then holds."""
    if buffers is None:
        return k, v
    state, at = buffers
    return kv.write(state["keys"], k, at), kv.write(state["values"], v, at)


def mixer(
    x: torch.Tensor,
    p: tree.Tree,
    adapters: tree.Tree,
    table: rope.Table | None,
    seen: Visible,
    starts: torch.Tensor | None,
    *,
    spec: LayerSpec,
    buffers: Buffers | None = None,
    seed: int | None = None,
    heads: Heads | None = None,
) -> torch.Tensor:
    """Normalised x [b, s, e] through the layer's attention, its recurrent mixer, or both."""
    parts = []
    if spec.attention is not None:
        own = p["attn"], adapters.get("attn"), spec.attention
        parts.append(attention(x, *own, table, seen, buffers, seed, heads))
    if spec.recurrent is not None:
        state = None if buffers is None else buffers[0]
        own_ = p["recurrent"], adapters.get("recurrent"), spec.recurrent
        parts.append(recurrent.mix(x, *own_, starts, state, seed))
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]
