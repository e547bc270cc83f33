"""Drawn inputs of attention with any of its terms, and how close to float64 it must come."""

from dataclasses import dataclass

import torch

from purelm.kernels.attention import Documents, attention, attention_reference


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


def hold(drawn):
    """Ours within the rule: what eager is off in the worst of outputs and gradients, twice."""
    dtype, real = drawn.q.dtype, drawn.q.shape[1]
    if drawn.how["documents"] is not None:
        real = int(drawn.how["documents"].cu_seqlens[-1])
    mine = drawn.gradients(attention)
    eager = drawn.gradients(reference)
    exact = drawn.gradients(reference, torch.float64)

    # One measure for all: where products cancel out (few keys: dq and dk are near 0), what is left
    # has the rounding of the output that it is made of.
    least = max(float(x.abs().max()) for x in exact)

    def errors(found):
        out = []
        for i, (a, x) in enumerate(zip(found, exact, strict=True)):
            if i < 4:
                a, x = a[:, :real], x[:, :real]
            out.append(float((a.double() - x).abs().max() / x.abs().max().clamp(min=least)))
        return out

    # The kernels serve 16 bits; fp32, which shows their logic sharper, passes by a few roundings of
    # logits in other units.
    limit = 2 * max(errors(eager)) + torch.finfo(dtype).eps * (64 if dtype == torch.float32 else 1)
    assert all(error <= limit for error in errors(mine)), (errors(mine), errors(eager))
    assert not any(a[:, real:].any() for a in mine[:4])
    assert all(a.dtype == dtype for a in mine[:4])
