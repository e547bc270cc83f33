"""Causal attention over grouped heads, and which keys a query may see."""

import torch
import torch.nn.functional as F

from .layout import Layout

Visible = torch.Tensor | None


def visible(
    queries: Layout, segments: torch.Tensor | None, offset: int, window: int | None
) -> Visible:
    """Which keys each query sees: bool [b or 1, 1, s, S], or None where plain causal order says it.

    The queries are tokens offset..offset+s of rows whose keys have `segments` [b, S] (None: one
    segment without padding, S = offset + s).
    """
    s, device = queries.positions.shape[1], queries.positions.device
    total = offset + s
    unlimited = window is None or window >= total
    if segments is None and unlimited and (offset == 0 or s == 1):
        return None
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

    Statistics in fp32 (torch's scaled_dot_product_attention). Without `seen` query i of the last s
    tokens sees every key up to its own.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    causal = seen is None and q.shape[-2] > 1
    if seen is not None and q.is_cuda:
        # With a mask, grouped heads leave torch only its unfused kernel: give every head its keys.
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=seen, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2)
