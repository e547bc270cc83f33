"""What mixes the tokens of a layer: attention, a recurrent mixer, or both."""

import torch

from . import cache as kv
from . import recurrent, rope, tree
from .attention import Visible, attend, gated, gates, prepared, reach, terms
from .cache import Buffers
from .latent import latent_attention
from .linear import linear, project, scaled, seed_after
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
) -> torch.Tensor:
    """Normalised x [b, s, e] -> [b, s, e]; `buffers` are a layer's cache and where to write."""
    if spec.latent is not None:
        return latent_attention(x, p, adapters, spec, table, seen, buffers, seed)
    b, s, _ = x.shape
    get = (adapters or {}).get
    x = scaled(x, spec.in_scale)
    q, k, v = project(x, [p["q"], p["k"], p["v"]], [get("q"), get("k"), get("v")], seed)
    q, gate = gates(q.view(b, s, spec.heads, -1), spec)
    k = k.view(b, s, spec.kv_heads, spec.head_dim)
    v = v.view(b, s, spec.kv_heads, spec.head_dim)
    q, k, v = prepared(q, k, v, p, spec, table)
    if buffers is not None:
        state, at = buffers
        k, v = kv.write(state["keys"], k, at), kv.write(state["values"], v, at)
    how = terms(spec, p, reach(k, seen), k.device)
    out = attend(q, k, v, seen=seen, window=spec.window, **how)
    out = gated(out, gate).reshape(b, s, -1)
    out = linear(out, p["o"], get("o"), seed_after(seed, 3))
    return scaled(out, spec.out_scale)


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
) -> torch.Tensor:
    """Normalised x [b, s, e] through the layer's attention, its recurrent mixer, or both."""
    parts = []
    if spec.attention is not None:
        own = p["attn"], adapters.get("attn"), spec.attention
        parts.append(attention(x, *own, table, seen, buffers, seed))
    if spec.recurrent is not None:
        state = None if buffers is None else buffers[0]
        own_ = p["recurrent"], adapters.get("recurrent"), spec.recurrent
        parts.append(recurrent.mix(x, *own_, starts, state, seed))
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]
