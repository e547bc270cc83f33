"""Multi-head latent attention: keys and values made of a narrow latent, which a cache holds.

DeepSeek-V2, arXiv 2405.04434, sec. 2.1. Many queries meet keys and values made of the latent; one
query a row meets the latent itself, with the matrices of keys and values on its own side (sec.
2.1.2, "absorbed"), so that a step reads kv_rank + rope features a token, whatever the heads.
"""

from typing import Any

import torch
import torch.nn.functional as F

from ..kernels.decode_attention import side_by_side
from ..kernels.rope import rope_qk
from . import cache as kv
from . import tree
from .attention import Span, Visible, attend, terms
from .cache import Buffers
from .linear import linear, project, seed_after
from .norm import norm
from .rope import Table
from .spec import AttentionSpec, LatentSpec

# The seed of kv_b's dropout lies this far off, between those of a step's other projections.
SEED_STEP = 500_009


def latent_attention(
    x: torch.Tensor,
    p: tree.Tree,
    adapters: tree.Tree,
    spec: AttentionSpec,
    table: Table | None,
    seen: Visible,
    buffers: Buffers | None = None,
    seed: int | None = None,
) -> torch.Tensor:
    """Normalised x [b, s, e] -> [b, s, e]; `buffers` are a layer's cache and where to write."""
    assert spec.latent is not None and spec.rope is not None and table is not None
    get = (adapters or {}).get
    q, latent, key = _inputs(x, p, get, spec, spec.latent, seed)
    plain, turned, key = turn(q, key, spec, table)
    if buffers is not None:
        state, at = buffers
        latent, key = kv.write(state["keys"], latent, at), kv.write(state["values"], key, at)
    if isinstance(seen, Span):
        if seen.table is not None:
            latent, key = side_by_side(latent, seen.table), side_by_side(key, seen.table)
        latent, key = latent.to(x.dtype), key.to(x.dtype)
        out = _absorbed(
            plain[:, 0], turned[:, 0], latent[:, :, 0], key[:, :, 0], p, get, spec, seen
        )
    else:
        made = linear(latent[:, :, 0], p["kv_b"], get("kv_b"), seed_after(seed, SEED_STEP))
        how = terms(spec, {}, latent.shape[1], x.device)
        q, k, v = joined(plain, turned, key, made, spec)
        out = attend(q, k, v, seen=seen, window=spec.window, **how)[..., : spec.value_dim]
    return linear(out.flatten(-2), p["o"], get("o"), seed_after(seed, 3))


def _inputs(
    x: torch.Tensor,
    p: tree.Tree,
    get: Any,
    spec: AttentionSpec,
    latent: LatentSpec,
    seed: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries [b, s, h, d], the normalised latent [b, s, 1, r] and the key of all heads, before
    rotations [b, s, 1, rot].
    """
    first, kv_a = firsts(latent)
    q, narrow = project(x, [p[first], p[kv_a]], [get(first), get(kv_a)], seed)
    if latent.q_rank is not None:
        q = norm(q, p["q_a_norm"], latent.norm)
        q = linear(q, p["q_b"], get("q_b"), seed_after(seed, 2))
    made, key = split(narrow, p, latent)
    return q.view(*q.shape[:2], spec.heads, -1), made[:, :, None], key


def firsts(latent: LatentSpec) -> tuple[str, str]:
    """The projections of the input."""
    return "q" if latent.q_rank is None else "q_a", "kv_a"


def split(
    narrow: torch.Tensor, p: tree.Tree, latent: LatentSpec
) -> tuple[torch.Tensor, torch.Tensor]:
    """What kv_a makes -> the normalised latent [b, s, r], and the key of all heads [b, s, 1, rot]
    before its rotation.
    """
    made, key = narrow.tensor_split([latent.kv_rank], -1)
    return norm(made, p["kv_a_norm"], latent.norm), key[:, :, None]


def turn(
    q: torch.Tensor, key: torch.Tensor, spec: AttentionSpec, table: Table
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q [b, s, h, d] and the key of all heads -> the part of q that is not rotated, and what is."""
    assert spec.rope is not None
    plain, turned = q.split_with_sizes([spec.head_dim - spec.rope.dim, spec.rope.dim], -1)
    turned, key = rope_qk(turned, key, table.cos, table.sin, interleaved=spec.rope.interleaved)
    return plain, turned, key


def joined(
    plain: torch.Tensor,
    turned: torch.Tensor,
    key: torch.Tensor,
    made: torch.Tensor,
    spec: AttentionSpec,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v [b, s, h, width] of what `turn` gives and what kv_b makes of the latent, all of
    the larger width: no fused backend takes values of another than keys, and zeros in the narrower
    of the two change nothing.
    """
    sizes = [plain.shape[-1], spec.value_dim]
    k, v = made.view(*made.shape[:2], spec.heads, -1).split_with_sizes(sizes, -1)
    q = torch.cat([plain, turned], -1)
    k = torch.cat([k, key.expand(-1, -1, spec.heads, -1)], -1)
    width = max(spec.head_dim, spec.value_dim)
    q, k, v = (F.pad(t, (0, width - t.shape[-1])) if t.shape[-1] < width else t for t in (q, k, v))
    return q, k, v


def _absorbed(
    plain: torch.Tensor,
    turned: torch.Tensor,
    latent: torch.Tensor,
    key: torch.Tensor,
    p: tree.Tree,
    get: Any,
    spec: AttentionSpec,
    seen: Span,
) -> torch.Tensor:
    """One query a row, [b, h, nope] and [b, h, rot], over latents [b, S, r] and keys [b, S, rot]
    -> [b, 1, h, v].
    """
    rank = latent.shape[-1]
    # The matrix with its adapter, of whatever kinds they are: what they make of unit vectors.
    units = torch.eye(rank, dtype=latent.dtype, device=latent.device)
    both = linear(units, p["kv_b"], get("kv_b")).view(rank, spec.heads, -1)
    of_key, of_value = both.split_with_sizes([plain.shape[-1], spec.value_dim], -1)
    narrow = torch.einsum("bhn,rhn->bhr", plain, of_key)
    scores = narrow @ latent.mT + turned @ key.mT
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * spec.scale
    index = torch.arange(latent.shape[1], device=latent.device)
    hidden = (index < seen.first[:, None]) | (index >= seen.end[:, None])
    weights = scores.masked_fill(hidden[:, None], -torch.inf).softmax(-1).nan_to_num(0.0)
    context = weights.to(latent.dtype) @ latent
    return torch.einsum("bhr,rhv->bhv", context, of_value)[:, None]
