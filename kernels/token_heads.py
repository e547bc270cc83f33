"""How the launches of recurrent mixers take what is of a token: its heads side by side, whatever
lies between tokens, and starts of documents as bytes.
"""

import math

import torch
from torch import Tensor


def side_by_side(*tensors: Tensor, lead: int = 2) -> tuple[Tensor, ...]:
    """[b, s, heads, d], or with a single leading dimension [b, heads, d] or [b, heads], with the
    features and heads of a token without gaps, as they are in slices of wider tensors too; copied
    only where they are not.
    """

    def flat(t: Tensor) -> Tensor:
        own = t.shape[lead:]
        whole = tuple(math.prod(own[i + 1 :]) for i in range(len(own)))
        return t if t.stride()[lead:] == whole else t.contiguous()

    return tuple(flat(t) for t in tensors)


def steps(*tensors: Tensor) -> tuple[int, ...]:
    """The strides of row and token of each [b, s, ...], one after the other."""
    return tuple(step for t in tensors for step in t.stride()[:2])


def flags(starts: Tensor | None) -> Tensor | None:
    """Starts, bool of any shape, as the bytes that a kernel reads."""
    return None if starts is None else starts.contiguous().view(torch.uint8)
