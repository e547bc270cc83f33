"""Fake quantization for quantization-aware training: values rounded to a format, kept in floats.

A model trained so loses little when it is later stored in that format. Each scheme says how weights
and how activations are rounded, by the arithmetic of torchao's converters, for which such a model
is meant: scales have the dtype of what they scale. Gradients pass straight through the rounding
(arXiv 1308.3432).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import KernelError

E4M3_MAX = 448.0
# The smallest scale of integers, and the smallest magnitude that float8 rows are scaled by.
_EPS, _SMALL = torch.finfo(torch.float32).eps, 1e-12
Round = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Scheme:
    """How a linear layer is rounded: its weight [out, in] in groups of `group` columns (None: in
    whole rows), and its input [..., in] a token at a time (None: not at all).
    """

    weight: Round
    activation: Round | None = None
    group: int | None = None


def int4_codes(w: Tensor) -> Tensor:
    """Groups [..., n] in 16 even steps from their smallest to their largest value."""
    wide = w.float()
    low, high = wide.amin(-1, keepdim=True), wide.amax(-1, keepdim=True)
    scale = (high - low).clamp(min=1e-6) / 15
    codes = ((wide - low) / scale).round().clamp(0, 15)
    return ((codes - 8) * scale + (low + scale * 8)).to(w.dtype)


def symmetric(bits: int) -> Round:
    """Groups [..., n] in steps of their largest magnitude over half the range of `bits`-bit
    integers, zero kept exactly.
    """
    high = (1 << (bits - 1)) - 1
    low = -high - 1

    def rounded(w: Tensor) -> Tensor:
        scale = (w.abs().amax(-1, keepdim=True) / ((high - low) / 2)).clamp(min=_EPS)
        return (w * (1.0 / scale)).round().clamp(low, high) * scale

    return rounded


def int8_token(x: Tensor) -> Tensor:
    """Tokens [..., n] in 256 even steps over their range with zero, which is kept exactly."""
    low = x.amin(-1, keepdim=True).clamp(max=0)
    high = x.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / 255.0).clamp(min=_EPS)
    zero = (-128 - (low / scale).round()).clamp(-128, 127)
    codes = ((x * (1.0 / scale)).round() + zero).clamp(-128, 127)
    return (codes - zero) * scale


def e4m3(x: Tensor) -> Tensor:
    """Rows [..., n] in float8 e4m3, scaled so that the largest magnitude is its largest value."""
    scale = (x.abs().amax(-1, keepdim=True).clamp(min=_SMALL) / E4M3_MAX).float()
    codes = (x.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return (codes.float() * scale).to(x.dtype)


def int4_for_e4m3(w: Tensor) -> Tensor:
    """Groups [..., n] in steps of an eighth of their largest magnitude, from -8 to 7 of them."""
    scale = (w.abs().amax(-1, keepdim=True) / 8).clamp(min=1e-6)
    return (w * (1.0 / scale)).round().clamp(-8, 7) * scale


SCHEMES = {
    "int4": Scheme(int4_codes, group=128),
    "int8": Scheme(symmetric(8)),
    "int8-int4": Scheme(symmetric(4), int8_token, group=32),
    "fp8-fp8": Scheme(e4m3, e4m3),
    "fp8-int4": Scheme(int4_for_e4m3, e4m3, group=128),
}
# Formats whose products need GPUs of compute capability 10 and above.
NEWER = ("nvfp4", "mxfp4", "mxfp8")


@dataclass(frozen=True, eq=False)
class Fake:
    """A weight [out, in] that is multiplied as if it were stored by `scheme`. A pytree node."""

    weight: Tensor
    scheme: str

    @property
    def shape(self) -> torch.Size:
        return self.weight.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.weight.device


def _split(leaf: Fake) -> tuple[list[Any], str]:
    return [leaf.weight], leaf.scheme


def _join(parts: Any, scheme: Any) -> Fake:
    (weight,) = parts
    return Fake(weight, scheme)


pytree.register_pytree_node(Fake, _split, _join, serialized_type_name="purelm.Fake")


def check(shape: Any, scheme: str, name: str) -> None:
    """Raise KernelError unless a weight of `shape` [out, in] can be rounded by `scheme`."""
    if scheme not in SCHEMES:
        raise KernelError(f"scheme {scheme!r}: expected one of {', '.join(SCHEMES)}")
    group = SCHEMES[scheme].group
    if group is not None and shape[-1] % group:
        raise KernelError(
            f"{name} {list(shape)}: {scheme!r} rounds groups of {group} columns, and "
            f"{shape[-1]} is no multiple of that"
        )


def weight_of(leaf: Fake) -> Tensor:
    """The rounded weight [out, in]; its gradient goes to the weight as it is."""
    scheme, w = SCHEMES[leaf.scheme], leaf.weight
    rounded = w.detach()
    if leaf.scheme == "fp8-int4":  # the format's 4-bit codes stand for values in fp8
        rounded = _rounded(e4m3, rounded)
    groups = rounded if scheme.group is None else rounded.view(*w.shape[:-1], -1, scheme.group)
    return _straight(w, _rounded(scheme.weight, groups).view(w.shape))


def linear(x: Tensor, leaf: Fake, bias: Tensor | None = None) -> Tensor:
    """x [..., in] -> [..., out], input and weight rounded; gradients pass straight through."""
    activation = SCHEMES[leaf.scheme].activation
    if activation is not None:
        x = _straight(x, _rounded(activation, x.detach()))
    weight = weight_of(leaf).to(x.dtype)
    return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


def _rounded(how: Round, x: Tensor) -> Tensor:
    # Scales and their inverses leave float16's range.
    return how(x.float()).to(x.dtype) if x.dtype == torch.float16 else how(x)


def _straight(x: Tensor, rounded: Tensor) -> Tensor:
    """`rounded` in value, `x` in gradient."""
    return rounded + (x - x.detach())
