"""Where each token of a batch stands: its position, and which other tokens it may see.

Positions come from the attention mask or from `cu_seqlens`, never from the width of the batch, so
left padding, right padding, packing and one row at a time give the same answer.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..errors import InputError
from ..kernels.attention import Documents


@dataclass(frozen=True, slots=True)
class Layout:
    """positions [b, s] int64; segments [b, s] int64 or None; documents of a packed row, or None.

    A token sees the tokens of its own segment that do not come after it. Segment 0 is padding.
    None: every row is one segment, padding (if any) only after it, so plain causal attention is
    exact for every real token. `documents` says the same as the segments, for fused attention; in
    rows padded in front, the padding and the real tokens of each are documents.
    """

    positions: torch.Tensor
    segments: torch.Tensor | None = None
    documents: Documents | None = None


def dense(batch: int, length: int, *, start: int = 0, device: torch.device | str) -> Layout:
    """Full rows whose first token stands at position `start`."""
    row = torch.arange(start, start + length, device=device)
    return Layout(row.expand(batch, length))


def from_mask(mask: torch.Tensor, device: torch.device | str | None = None) -> Layout:
    """From an attention mask [b, s] of ones (real) and zeros (padding), on either side."""
    if mask.ndim != 2:
        raise InputError(f"attention_mask has shape {tuple(mask.shape)}, expected [batch, length]")
    device = mask.device if device is None else device
    real = mask.bool()
    # Read where the mask lives: on the CPU this costs no synchronisation.
    padded_behind = right_padded(real)
    left_padded = bool((~real[:, :-1] | real[:, 1:]).all())
    real = real.to(device)
    positions = (real.long().cumsum(-1) - 1).clamp(min=0)
    if padded_behind:
        return Layout(positions)
    return Layout(positions, real.long(), _padding_and_rows(real) if left_padded else None)


def right_padded(real: torch.Tensor) -> bool:
    """Whether in each row of [b, s], bool, no real token comes after one that is not."""
    return bool((real[:, :-1] | ~real[:, 1:]).all())


def _padding_and_rows(real: torch.Tensor) -> Documents:
    """Each row of [b, s] as two documents: the padding in front of it, and what is real."""
    b, s = real.shape
    starts = torch.arange(0, b * s, s, device=real.device)
    bounds = torch.stack([starts, starts + (~real).sum(-1)], 1).flatten()
    return Documents(F.pad(bounds, (0, 1), value=b * s).int(), s)


def from_cu_seqlens(cu_seqlens: torch.Tensor, length: int, longest: int | None = None) -> Layout:
    """One packed row [1, length] of documents that end at cu_seqlens[1:] (cu_seqlens[0] is 0).

    longest: the length of the longest document, which lets GPUs run fused attention without
    reading `cu_seqlens` back.
    """
    index = torch.arange(length, device=cu_seqlens.device)
    segment = torch.bucketize(index, cu_seqlens[1:].to(index.dtype), right=True)
    positions = index - cu_seqlens.to(index.dtype)[segment.clamp(max=cu_seqlens.numel() - 1)]
    segment = torch.where(index < cu_seqlens[-1], segment + 1, 0)
    documents = None if longest is None else Documents(cu_seqlens.int(), longest)
    return Layout(positions[None], segment[None], documents)


def from_positions(positions: torch.Tensor, documents: Documents | None = None) -> Layout:
    """From position ids [b, s] alone: a document begins wherever the position is 0.

    documents: the same of one row, which lets GPUs run fused attention.
    """
    segments = (positions == 0).long().cumsum(-1)
    return Layout(positions, segments if positions.shape[-1] > 1 else None, documents)
