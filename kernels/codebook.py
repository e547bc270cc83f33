"""The value tables of the quantized formats: NF4's sixteen levels, the signed 8-bit dynamic map.

NF4: Dettmers et al., "QLoRA" (arXiv 2305.14314), appendix E. Dynamic map: Dettmers et al., "8-bit
Optimizers via Block-wise Quantization" (arXiv 2110.02861). Both equal bitsandbytes' tables bit
for bit.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

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


@functools.cache
def device_tables(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(NF4 levels, NF4 midpoints, dynamic map, its midpoints) on a device, made once for the
    launches there.
    """
    with torch.inference_mode(False), torch.no_grad():
        nf4, dynamic = nf4_levels(), dynamic_map()
        tables = [nf4, midpoints(nf4), dynamic, midpoints(dynamic)]
        a, b, c, d = (table.to(device) for table in tables)
    return a, b, c, d
