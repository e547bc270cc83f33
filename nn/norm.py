"""Normalisation over the last axis, of either kind, and what a layer adds up."""

from typing import Any, TypeGuard

import torch
import torch.nn.functional as F

from ..kernels import fp8_made
from ..kernels.fp8 import Rows, cast_rows
from ..kernels.rms_norm import rms_norm, rms_norm_pull
from .spec import LayerSpec, NormSpec


def _has_kernel(p: dict[str, torch.Tensor] | None, spec: NormSpec) -> TypeGuard[dict[str, Any]]:
    """RMSNorm with a weight, and LayerNorm with one for all heads and no bias."""
    if p is None or spec.kind == "rms":
        return p is not None
    return p.get("bias") is None and p["weight"].ndim == 1


def _how(spec: NormSpec) -> dict[str, Any]:
    if spec.kind == "layer":
        return {"offset": spec.offset, "cast_first": False, "centered": True}
    return {"offset": spec.offset, "cast_first": spec.cast_first}


def norm(
    x: torch.Tensor,
    p: dict[str, torch.Tensor] | None,
    spec: NormSpec,
    onto: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [..., d] normalised and weighted, in its dtype, added to `onto` if there is that; the
    weight is [d], or [h, d] per head.

    `p` is None where the spec has no weight.
    """
    if _has_kernel(p, spec):
        return rms_norm(x, p["weight"], spec.eps, **_how(spec), onto=onto)
    made = _plain(x, p, spec)
    return made if onto is None else onto + made


def norm_rows(
    x: torch.Tensor, p: dict[str, torch.Tensor] | None, spec: NormSpec
) -> tuple[torch.Tensor, Rows]:
    """`norm`, and its rows in e4m3: of a kernel that makes both, where there is one. Builds no
    graph.
    """
    if p is not None and spec.kind == "rms":
        how: dict[str, Any] = {"offset": spec.offset, "cast_first": spec.cast_first}
        return fp8_made.norm_rows(x, p["weight"], spec.eps, **how)
    y = norm(x, p, spec)
    return y, cast_rows(y.reshape(-1, y.shape[-1]))


def _plain(x: torch.Tensor, p: dict[str, torch.Tensor] | None, spec: NormSpec) -> torch.Tensor:
    """A norm without a kernel of ours."""
    if p is None and spec.kind == "rms":
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return F.rms_norm(wide, x.shape[-1:], eps=spec.eps).to(x.dtype)
    if p is None:
        return F.layer_norm(x, x.shape[-1:], eps=spec.eps)
    weight, bias = p["weight"], p.get("bias")
    if weight.ndim == 1:
        weight = weight + spec.offset if spec.offset else weight
        return F.layer_norm(x, x.shape[-1:], weight, bias, spec.eps)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = F.layer_norm(wide, x.shape[-1:], eps=spec.eps) * (weight + spec.offset)
    return (wide if bias is None else wide + bias).to(x.dtype)


def pull(
    dy: torch.Tensor,
    x: torch.Tensor,
    p: dict[str, torch.Tensor] | None,
    spec: NormSpec,
    onto: torch.Tensor | None = None,
) -> torch.Tensor:
    """The backward of `norm` to x, for a frozen weight: dy [..., d] of its result to dx, plus
    `onto`, what reaches x beside the norm. Builds no graph.
    """
    if _has_kernel(p, spec):
        return rms_norm_pull(dy, x, p["weight"], spec.eps, **_how(spec), onto=onto)
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        normed = norm(x, p, spec)
    dx: torch.Tensor = torch.autograd.grad(normed, x, dy)[0]
    return dx if onto is None else dx + onto


def add(x: torch.Tensor, branch: torch.Tensor, p: Any, spec: LayerSpec) -> torch.Tensor:
    """x plus what a branch made, normalised and scaled where the layer does that."""
    if p is not None and spec.residual_scale == 1.0:
        return norm(branch, p, spec.norm, onto=x)
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
    return pull(dy, branch, p, spec.norm)
