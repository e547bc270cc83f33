"""What the next token of every row is chosen from, by all rules and the caller's own."""

from collections.abc import Callable

import torch

from . import sampling as rules
from .prompt import tokens_seen, unpadded
from .sampling import Sampling

# (ids [b, m], logits [b, v]) -> logits: a step of the caller's.
Adjust = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def row_scores(
    logits: torch.Tensor,
    ids: torch.Tensor,
    sampling: Sampling,
    *,
    start: int,
    real: torch.Tensor | None,
    eos: torch.Tensor,
    adjust: Adjust | None = None,
    seen: torch.Tensor | None = None,
) -> torch.Tensor:
    """logits [b, v] that follow ids [b, m] -> `sampling.scores` of them, fp32.

    The answers begin at column `start`; real [b, start]: which tokens of the prompts are no padding
    (None: all). seen [b, v]: the tokens of each row so far, where they are known already. An id of
    eos [n] may not come before the answer has `min_new_tokens`.
    """
    rows = unpadded(ids, real) if sampling.reads_ids() else None
    if sampling.repetition_penalty != 1 and seen is None:
        seen = tokens_seen(unpadded(ids, real), logits.shape[-1])
    early = ids.shape[1] - start < sampling.min_new_tokens and eos.numel() > 0
    return rules.scores(
        logits,
        sampling,
        seen=seen,
        ids=rows,
        start=start,
        banned=eos if early else None,
        adjust=None if adjust is None else lambda scores: adjust(ids, scores),
    )
