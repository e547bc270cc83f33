"""Rules of sampling that read what a row holds already: repetitions, n-grams, biased sequences.

Pure functions of logits [b, v] and ids [b, m], in which -1 stands for padding: unlike in
transformers it never counts as a token, so that a padded row gives what it gives alone.
"""

import math
from collections.abc import Sequence

import torch

Biased = Sequence[tuple[Sequence[int], float]]


def counts(ids: torch.Tensor, vocab: int) -> torch.Tensor:
    """How often each token stands in ids [b, m]: fp32 [b, v]."""
    # Padding is counted in one column past the vocabulary, which is then cut off.
    out = torch.zeros(ids.shape[0], vocab + 1, dtype=torch.float32, device=ids.device)
    kept = torch.where((ids < 0) | (ids >= vocab), vocab, ids)
    return out.scatter_add_(1, kept, torch.ones_like(kept, dtype=torch.float32))[:, :vocab]


def presence_and_frequency(
    logits: torch.Tensor, answer: torch.Tensor, presence: float, frequency: float
) -> torch.Tensor:
    """logits - frequency * n - presence * (n > 0), n: how often the answer [b, m] holds the token.

    OpenAI's definition ("Frequency and presence penalties" of its API reference), which leaves the
    prompt out.
    """
    return less_counted(logits, counts(answer, logits.shape[-1]), presence, frequency)


def less_counted(
    logits: torch.Tensor,
    n: torch.Tensor,
    presence: float | torch.Tensor,
    frequency: float | torch.Tensor,
) -> torch.Tensor:
    """The same of the counts n [b, v] themselves; the penalties may be one a row, [b, 1]."""
    return logits - frequency * n - presence * (n > 0).float()


def no_repeat_ngram(logits: torch.Tensor, ids: torch.Tensor, size: int) -> torch.Tensor:
    """`NoRepeatNGramLogitsProcessor`: minus infinity for what would repeat `size` tokens of ids."""
    if ids.shape[1] < size:
        return logits
    grams = ids.unfold(1, size, 1)
    last = ids[:, ids.shape[1] - size + 1 :]
    repeated = (grams[..., :-1] == last[:, None]).all(-1) & (grams >= 0).all(-1)
    # What repeats nothing is written to a column that is then cut off.
    vocab = logits.shape[-1]
    banned = torch.zeros(ids.shape[0], vocab + 1, dtype=torch.bool, device=ids.device)
    banned.scatter_(1, torch.where(repeated, grams[..., -1], vocab).clamp(max=vocab), True)
    return logits.masked_fill(banned[:, :vocab], -math.inf)


def sequence_bias(logits: torch.Tensor, ids: torch.Tensor, biased: Biased) -> torch.Tensor:
    """`SequenceBiasLogitsProcessor`: the bias of a sequence is added to its last token wherever
    ids end with the tokens before. Minus infinity bans it, as `NoBadWordsLogitsProcessor` does.
    """
    bias = torch.zeros_like(logits)
    # Single tokens first, as in transformers: the sums round alike.
    for sequence, value in sorted(biased, key=lambda pair: len(pair[0])):
        *before, last = sequence
        if len(before) > ids.shape[1] or last >= logits.shape[-1]:
            continue
        wanted = torch.tensor(before, dtype=ids.dtype, device=ids.device)
        complete = (ids[:, ids.shape[1] - len(before) :] == wanted).all(-1)
        # Not a product: 0 times infinity is not a number.
        bias[:, last] += torch.where(complete, value, 0.0)
    return logits + bias
