"""ALiBi's bias: a slope per head times the key's position (Press et al., arXiv 2108.12409)."""

import math

import torch


def bias(
    heads: int, keys: int, factor: float, *, device: torch.device | str | None = None
) -> torch.Tensor:
    """What a key at position j of its document adds to every logit of a head: fp32 [h, keys].

    Of slopes that differ from query to query by a constant alone the softmax sees the distance.
    Slope and product are rounded to bf16, then multiplied with `factor`, as transformers' Falcon
    does. Nothing is read from the host, so that a graph can hold it.
    """
    slopes = _slopes(heads, device).bfloat16()
    return (slopes[:, None] * torch.arange(keys, device=device)).float() * factor


def _slopes(heads: int, device: torch.device | str | None) -> torch.Tensor:
    """Powers of 2^(-8 / n) for the power of two n below, then every other one of those for 2n."""
    below = 2 ** int(math.log2(heads))
    slopes = _powers(below, torch.arange(1, 1 + below, device=device))
    if below == heads:
        return slopes
    odd = torch.arange(1, 1 + 2 * (heads - below), 2, device=device)
    return torch.cat([slopes, _powers(2 * below, odd)])


def _powers(heads: int, exponents: torch.Tensor) -> torch.Tensor:
    base = torch.full((), 2 ** (-8 / heads), dtype=torch.float32, device=exponents.device)
    return base.pow(exponents.int())
