"""From logits to the next token: pure functions on [b, v], in fp32.

Each equals the logits processor of transformers that it names, operation by operation, and `scores`
applies them in transformers' order. Those that read a row's ids are in `history.py`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import ArgumentError
from . import history

Adjust = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen.

    temperature: 0 takes the likeliest token, and then top_k to typical_p mean nothing. top_k: keep
    the k likeliest (0: all). top_p: keep the likeliest that together hold this probability. min_p:
    keep those with at least this share of the likeliest one's probability. typical_p: locally
    typical sampling (arXiv 2202.00666), 1: off. repetition_penalty: divides positive and multiplies
    negative logits of tokens seen in the row's prompt or answer (arXiv 1909.05858). min_new_tokens:
    no end of sequence before so many new tokens. presence_penalty, frequency_penalty: OpenAI's, on
    the answer's tokens. no_repeat_ngram_size: no so many tokens twice in prompt and answer, 0: off.
    sequence_bias: ((ids, bias), ...), added to the last id where the row ends with those before;
    one id alone is a logit bias. bad_words_ids: sequences that must not come. suppress_tokens:
    tokens that must not come. Raises ArgumentError for values out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    min_new_tokens: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    sequence_bias: tuple[tuple[tuple[int, ...], float], ...] = ()
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    suppress_tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _require(self, "temperature", "a number of at least 0", lambda x: 0 <= x < math.inf)
        _require(self, "top_k", "a whole number of at least 0", lambda x: x >= 0, whole=True)
        _require(self, "top_p", "a number in 0..1", lambda x: 0 <= x <= 1)
        _require(self, "min_p", "a number in 0..1", lambda x: 0 <= x <= 1)
        _require(self, "typical_p", "a number over 0 up to 1", lambda x: 0 < x <= 1)
        _require(self, "repetition_penalty", "a number over 0", lambda x: 0 < x < math.inf)
        _require(
            self, "min_new_tokens", "a whole number of at least 0", lambda x: x >= 0, whole=True
        )
        for name in ("presence_penalty", "frequency_penalty"):
            _require(self, name, "a finite number", math.isfinite)
        _require(
            self,
            "no_repeat_ngram_size",
            "a whole number of at least 0",
            lambda x: x >= 0,
            whole=True,
        )
        _require_ids("suppress_tokens", [self.suppress_tokens] if self.suppress_tokens else [])
        _require_ids("bad_words_ids", self.bad_words_ids)
        _require_ids("sequence_bias", [ids for ids, _ in self.sequence_bias])
        for ids, bias in self.sequence_bias:
            if not isinstance(bias, int | float) or math.isnan(bias) or bias == math.inf:
                raise ArgumentError(f"sequence_bias of {ids} is {bias!r}, expected a number")

    def reads_ids(self) -> bool:
        """Do its rules read what a row holds, beyond which tokens it has seen?"""
        return bool(
            self.presence_penalty
            or self.frequency_penalty
            or self.no_repeat_ngram_size
            or self.sequence_bias
            or self.bad_words_ids
        )


def _require(
    sampling: Sampling, name: str, wanted: str, fits: Callable[[Any], bool], whole: bool = False
) -> None:
    value = getattr(sampling, name)
    kind = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kind) or not fits(value):
        raise ArgumentError(f"{name} is {value!r}, expected {wanted}")


def _require_ids(name: str, sequences: Sequence[Sequence[int]]) -> None:
    for ids in sequences:
        if not ids or any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
            raise ArgumentError(
                f"{name} has {ids!r}, expected token ids of at least 0, one or more"
            )


GREEDY = Sampling()


def repetition_penalty(
    logits: torch.Tensor, seen: torch.Tensor, penalty: float | torch.Tensor
) -> torch.Tensor:
    """`RepetitionPenaltyLogitsProcessor`; seen [b, v]: which tokens each row holds already."""
    penalized = torch.where(logits < 0, logits * penalty, logits / penalty)
    return torch.where(seen, penalized, logits)


def suppress(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """`SuppressTokensLogitsProcessor`: minus infinity at ids [n], of which those under v count."""
    banned = (torch.arange(logits.shape[-1], device=logits.device)[:, None] == ids).any(-1)
    return logits.masked_fill(banned, -math.inf)


def temperature(logits: torch.Tensor, value: float | torch.Tensor) -> torch.Tensor:
    """`TemperatureLogitsWarper`."""
    return logits / value


def top_k(logits: torch.Tensor, k: int) -> torch.Tensor:
    """`TopKLogitsWarper`: ties with the k-th stay."""
    least = logits.topk(min(k, logits.shape[-1])).values[..., -1, None]
    return logits.masked_fill(logits < least, -math.inf)


def top_p(logits: torch.Tensor, p: float | torch.Tensor) -> torch.Tensor:
    """`TopPLogitsWarper`: the likeliest token always stays."""
    ascending, order = logits.sort(descending=False)
    dropped = ascending.softmax(-1).cumsum(-1) <= 1 - p
    dropped[..., -1] = False
    return logits.masked_fill(dropped.scatter(-1, order, dropped), -math.inf)


def min_p(logits: torch.Tensor, p: float | torch.Tensor) -> torch.Tensor:
    """`MinPLogitsWarper`."""
    probabilities = logits.softmax(-1)
    dropped = probabilities < p * probabilities.amax(-1, keepdim=True)
    return logits.masked_fill(dropped, -math.inf)


def typical_p(logits: torch.Tensor, mass: float) -> torch.Tensor:
    """`TypicalLogitsWarper`."""
    log_p = logits.log_softmax(-1)
    entropy = -(log_p * log_p.exp()).nansum(-1, keepdim=True)
    distance, order = (-log_p - entropy).abs().sort(descending=False)
    held = logits.gather(-1, order).softmax(-1).cumsum(-1)
    last = (held < mass).sum(-1, keepdim=True).clamp(max=logits.shape[-1] - 1)
    dropped = distance > distance.gather(-1, last)
    dropped[..., 0] = False
    return logits.masked_fill(dropped.scatter(-1, order, dropped), -math.inf)


def scores(
    logits: torch.Tensor,
    sampling: Sampling,
    *,
    seen: torch.Tensor | None = None,
    ids: torch.Tensor | None = None,
    start: int = 0,
    banned: torch.Tensor | None = None,
    adjust: Adjust | None = None,
) -> torch.Tensor:
    """logits [b, v] of any float dtype -> the fp32 logits that the next token is drawn from.

    seen [b, v] bool: what the repetition penalty falls on. ids [b, m]: the row so far, -1 for
    padding, its answer from column `start`; needed where `sampling.reads_ids()`. banned [n]: ids
    that must not come now. adjust: the caller's own step, run where transformers runs its
    `logits_processor`.
    """
    if ids is None and sampling.reads_ids():
        raise ArgumentError("these sampling rules read the row: pass ids")
    out = logits.float()
    if ids is not None and sampling.sequence_bias:
        out = history.sequence_bias(out, ids, sampling.sequence_bias)
    if seen is not None and sampling.repetition_penalty != 1:
        out = repetition_penalty(out, seen, sampling.repetition_penalty)
    if ids is not None and (sampling.presence_penalty or sampling.frequency_penalty):
        out = history.presence_and_frequency(
            out, ids[:, start:], sampling.presence_penalty, sampling.frequency_penalty
        )
    if ids is not None and sampling.no_repeat_ngram_size:
        out = history.no_repeat_ngram(out, ids, sampling.no_repeat_ngram_size)
    if ids is not None and sampling.bad_words_ids:
        words = [(word, -math.inf) for word in sampling.bad_words_ids]
        out = history.sequence_bias(out, ids, words)
    if banned is not None:
        out = suppress(out, banned)
    if sampling.suppress_tokens:
        out = suppress(out, torch.tensor(sampling.suppress_tokens, device=out.device))
    if adjust is not None:
        out = adjust(out)
    if sampling.temperature == 0:
        return out
    if sampling.temperature != 1:
        out = temperature(out, sampling.temperature)
    if sampling.top_k > 0:
        out = top_k(out, sampling.top_k)
    if sampling.top_p < 1:
        out = top_p(out, sampling.top_p)
    if sampling.min_p > 0:
        out = min_p(out, sampling.min_p)
    if sampling.typical_p < 1:
        out = typical_p(out, sampling.typical_p)
    return out


def uniforms(rows: int, generator: torch.Generator) -> torch.Tensor:
    """One fp64 number a row [rows], on the generator's device: a CPU generator draws the same
    numbers for every device."""
    return torch.rand(
        rows, 1, dtype=torch.float64, generator=generator, device=generator.device
    ).squeeze(-1)


def draw(scores: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One token per row [b] from the softmax of scores [b, v]; minus infinity is never drawn."""
    return look_up(scores, uniforms(scores.shape[0], generator))


def look_up(scores: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The token [b] where the cumulative softmax of scores [b, v], in fp64, passes uniform [b]."""
    cumulative = scores.double().softmax(-1).cumsum(-1)
    total = cumulative[:, -1:]
    # Under the total, so that rounding never leads past the last token that has a probability.
    below = torch.nextafter(total, torch.zeros_like(total))
    # Not blocking: a copy from pageable memory is staged before the call returns.
    sought = torch.minimum(uniform.to(scores.device, non_blocking=True)[:, None] * total, below)
    found = torch.searchsorted(cumulative, sought, right=True)
    return found.squeeze(-1).clamp(max=scores.shape[-1] - 1)


def logprobs(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The log-probability [b] in fp32 that the softmax of logits [b, v] gives tokens [b]."""
    return logits.float().log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)


def check_generator(sampling: Sampling, generator: torch.Generator | None) -> None:
    """Raise ArgumentError where tokens are drawn and there is nothing to draw them with."""
    if sampling.temperature > 0 and generator is None:
        raise ArgumentError("sampling needs a generator: pass torch.Generator().manual_seed(...)")


def check_ids(sampling: Sampling, vocab: int) -> None:
    """Raise ArgumentError where a rule names a token that a vocabulary of `vocab` does not have."""
    for name, sequences in (
        ("suppress_tokens", [sampling.suppress_tokens]),
        ("bad_words_ids", sampling.bad_words_ids),
        ("sequence_bias", [ids for ids, _ in sampling.sequence_bias]),
    ):
        highest = max((i for ids in sequences for i in ids), default=0)
        if highest >= vocab:
            raise ArgumentError(f"{name} has id {highest}, the vocabulary is 0..{vocab - 1}")


def choose(
    scores: torch.Tensor, sampling: Sampling, generator: torch.Generator | None
) -> torch.Tensor:
    """The next token of every row [b]: the likeliest at temperature 0, else drawn."""
    if sampling.temperature == 0:
        return scores.argmax(-1)
    check_generator(sampling, generator)
    assert generator is not None
    return draw(scores, generator)
