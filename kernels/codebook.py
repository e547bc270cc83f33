"""The value tables of the quantized formats: sixteen levels each of NF4 and FP4, the signed 8-bit
dynamic map.

NF4: Dettmers et al., "QLoRA" (arXiv 2305.14314), appendix E. FP4, bitsandbytes' own: a sign bit,
then by code the magnitudes 0, 1/192, 2/3, 1, 1/3, 1/2, 1/6, 1/4. Dynamic map: Dettmers et al.,
"8-bit Optimizers via Block-wise Quantization" (arXiv 2110.02861). All equal bitsandbytes' tables
bit for bit.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

# Maxima of blocks that share one scale under double quantization.
GROUP = 256

NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


# By code; the literals are those that round to bitsandbytes' fp32 values.
_FP4_MAGNITUDES = (
    0.0,
    0.0052083334885537624,
    0.6666666865348816,
    1.0,
    0.3333333432674408,
    0.5,
    0.1666666716337204,
    0.25,
)
FP4_LEVELS = (*_FP4_MAGNITUDES, 0.0, *(-value for value in _FP4_MAGNITUDES[1:]))

# The values by code of each 4-bit kind.
LEVELS = {"nf4": NF4_LEVELS, "fp4": FP4_LEVELS}
# The code of each value in ascending order; of FP4's two zeros code 0 is the lower.
ORDER = {"nf4": tuple(range(16)), "fp4": (11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3)}


def levels_of(kind: str, device: torch.device | None = None) -> Tensor:
    """The sixteen values of a 4-bit kind by code, fp32."""
    return torch.tensor(LEVELS[kind], dtype=torch.float32, device=device)


def order_of(kind: str, device: torch.device | None = None) -> Tensor:
    """The code of each value of a 4-bit kind in ascending order, uint8."""
    return torch.tensor(ORDER[kind], dtype=torch.uint8, device=device)


def thresholds_of(kind: str, device: torch.device | None = None) -> Tensor:
    """The fifteen midpoints between a 4-bit kind's neighbouring values, fp32, ascending."""
    return midpoints(levels_of(kind, device)[order_of(kind, device).int()])


def nf4_levels(device: torch.device | None = None) -> Tensor:
    """The sixteen NF4 values, fp32, ascending."""
    return torch.tensor(NF4_LEVELS, dtype=torch.float32, device=device)


def dynamic_map(device: torch.device | None = None) -> Tensor:
    """The 256 values of the signed 8-bit dynamic type, fp32, ascending.

    For each decimal exponent -6..0 the interval [0.1, 1] is cut into 1, 2, ... 64 equal parts,
    whose centres, scaled by the exponent, are taken with both signs; 0 and 1 complete the map.
    """
    positive = []
    for exponent in range(-6, 1):
        edges = torch.linspace(0.1, 1, 2 ** (exponent + 6) + 1, dtype=torch.float32, device="cpu")
        positive.append((edges[:-1] + edges[1:]) / 2.0 * 10.0**exponent)
    half = torch.cat(positive)
    values = torch.cat([-half, torch.tensor([0.0, 1.0], device="cpu"), half]).sort().values
    return values.to(device)


def midpoints(levels: Tensor) -> Tensor:
    """The fp32 thresholds between neighbouring levels: a value above k of them gets code k."""
    return (levels[:-1] + levels[1:]) / 2


def dynamic_points() -> Tensor:
    """uint8 [65536]: the dynamic map's nearest code for each of as many even points of [-1, 1]."""
    points = -1.0 + (2.0 * torch.arange(65536)) / 65535.0
    return torch.bucketize(points, midpoints(dynamic_map())).to(torch.uint8)


def nf4_bins() -> Tensor:
    """int32 [2, 32] by the low five bits of round(15 x): the bits of the one NF4 threshold in that
    bin (infinity where none is), and how many thresholds lie in lower bins.
    """
    thresholds = thresholds_of("nf4")
    at = (thresholds * 15.0).round().int()
    held, below = torch.full((32,), float("inf")), torch.zeros(32, dtype=torch.int32)
    for i in range(-16, 16):
        if bool((at == i).any()):
            held[i % 32] = thresholds[at == i].item()
        below[i % 32] = (at < i).sum()
    return torch.stack([held.view(torch.int32), below])


class Tables(NamedTuple):
    """What the launches look up: a kind's levels by code and their thresholds, the dynamic map, its
    codes by point, the kind's codes in ascending order, NF4's bins.
    """

    levels: Tensor
    thresholds: Tensor
    dynamic: Tensor
    points: Tensor
    order: Tensor
    bins: Tensor


@functools.cache
def device_tables(device: torch.device, kind: str = "nf4") -> Tables:
    """The tables on a device, made once for the launches there."""
    with torch.inference_mode(False), torch.no_grad():
        tables = (
            levels_of(kind),
            thresholds_of(kind),
            dynamic_map(),
            dynamic_points(),
            order_of(kind),
            nf4_bins(),
        )
        return Tables(*(table.to(device) for table in tables))
