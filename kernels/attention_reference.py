"""Causal attention in plain torch, forward and backward: what every backend is held to."""

from __future__ import annotations

from typing import NamedTuple, NotRequired, TypedDict

import torch
from torch import Tensor


class Documents(NamedTuple):
    """Documents of a packed row: token offsets cu_seqlens int32 [n + 1] and the longest length.

    With several rows [b, s], the tokens of all, row by row, count as one row of b * s.
    """

    cu_seqlens: Tensor
    longest: int


class Terms(NamedTuple):
    """What becomes of q k^T before the softmax.

    The logit of query i and key j, j <= i of one document, is c tanh(scale q k / c) for `softcap` c
    (else scale q k), plus bias[head, position of j in its document] (`bias` fp32 [h, n], n at least
    the longest document; ALiBi). With a `window` only keys 0 <= i - j < window count. The softmax's
    denominator has exp(sinks[head]) as another term (`sinks` [h]).
    """

    scale: float
    documents: Documents | None = None
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    bias: Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether torch's own backends have all that is asked for."""
        return self.softcap is None and self.sinks is None and self.bias is None


class Keywords(TypedDict):
    """The fields of `Terms` as keyword arguments."""

    scale: float
    documents: NotRequired[Documents | None]
    window: NotRequired[int | None]
    softcap: NotRequired[float | None]
    sinks: NotRequired[Tensor | None]
    bias: NotRequired[Tensor | None]


def one_row(x: Tensor, terms: Terms) -> Tensor:
    """[b, s, ...] as the one row [1, b * s, ...] that documents are cut from."""
    return x if terms.documents is None or x.shape[0] == 1 else x.flatten(0, 1)[None]


def reference(q: Tensor, k: Tensor, v: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:
    """(out [b, s, h, d], log-sum-exp fp32 [b, h, s], [1, h, b * s] with documents) in plain
    differentiable operations; weights are rounded to v's dtype.
    """
    shape = q.shape
    q, k, v = (one_row(x, terms) for x in (q, k, v))
    wide_k, wide_v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    scores, _ = _scores(q, wide_k, terms)
    lse = scores.logsumexp(-1)
    if terms.sinks is not None:
        lse = torch.logaddexp(lse, terms.sinks.to(lse.dtype)[:, None])
    weights = (scores - lse[..., None]).exp().to(q.dtype)
    return torch.einsum("bhij,bjhd->bihd", weights, wide_v).reshape(shape), lse


def reference_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, terms: Terms
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(dq, dk, dv, dsinks) from the inputs alone, so that second derivatives are right too."""
    shape, kv_shape = q.shape, k.shape
    dout, q, k, v = (one_row(x, terms) for x in (dout, q, k, v))
    groups = q.shape[2] // k.shape[2]
    wide_k, wide_v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    scores, slope = _scores(q, wide_k, terms)
    dsinks = None
    if terms.sinks is None:
        weights = scores.softmax(-1)
    else:
        sinks = terms.sinks.to(scores.dtype)[:, None]
        lse = torch.logaddexp(scores.logsumexp(-1), sinks)
        weights = (scores - lse[..., None]).exp()
    dweights = torch.einsum("bihd,bjhd->bhij", dout, wide_v).to(weights.dtype)
    mean = (weights * dweights).sum(-1, keepdim=True)
    if terms.sinks is not None:
        dsinks = -((sinks - lse).exp() * mean[..., 0]).sum((0, 2)).to(terms.sinks.dtype)
    dscores = weights * (dweights - mean) * terms.scale
    dscores = (dscores if slope is None else dscores * slope).to(q.dtype)
    dq = torch.einsum("bhij,bjhd->bihd", dscores, wide_k)
    dk = torch.einsum("bhij,bihd->bjhd", dscores, q)
    dv = torch.einsum("bhij,bihd->bjhd", weights.to(q.dtype), dout)
    grouped = (*k.shape[:3], groups, k.shape[3])
    dk, dv = (x.reshape(grouped).sum(3).reshape(kv_shape) for x in (dk, dv))
    return dq.reshape(shape), dk, dv, dsinks


def _scores(q: Tensor, k: Tensor, terms: Terms) -> tuple[Tensor, Tensor | None]:
    """Masked logits [b, h, s, s], fp32 or wider, and their derivative by the scaled products where
    it is not 1.
    """
    s, slope = q.shape[1], None
    scores = torch.einsum("bihd,bjhd->bhij", q, k)
    scores = scores.to(torch.promote_types(q.dtype, torch.float32)) * terms.scale
    if terms.softcap is not None:
        squashed = torch.tanh(scores / terms.softcap)
        scores, slope = squashed * terms.softcap, 1 - squashed * squashed
    index = torch.arange(s, device=q.device)
    seen = index[None, :] <= index[:, None]
    if terms.window is not None:
        seen = seen & (index[:, None] - index[None, :] < terms.window)
    place = index
    if terms.documents is not None:
        cu = terms.documents.cu_seqlens.long()
        document = torch.bucketize(index, cu[1:], right=True)
        seen = seen & (document[None, :] == document[:, None])
        # Tokens behind the last document are one more.
        place = index - cu[document]
    if terms.bias is not None:
        wide = terms.bias.to(scores.dtype)
        scores = scores + wide[:, place.clamp(max=wide.shape[1] - 1)][:, None]
    return scores.masked_fill(~seen, float("-inf")), slope


def sinks_gradient(dout: Tensor, out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """The gradient of `sinks` [h] from an output, its gradient and its log-sum-exp as `reference`
    gives them.
    """
    mean = (dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
    weight = (sinks.to(lse.dtype)[:, None] - lse).exp()
    return -(weight * mean.transpose(1, 2).reshape(weight.shape)).sum((0, 2)).to(sinks.dtype)
