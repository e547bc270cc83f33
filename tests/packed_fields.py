"""Unsigned numbers of a few bits in int32 words, written bit by bit."""

import torch


def packed(fields: torch.Tensor, bits: int) -> torch.Tensor:
    """Unsigned fields [n, m] -> int32 [ceil(n * bits / 32), m], the first in the lowest bits."""
    each = (fields.long()[:, None] >> torch.arange(bits)[:, None]) & 1
    each = each.flatten(0, 1)
    each = torch.nn.functional.pad(each, (0, 0, 0, -len(each) % 32))
    words = (each.reshape(-1, 32, fields.shape[1]) << torch.arange(32)[:, None]).sum(1)
    return torch.where(words >= 2**31, words - 2**32, words).int()
