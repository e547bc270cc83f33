"""Normalisation over the last axis, of either kind, and what a layer adds up."""

from typing import Any

import torch
import torch.nn.functional as F

from ..kernels.rms_norm import rms_norm
from .spec import LayerSpec, NormSpec


def norm(x: torch.Tensor, p: dict[str, torch.Tensor] | None, spec: NormSpec) -> torch.Tensor:
    """x [..., d] normalised and weighted, in its dtype; the weight is [d], or [h, d] per head.

    `p` is None where the spec has no weight.
    """
    if p is None and spec.kind == "rms":
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return F.rms_norm(wide, x.shape[-1:], eps=spec.eps).to(x.dtype)
    if p is None:
        return F.layer_norm(x, x.shape[-1:], eps=spec.eps)
    weight, bias = p["weight"], p.get("bias")
    if spec.kind == "rms":
        return rms_norm(x, weight, spec.eps, offset=spec.offset, cast_first=spec.cast_first)
    if weight.ndim == 1:
        weight = weight + spec.offset if spec.offset else weight
        return F.layer_norm(x, x.shape[-1:], weight, bias, spec.eps)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = F.layer_norm(wide, x.shape[-1:], eps=spec.eps) * (weight + spec.offset)
    return (wide if bias is None else wide + bias).to(x.dtype)


def add(x: torch.Tensor, branch: torch.Tensor, p: Any, spec: LayerSpec) -> torch.Tensor:
    """x plus what a branch made, normalised and scaled where the layer does that."""
    if p is not None:
        branch = norm(branch, p, spec.norm)
    return x + (branch if spec.residual_scale == 1.0 else branch * spec.residual_scale)


def add_backward(
    dy: torch.Tensor, branch: torch.Tensor | None, p: Any, spec: LayerSpec
) -> torch.Tensor:
    """From the gradient of `add(x, branch, p, spec)` to that of `branch`, read only with a norm."""
    dy = dy if spec.residual_scale == 1.0 else dy * spec.residual_scale
    if p is None:
        return dy
    assert branch is not None
    with torch.enable_grad():
        branch = branch.detach().requires_grad_()
        normed = norm(branch, p, spec.norm)
    found: torch.Tensor = torch.autograd.grad(normed, branch, dy)[0]
    return found
