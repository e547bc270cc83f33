"""Causal attention over grouped heads: q and k prepared, and which keys a query may see."""

from typing import NamedTuple, TypedDict, Unpack

import torch
import torch.nn.functional as F

from ..kernels.attention import Documents, attention, fused
from ..kernels.decode_attention import decode_attention
from ..kernels.rope import HeadNorm, rope, rope_qk
from . import alibi, tree
from .layout import Layout
from .norm import norm
from .rope import Table
from .spec import AttentionSpec, NormSpec


class Span(NamedTuple):
    """One query a row sees the keys from `first` up to `end` of its row, both [b] int64; `table` as
    in `cache.Cache`.
    """

    first: torch.Tensor
    end: torch.Tensor
    table: torch.Tensor | None = None


Visible = torch.Tensor | Documents | Span | None

# Keys and values [b, s, k, d], normalised and rotated.
Heads = tuple[torch.Tensor, torch.Tensor]


def gates(q: torch.Tensor, spec: AttentionSpec) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What q's projection makes [b, s, h, d or 2d]: queries, and gates if there are any."""
    if not spec.gated:
        return q, None
    q, gate = q.chunk(2, -1)
    return q.contiguous(), gate


def gated(out: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
    """What attention gives [b, s, h, d], through the gates if there are any."""
    return out if gate is None else out * gate.sigmoid()


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
    turns = spec.rope is not None and spec.rope.dim and table is not None
    together = head_norm(p, spec) if turns else None
    if not spec.qk_norm_after and together is None:
        q, k = _normed(q, k, p, spec)
    if spec.rope is not None and table is not None:
        if spec.rope.dim:
            angles, pairs = (table.cos, table.sin), spec.rope.interleaved
            q, k = rope_qk(q, k, *angles, interleaved=pairs, norm=together)
        if table.query_scale is not None:
            q = q * table.query_scale[..., None, None].to(q.dtype)
    if spec.qk_norm_after:
        q, k = _normed(q, k, p, spec)
    return q, k, v if spec.v_norm is None else norm(v, None, spec.v_norm)


def queries(
    q: torch.Tensor, p: tree.Tree, spec: AttentionSpec, table: Table | None
) -> torch.Tensor:
    """Raw q [b, s, h, d] as in `prepared`, where its keys are another layer's."""
    q = _alone(q, p.get("q_norm"), spec, table)
    if table is not None and table.query_scale is not None:
        q = q * table.query_scale[..., None, None].to(q.dtype)
    return q


def keys_values(
    k: torch.Tensor, v: torch.Tensor, p: tree.Tree, spec: AttentionSpec, table: Table | None
) -> Heads:
    """Raw k and v [b, s, k, d] as in `prepared`, by themselves."""
    k = _alone(k, p.get("k_norm"), spec, table)
    if spec.clip is not None:
        v = v.clamp(-spec.clip, spec.clip)
    return k, v if spec.v_norm is None else norm(v, None, spec.v_norm)


def _alone(
    x: torch.Tensor, p: dict[str, torch.Tensor] | None, spec: AttentionSpec, table: Table | None
) -> torch.Tensor:
    if spec.clip is not None:
        x = x.clamp(-spec.clip, spec.clip)
    if spec.qk_norm is not None and not spec.qk_norm_after:
        x = _head_norm(x, p, spec, spec.qk_norm)
    if spec.rope is not None and spec.rope.dim and table is not None:
        x = rope(x, table.cos, table.sin, interleaved=spec.rope.interleaved)
    if spec.qk_norm is not None and spec.qk_norm_after:
        x = _head_norm(x, p, spec, spec.qk_norm)
    return x


def head_norm(p: tree.Tree, spec: AttentionSpec) -> HeadNorm | None:
    """The norm of each head of q and k if it runs with their rotation: an RMSNorm before it."""
    how = spec.qk_norm
    if how is None or how.kind != "rms" or not how.weight:
        return None
    if spec.qk_norm_over != "head" or spec.qk_norm_after:
        return None
    weights = p["q_norm"]["weight"], p["k_norm"]["weight"]
    return HeadNorm(*weights, how.eps, how.offset, how.cast_first)


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


class Terms(TypedDict):
    """What a layer's logits are made with beside q and k, as the kernels take it."""

    scale: float
    softcap: float | None
    sinks: torch.Tensor | None
    bias: torch.Tensor | None


def terms(spec: AttentionSpec, p: tree.Tree, keys: int, device: torch.device) -> Terms:
    """The terms of a layer with params `p` whose keys stand at positions below `keys`."""
    bias = None
    if spec.alibi is not None:
        bias = alibi.bias(spec.heads, keys, spec.alibi, device=device)
    return {
        "scale": spec.scale,
        "softcap": spec.softcap,
        "sinks": p["sinks"] if spec.sinks else None,
        "bias": bias,
    }


def reach(keys: torch.Tensor, seen: Visible) -> int:
    """How many tokens a row of a cache's keys [b, capacity, ...] or [n, page, ...] can hold."""
    if isinstance(seen, Span) and seen.table is not None:
        return keys.shape[1] * seen.table.shape[1]
    return keys.shape[1]


def needs_mask(layout: Layout, dtype: torch.dtype, chunk: int | None = None) -> bool:
    """Whether `visible` is a mask for whole rows, without a cache before them."""
    device = layout.positions.device
    if chunk is not None and chunk < layout.positions.shape[1]:
        return True
    fits = layout.documents is not None and fused(device, dtype)
    return layout.segments is not None and not fits


def visible(
    queries: Layout,
    segments: torch.Tensor | None,
    offset: int,
    dtype: torch.dtype,
    window: int | None,
    chunk: int | None = None,
) -> Visible:
    """Which keys each query sees: bool [b or 1, 1, s, S], the documents where a fused kernel takes
    them from heads of `dtype`, or None where causal order says it. Where it is no mask, the window
    is left to `attend`.

    The queries are tokens offset..offset+s of rows whose keys have `segments` [b, S] (None: one
    segment without padding, S = offset + s).
    """
    s, device = queries.positions.shape[1], queries.positions.device
    total = offset + s
    unlimited = window is None or window >= total
    chunked = chunk is not None and chunk < total
    if offset == 0 and not needs_mask(queries, dtype, chunk):
        return None if segments is None else queries.documents
    if segments is None and not chunked and s == 1 and unlimited:
        return None
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
    seen: Visible,
    window: int | None = None,
    **how: Unpack[Terms],
) -> torch.Tensor:
    """softmax(scale q k^T) v for q [b, s, h, d], k and v [b, S, k, d] -> [b, s, h, d].

    Statistics in fp32. Without `seen`, S is s or s is 1: every query sees all keys up to its own,
    the last `window` of them if S is s.
    With a mask, terms that torch's backends lack make the scores be written out, [b, h, s, S] in
    fp32.
    """
    if isinstance(seen, Span):
        return decode_attention(q[:, 0], k, v, *seen, **how)[:, None]
    if isinstance(seen, Documents) or (seen is None and q.shape[1] == k.shape[1] > 1):
        return attention(q, k, v, documents=seen, window=window, **how)
    if how["softcap"] is not None or how["sinks"] is not None or how["bias"] is not None:
        return _written_out(q, k, v, seen, **how)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if seen is not None and q.is_cuda:
        # With a mask, grouped heads leave torch only its unfused kernel: give every head its keys.
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=seen, scale=how["scale"], enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2)


def _written_out(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seen: torch.Tensor | None,
    *,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """`attend` with every term, under a mask or with one query a row that sees all keys."""
    groups = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k)
    scores = scores.to(torch.promote_types(q.dtype, torch.float32)) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if seen is None:
        seen = scores.new_ones(1, 1, 1, k.shape[1], dtype=torch.bool)
    if bias is not None:
        # What a query sees of its document stands without gaps: counting gives positions.
        place = (seen.long().cumsum(-1) - 1).clamp(min=0)
        scores = scores + bias[:, place[:, 0]].transpose(0, 1).to(scores.dtype)
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        column = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, column], -1)
    # A row of padding may see nothing: zeros instead of NaN.
    weights = scores.softmax(-1).nan_to_num(0.0)[..., : k.shape[1]].to(q.dtype)
    return torch.einsum("bhij,bjhd->bihd", weights, v)
