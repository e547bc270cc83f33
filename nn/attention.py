"""Causal attention over grouped heads: q and k prepared, and which keys a query may see."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..kernels.attention import Documents, attention
from ..kernels.decode_attention import decode_attention
from ..kernels.rope import rope_qk
from . import tree
from .layout import Layout
from .norm import norm
from .rope import Table
from .spec import AttentionSpec, NormSpec


class Span(NamedTuple):
    """One query a row sees the keys from `first` up to `end` of its row, both [b] int64."""

    first: torch.Tensor
    end: torch.Tensor


Visible = torch.Tensor | Documents | Span | None


def prepared(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    p: tree.Tree,
    spec: AttentionSpec,
    table: Table | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Raw q [b, s, h, d], k and v [b, s, k, d], clipped, normalised and rotated where the spec says
    so.
    """
    if spec.clip is not None:
        q, k, v = (x.clamp(-spec.clip, spec.clip) for x in (q, k, v))
    if not spec.qk_norm_after:
        q, k = _normed(q, k, p, spec)
    if spec.rope is not None and table is not None:
        if spec.rope.dim:
            q, k = rope_qk(q, k, table.cos, table.sin, interleaved=spec.rope.interleaved)
        if table.query_scale is not None:
            q = q * table.query_scale[..., None, None].to(q.dtype)
    if spec.qk_norm_after:
        q, k = _normed(q, k, p, spec)
    return q, k, v


def _normed(
    q: torch.Tensor, k: torch.Tensor, p: tree.Tree, spec: AttentionSpec
) -> tuple[torch.Tensor, torch.Tensor]:
    if spec.qk_norm is None:
        return q, k
    return (
        _head_norm(q, p.get("q_norm"), spec, spec.qk_norm),
        _head_norm(k, p.get("k_norm"), spec, spec.qk_norm),
    )


def _head_norm(
    x: torch.Tensor, p: dict[str, torch.Tensor] | None, spec: AttentionSpec, how: NormSpec
) -> torch.Tensor:
    if spec.qk_norm_over == "width":
        return norm(x.flatten(-2), p, how).view(x.shape)
    return norm(x, p, how)


def visible(
    queries: Layout,
    segments: torch.Tensor | None,
    offset: int,
    window: int | None,
    chunk: int | None = None,
) -> Visible:
    """Which keys each query sees: bool [b or 1, 1, s, S], the documents of a packed row where a
    fused kernel takes them, or None where causal order says it. Where it is no mask, the window
    is left to `attend`.

    The queries are tokens offset..offset+s of rows whose keys have `segments` [b, S] (None: one
    segment without padding, S = offset + s).
    """
    s, device = queries.positions.shape[1], queries.positions.device
    total = offset + s
    unlimited = window is None or window >= total
    chunked = chunk is not None and chunk < total
    if segments is None and not chunked and (offset == 0 or (s == 1 and unlimited)):
        return None
    if queries.documents is not None and queries.positions.is_cuda and offset == 0 and not chunked:
        return queries.documents
    i = torch.arange(offset, total, device=device)[:, None]
    j = torch.arange(total, device=device)[None, :]
    seen = j <= i
    if window is not None:
        seen = seen & (i - j < window)
    seen = seen[None, None]
    if segments is not None:
        own = segments[:, None, offset:, None] == segments[:, None, None, :]
        seen = seen & own
    if chunk is not None and chunked:
        keys = queries.positions if offset == 0 else _positions(segments, total, device)
        chunks = queries.positions[:, None, :, None] // chunk, keys[:, None, None, :] // chunk
        seen = seen & (chunks[0] == chunks[1])
    return seen


def _positions(segments: torch.Tensor | None, total: int, device: torch.device) -> torch.Tensor:
    """Where the keys of a cache stand in their rows [b or 1, S]: padding stands in front."""
    if segments is None:
        return torch.arange(total, device=device)[None]
    return (segments != 0).long().cumsum(-1) - 1


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    seen: Visible,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """softmax(scale q k^T) v for q [b, s, h, d], k and v [b, S, k, d] -> [b, s, h, d].

    Statistics in fp32. Without `seen`, S is s or s is 1: every query sees all keys up to its own,
    the last `window` of them if S is s.
    With a soft cap the scores are written out, [b, h, s, S] in fp32: no fused backend has one.
    """
    if isinstance(seen, Span):
        return decode_attention(q[:, 0], k, v, *seen, scale=scale, softcap=softcap)[:, None]
    if softcap is not None:
        return _capped(q, k, v, scale, seen, window, softcap)
    if isinstance(seen, Documents) or (seen is None and q.shape[1] > 1):
        return attention(q, k, v, scale=scale, documents=seen, window=window)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if seen is not None and q.is_cuda:
        # With a mask, grouped heads leave torch only its unfused kernel: give every head its keys.
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=seen, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2)


def _capped(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    seen: Visible,
    window: int | None,
    softcap: float,
) -> torch.Tensor:
    """`attend` with scores softcap * tanh(score / softcap) (Gemma 2, arXiv 2408.00118, sec. 2)."""
    groups = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k)
    scores = scores.to(torch.promote_types(q.dtype, torch.float32)) * scale
    scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(
        ~_mask(seen, window, q.shape[1], k.shape[1], q.device), float("-inf")
    )
    # A row of padding may see nothing: zeros instead of NaN.
    weights = scores.softmax(-1).nan_to_num(0.0).to(q.dtype)
    return torch.einsum("bhij,bjhd->bihd", weights, v)


def _mask(
    seen: Visible, window: int | None, s: int, total: int, device: torch.device
) -> torch.Tensor:
    """`seen` and the window written out, broadcastable to [b, h, s, S]."""
    if isinstance(seen, torch.Tensor):
        return seen
    index = torch.arange(total, device=device)
    mask = index[None, :] <= index[total - s :, None]
    if window is not None:
        mask = mask & (index[total - s :, None] - index[None, :] < window)
    if isinstance(seen, Documents):
        document = torch.bucketize(index, seen.cu_seqlens[1:].long(), right=True)
        mask = mask & (document[None, :] == document[:, None])
    return mask
