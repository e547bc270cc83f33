"""Causal attention over grouped heads, and which keys a query may see."""

import torch
import torch.nn.functional as F

from ..kernels.attention import Documents, attention
from .layout import Layout

Visible = torch.Tensor | Documents | None


def visible(
    queries: Layout, segments: torch.Tensor | None, offset: int, window: int | None
) -> Visible:
    """Which keys each query sees: bool [b or 1, 1, s, S], the documents of a packed row where a
    fused kernel takes them, or None where plain causal order says it.

    The queries are tokens offset..offset+s of rows whose keys have `segments` [b, S] (None: one
    segment without padding, S = offset + s).
    """
    s, device = queries.positions.shape[1], queries.positions.device
    total = offset + s
    unlimited = window is None or window >= total
    if segments is None and unlimited and (offset == 0 or s == 1):
        return None
    if queries.documents is not None and queries.positions.is_cuda and unlimited and offset == 0:
        return queries.documents
    i = torch.arange(offset, total, device=device)[:, None]
    j = torch.arange(total, device=device)[None, :]
    seen = j <= i
    if window is not None and not unlimited:
        seen = seen & (i - j < window)
    seen = seen[None, None]
    if segments is not None:
        own = segments[:, None, offset:, None] == segments[:, None, None, :]
        seen = seen & own
    return seen


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, seen: Visible
) -> torch.Tensor:
    """softmax(scale q k^T) v for q [b, s, h, d], k and v [b, S, k, d] -> [b, s, h, d].

    Statistics in fp32. Without `seen`, S is s or s is 1: every query sees all keys up to its own.
    """
    if isinstance(seen, Documents) or (seen is None and q.shape[1] > 1):
        return attention(q, k, v, scale=scale, documents=seen)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if seen is not None and q.is_cuda:
        # With a mask, grouped heads leave torch only its unfused kernel: give every head its keys.
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=seen, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2)
