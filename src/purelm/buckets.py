"""Few shapes for many batches: what rows are filled up to, so that a captured step fits them.

A packed row of any number of tokens and documents becomes one of a few shapes: padding tokens
behind it, in documents of their own that teach nothing, and documents without tokens behind these.
Neither changes the loss or a gradient, and only the padding tokens cost time: at most a quarter of
the row's, or 127.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch

from .nn.layout import right_padded
from .nn.loss import IGNORE

_LEAST_TOKENS, _LEAST_LENGTH = 128, 64


@dataclass(frozen=True, slots=True)
class Bucket:
    """A shape: tokens in the row, documents in it, and the length that no document exceeds."""

    tokens: int
    documents: int
    longest: int


def bucket_for(cu_seqlens: torch.Tensor) -> Bucket:
    """The least bucket that holds a packed row of these documents, int [n + 1] on the CPU.

    Four sizes of row to each doubling; documents and their longest in powers of two.
    """
    ends: list[int] = cu_seqlens.tolist()
    count, total = len(ends) - 1, ends[-1]
    longest = max(end - start for start, end in pairwise(ends))
    unit = max(_LEAST_TOKENS, _power_of_two(total) // 8)
    tokens = -(-total // unit) * unit
    # However little is missing, a quarter of the row may: in pieces no longer than the longest.
    pieces = -(-(unit - 1) // longest)
    return Bucket(tokens, _power_of_two(count + pieces), max(_LEAST_LENGTH, _power_of_two(longest)))


def filled(
    input_ids: torch.Tensor, labels: torch.Tensor, cu_seqlens: torch.Tensor, bucket: Bucket
) -> dict[str, torch.Tensor]:
    """A packed row [1, t] on the CPU as one of `bucket.tokens`, with cu_seqlens
    [bucket.documents + 1].
    """
    ends: list[int] = cu_seqlens.tolist()
    longest = max(end - start for start, end in pairwise(ends))
    padding = bucket.tokens - input_ids.shape[1]
    more = range(ends[-1] + longest, bucket.tokens, longest)
    ends = [*ends, *more]
    ends += [bucket.tokens] * (bucket.documents + 1 - len(ends))
    return {
        "input_ids": torch.nn.functional.pad(input_ids, (0, padding)),
        "labels": torch.nn.functional.pad(labels, (0, padding), value=IGNORE),
        "cu_seqlens": torch.tensor(ends, dtype=torch.int32),
    }


def widened(
    input_ids: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor, most: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Padded rows [b, s] as wider ones, at most `most` if they were not wider; what is real comes
    first in each row, so that they need no mask. Padding's own labels must be IGNORE.
    """
    real = mask.bool()
    if not right_padded(real):
        order = (~real).int().argsort(dim=1, stable=True)
        input_ids = input_ids.gather(1, order.to(input_ids.device))
        # What comes after padding is predicted from nothing, here as there.
        before = torch.nn.functional.pad(real[:, :-1], (1, 0))
        labels = torch.where(before.to(labels.device), labels, IGNORE)
        labels = labels.gather(1, order.to(labels.device))
    wide = int(real.sum(1).max())
    unit = max(_LEAST_LENGTH, _power_of_two(wide) // 8)
    padding = min(-(-wide // unit) * unit, max(most, wide)) - input_ids.shape[1]
    return (
        torch.nn.functional.pad(input_ids, (0, padding)),
        torch.nn.functional.pad(labels, (0, padding), value=IGNORE),
    )


def _power_of_two(n: int) -> int:
    """The least that is not below n."""
    return 1 << max(n - 1, 0).bit_length()
