"""Decays between tokens of a chunk, out of their logarithms token by token."""

import torch


def sums(decay: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cumulative sums along `dim` as two numbers that add up: their differences are exact to the
    rounding of the difference, where those of single sums carry that of the sums.
    """
    added = decay.double().cumsum(dim)
    high = added.to(decay.dtype)
    return high, (added - high.double()).to(decay.dtype)


def between(high: torch.Tensor, low: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """exp(sum_i - sum_j) [..., i, j] of sums [..., i] where `mask` is true, else 0."""
    passed = (high[..., :, None] - high[..., None, :]) + (low[..., :, None] - low[..., None, :])
    return passed.masked_fill(~mask, -torch.inf).exp()
