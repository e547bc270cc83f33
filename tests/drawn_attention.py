"""Drawn inputs of attention with any of its terms, and how close to float64 it must come."""

from dataclasses import dataclass

import torch

from purelm.kernels.attention import Documents, attention, attention_reference, sinks_gradient
from purelm.kernels.flash import LOG2E


@dataclass
class Drawn:
    """Inputs of one call; q, k and v may be strided views."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor
    how: dict

    def gradients(self, f, to=None):
        """(out, dq, dk, dv[, dsinks]) of `f`, all inputs in dtype `to`."""
        how = dict(self.how)
        tensors = [self.q, self.k, self.v]
        if how["sinks"] is not None:
            tensors.append(how["sinks"])
        tensors = [(t if to is None else t.to(to)).detach().requires_grad_() for t in tensors]
        how["sinks"] = tensors[3] if len(tensors) == 4 else None
        out = f(*tensors[:3], **how)
        return [out.detach(), *torch.autograd.grad(out, tensors, self.dout.to(out.dtype))]


def reference(*tensors, **how):
    return attention_reference(*tensors, **how)[0]


def draw(seed, lengths, packed, k, groups, d, dtype, window, extras, strided, device="cpu"):
    """Rows of one length, or documents of these `lengths` with two tokens of nobody behind them."""
    g = torch.Generator().manual_seed(seed)
    b, s = (1, sum(lengths) + 2) if packed else (len(lengths), lengths[0])
    if strided:
        # One matrix for all heads, as a fused projection makes it, or rows of a longer cache.
        both = torch.randn(b, s + 3, k * (groups + 2), d, generator=g)[:, :s]
        q, key, v = both.split([k * groups, k, k], 2)
    else:
        q, key, v = (torch.randn(b, s, n, d, generator=g) for n in (k * groups, k, k))
    tensors = [t.to(device, dtype) for t in (q * 2, key, v)]
    if strided:
        tensors = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in tensors]
    documents = None
    if packed:
        ends = torch.tensor([0, *lengths]).cumsum(0)
        documents = Documents(ends.int().to(device), max(lengths))
    heads = k * groups
    how = {
        "scale": d**-0.5,
        "documents": documents,
        "window": window,
        "softcap": 3.0 if "softcap" in extras else None,
        "sinks": torch.randn(heads, generator=g).to(device) if "sinks" in extras else None,
        "bias": torch.randn(heads, max(s, 9), generator=g).to(device) if "bias" in extras else None,
    }
    dout = torch.randn(b, s, heads, d, generator=g).to(device, dtype)
    if packed:
        dout[:, sum(lengths) :] = 0
    return Drawn(*tensors, dout, how)


def written_out(drawn):
    """[out, dq, dk, dv(, dsinks)] with all of FlashAttention-2's roundings and none of its tiles.

    Products and statistics are fp32, logits in units of log 2; rounded to the inputs' dtype are the
    weights below their row's largest, the output, from which the backward takes its sums of
    dout * out, the weights again and the gradients of the scores.
    """
    how, dtype, s = drawn.how, drawn.q.dtype, drawn.q.shape[1]
    groups = drawn.q.shape[2] // drawn.k.shape[2]
    wide = drawn.q, *(x.repeat_interleave(groups, 2) for x in (drawn.k, drawn.v)), drawn.dout
    q, k, v, dout = (x.transpose(1, 2).float() for x in wide)
    logits, slope = q @ k.mT, 1.0
    if how["softcap"] is None:
        logits = logits * (how["scale"] * LOG2E)
    else:
        powers = torch.exp2(logits * (2.0 * LOG2E * how["scale"] / how["softcap"]))
        tanh = 1.0 - 2.0 / (1.0 + powers)
        logits, slope = tanh * (how["softcap"] * LOG2E), 1.0 - tanh * tanh
    index = torch.arange(s, device=q.device)
    apart = index[:, None] - index
    seen = (apart >= 0) & (apart < (how["window"] or s))
    place = index
    if how["documents"] is not None:
        cu = how["documents"].cu_seqlens.long()
        document = torch.bucketize(index, cu[1:], right=True)
        seen = seen & (document == document[:, None])
        place = index - cu[document]
    if how["bias"] is not None:
        logits = logits + how["bias"][:, place][:, None] * LOG2E
    logits = logits.masked_fill(~seen, float("-inf"))
    top, sink = logits.amax(-1, keepdim=True), 0.0
    if how["sinks"] is not None:
        sink = how["sinks"][:, None, None] * LOG2E
        top = torch.maximum(top, sink)
        sink = torch.exp2(sink - top)
    weights = torch.exp2(logits - top)
    total = weights.sum(-1, keepdim=True) + sink
    out = (weights.to(dtype).float() @ v / total).to(dtype)
    lse = (top + total.log2()) / LOG2E
    weights = torch.exp2(logits - lse * LOG2E)
    delta = (dout * out.float()).sum(-1, keepdim=True)
    dscores = (weights * (dout @ v.mT - delta) * slope).to(dtype).float()
    dq = dscores @ k * how["scale"]
    dk = (dscores.mT @ q).unflatten(1, (-1, groups)).sum(2) * how["scale"]
    dv = (weights.to(dtype).float().mT @ dout).unflatten(1, (-1, groups)).sum(2)
    found = [x.transpose(1, 2).to(dtype) for x in (out, dq, dk, dv)]
    if how["sinks"] is not None:
        found.append(sinks_gradient(drawn.dout, found[0], lse[..., 0], how["sinks"]))
    return found


def excess(found, like, exact, real):
    """By tensor, how many times `like`'s largest error the error of `found` is, a rounding of the
    largest value set aside: the tolerance rule over whole tensors, whose limit is 2.
    """
    ratios = []
    for i, (a, b, x) in enumerate(zip(found, like, exact, strict=True)):
        if i < 4:
            a, b, x = (t[:, :real] for t in (a, b, x))
        error, yard = ((t.double() - x).abs().max() for t in (a, b))
        spare = error - torch.finfo(a.dtype).eps * x.abs().max()
        ratios.append(0.0 if spare <= 0 else float(spare / yard))
    return ratios


def hold(drawn):
    """Ours within twice the error of the same arithmetic written out, in every tensor."""
    dtype, real = drawn.q.dtype, drawn.q.shape[1]
    if drawn.how["documents"] is not None:
        real = int(drawn.how["documents"].cu_seqlens[-1])
    mine = drawn.gradients(attention)
    exact = drawn.gradients(reference, torch.float64)
    ratios = excess(mine, written_out(drawn), exact, real)
    assert all(ratio <= 2 for ratio in ratios), ratios
    assert not any(a[:, real:].any() for a in mine[:4])
    assert all(a.dtype == dtype for a in mine[:4])
