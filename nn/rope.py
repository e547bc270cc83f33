"""Rotary tables: inverse frequencies of every scaling kind, and cos/sin at given positions.

Each kind equals its function in transformers' `modeling_rope_utils`, in the same order of fp32
operations.
"""

import functools
import math
from typing import NamedTuple

import torch

from .spec import RopeSpec


class Table(NamedTuple):
    """cos and sin [b, s, dim], each angle at both of its features, and what queries are multiplied
    with [b, s], if with anything; all in fp32.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    query_scale: torch.Tensor | None = None


def table(rope: RopeSpec, positions: torch.Tensor) -> Table:
    """The table of positions [b, s]."""
    inv_freq = _frequencies(rope, positions)
    angles = positions[..., None].float() * inv_freq
    if rope.interleaved:
        angles = angles.repeat_interleave(2, dim=-1)
    else:
        angles = torch.cat([angles, angles], dim=-1)
    cos, sin, factor = angles.cos(), angles.sin(), _magnitude(rope, positions)
    if not isinstance(factor, float) or factor != 1.0:
        cos, sin = cos * factor, sin * factor
    return Table(cos, sin, _query_scale(rope, positions))


def _query_scale(rope: RopeSpec, positions: torch.Tensor) -> torch.Tensor | None:
    if not rope.query_beta:
        return None
    steps = torch.floor((positions + rope.query_shift) / rope.original_positions)
    return 1 + rope.query_beta * torch.log(1 + steps)


def _magnitude(rope: RopeSpec, positions: torch.Tensor) -> float | torch.Tensor:
    """What cos and sin are multiplied with; a scalar tensor where it follows the longest row."""
    if rope.short_magnitude is None or rope.long_magnitude is None:
        return attention_factor(rope)
    short, long = _constant((rope.short_magnitude, rope.long_magnitude), positions.device)
    return torch.where(positions.max() >= rope.original_positions, long, short)


def attention_factor(rope: RopeSpec) -> float:
    """What cos and sin are multiplied with (YaRN, arXiv 2309.00071, eq. 22; LongRoPE,
    arXiv 2402.13753, sec. 3.4)."""
    if rope.kind not in ("yarn", "longrope"):
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.kind == "longrope":
        grown = rope.factor > 1
        return (
            math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_positions))
            if grown
            else 1.0
        )
    if rope.mscale and rope.mscale_all_dim:
        return _mscale(rope.factor, rope.mscale) / _mscale(rope.factor, rope.mscale_all_dim)
    return _mscale(rope.factor, 1.0)


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _frequencies(rope: RopeSpec, positions: torch.Tensor) -> torch.Tensor:
    """`inverse_frequencies`, kept from one call to the next where they hold for all positions: a
    step of decoding would spend a dozen launches on them.
    """
    varies = rope.kind in ("dynamic", "longrope") or torch.compiler.is_compiling()
    if varies or torch._C._len_torch_dispatch_stack() > 0:
        return inverse_frequencies(rope, positions)
    return _kept(rope, positions.device)


@functools.cache
def _kept(rope: RopeSpec, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False), torch.no_grad():
        return inverse_frequencies(rope, torch.zeros(1, 1, dtype=torch.int64, device=device))


def inverse_frequencies(rope: RopeSpec, positions: torch.Tensor) -> torch.Tensor:
    """[dim / 2] in fp32, on the device of `positions`; "dynamic" and "longrope" read the
    longest of them."""
    exponents = torch.arange(0, rope.dim, 2, device=positions.device).float() / rope.dim
    if rope.kind == "dynamic":
        return 1.0 / (_dynamic_base(rope, positions) ** exponents)
    powers = rope.theta**exponents
    if rope.kind == "longrope":
        long, short = (_constant(f, powers.device) for f in (rope.long_factors, rope.short_factors))
        grown = positions.max() >= rope.original_positions
        return 1.0 / (torch.where(grown, long, short) * powers)
    plain = 1.0 / powers
    if rope.kind == "linear":
        return plain / rope.factor
    if rope.kind == "proportional":
        still = torch.zeros_like(plain[rope.turned :])
        return torch.cat([plain[: rope.turned], still]) / rope.factor
    if rope.kind == "llama3":
        return _llama3(rope, plain)
    if rope.kind == "yarn":
        return _yarn(rope, powers)
    return plain


@functools.cache
def _constant(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """Numbers on a device in fp32, copied once: a copy from the host is no part of a graph."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float32, device=device)


def _dynamic_base(rope: RopeSpec, positions: torch.Tensor) -> torch.Tensor:
    """NTK-aware base, grown with the longest position once it passes the original length."""
    length = (positions.max() + 1).clamp(min=rope.original_positions).float()
    growth = rope.factor * length / rope.original_positions - (rope.factor - 1)
    return rope.theta * growth ** (rope.dim / (rope.dim - 2))


def _llama3(rope: RopeSpec, plain: torch.Tensor) -> torch.Tensor:
    low = rope.original_positions / rope.low_freq_factor
    high = rope.original_positions / rope.high_freq_factor
    wavelength = 2 * math.pi / plain
    scaled = torch.where(wavelength > low, plain / rope.factor, plain)
    smooth = (rope.original_positions / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    blended = (1 - smooth) * scaled / rope.factor + smooth * scaled
    between = ~(wavelength < high) & ~(wavelength > low)
    return torch.where(between, blended, scaled)


def _yarn(rope: RopeSpec, powers: torch.Tensor) -> torch.Tensor:
    def turning_dim(rotations: float) -> float:
        ratio = rope.original_positions / (rotations * 2 * math.pi)
        return rope.dim * math.log(ratio) / (2 * math.log(rope.theta))

    low, high = turning_dim(rope.beta_fast), turning_dim(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    if low == high:
        high += 0.001
    steps = torch.arange(rope.dim // 2, dtype=torch.float32, device=powers.device)
    keep = 1 - ((steps - low) / (high - low)).clamp(0, 1)
    return 1.0 / (rope.factor * powers) * (1 - keep) + 1.0 / powers * keep
