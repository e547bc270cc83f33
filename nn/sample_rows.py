"""The next token of rows whose sampling differs, with every parameter a tensor on the device.

The rules are those of `sampling`, each with a number a row, at which it leaves a row as it is that
does not ask for it. Only rules that some row asks for are run.
"""

from dataclasses import dataclass

import torch

from . import history
from . import sampling as rules
from .sampling import Sampling

# What a row's numbers say, in the order of their columns.
COLUMNS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)
Rules = frozenset[str]


def asked(sampling: Sampling) -> Rules | None:
    """The rules that a row needs run; None where not all of them have numbers a row."""
    if (
        sampling.no_repeat_ngram_size
        or sampling.sequence_bias
        or sampling.bad_words_ids
        or sampling.suppress_tokens
        or sampling.typical_p != 1
    ):
        return None
    made = set()
    if sampling.temperature > 0:
        made.add("draw")
        made |= {
            name
            for name, on in (
                ("top_k", sampling.top_k > 0),
                ("top_p", sampling.top_p < 1),
                ("min_p", sampling.min_p > 0),
            )
            if on
        }
    if sampling.repetition_penalty != 1:
        made.add("seen")
    if sampling.presence_penalty or sampling.frequency_penalty:
        made.add("counts")
    return frozenset(made)


@dataclass(slots=True)
class Controls:
    """By row: numbers [rows, len(COLUMNS)] fp64; uniform [rows] fp64, what the next draw takes;
    seen [rows, v] bool, the tokens of prompt and answer, and counts [rows, v] fp32, how often the
    answer holds each: None until a row needs them.
    """

    numbers: torch.Tensor
    uniform: torch.Tensor
    seen: torch.Tensor | None = None
    counts: torch.Tensor | None = None

    @classmethod
    def empty(cls, rows: int, device: torch.device | str) -> "Controls":
        numbers = torch.zeros((rows, len(COLUMNS)), dtype=torch.float64, device=device)
        return cls(numbers, torch.zeros(rows, dtype=torch.float64, device=device))

    def place(
        self, row: int, sampling: Sampling, ids: torch.Tensor, start: int, vocab: int
    ) -> bool:
        """A request takes a row; ids [m]: its tokens, on the host, the answer from `start` on. True
        where tensors were made that a step did not know before.
        """
        numbers = [float(getattr(sampling, name)) for name in COLUMNS]
        # Not blocking: a copy from pageable memory is staged before the call returns.
        self.numbers[row].copy_(torch.tensor(numbers, dtype=torch.float64), non_blocking=True)
        needs, made, device = asked(sampling) or frozenset(), False, self.numbers.device
        if needs & {"seen", "counts"}:
            ids = ids.to(device)
        if "seen" in needs:
            if self.seen is None:
                shape = len(self.numbers), vocab
                self.seen, made = torch.zeros(shape, dtype=torch.bool, device=device), True
            self.seen[row] = False
            self.seen[row, ids] = True
        if "counts" in needs:
            if self.counts is None:
                self.counts, made = torch.zeros(len(self.numbers), vocab, device=device), True
            self.counts[row] = history.counts(ids[None, start:], vocab)[0]
        return made

    def move(self, source: int, target: int) -> None:
        """Row `target` becomes what row `source` is."""
        for x in (self.numbers, self.seen, self.counts):
            if x is not None:
                x[target] = x[source]


def choose(logits: torch.Tensor, controls: Controls, needs: Rules) -> torch.Tensor:
    """The next token [b] of the first b rows from their logits [b, v], noted in seen and counts; -1
    where no logit that may be drawn is finite. needs: what is `asked` of any of the rows.
    """
    rows, vocab = logits.shape
    number = dict(zip(COLUMNS, controls.numbers[:rows, :, None].unbind(1), strict=True))
    out = logits.float()
    if "seen" in needs and controls.seen is not None:
        penalty = number["repetition_penalty"].float()
        out = rules.repetition_penalty(out, controls.seen[:rows], penalty)
    if "counts" in needs and controls.counts is not None:
        presence, frequency = number["presence_penalty"], number["frequency_penalty"]
        counts = controls.counts[:rows]
        out = history.less_counted(out, counts, presence.float(), frequency.float())
    top, chosen = out.max(-1)
    if "draw" in needs:
        drawn = _drawn(out, number, controls.uniform[:rows], needs)
        chosen = torch.where(number["temperature"][:, 0] > 0, drawn, chosen)
    if "seen" in needs and controls.seen is not None:
        controls.seen[:rows].scatter_(1, chosen[:, None], True)
    if "counts" in needs and controls.counts is not None:
        controls.counts[:rows].scatter_add_(1, chosen[:, None], torch.ones_like(out[:, :1]))
    return torch.where(top.isfinite(), chosen, -1)


def _drawn(
    out: torch.Tensor, number: dict[str, torch.Tensor], uniform: torch.Tensor, needs: Rules
) -> torch.Tensor:
    heat = number["temperature"]
    out = rules.temperature(out, torch.where(heat > 0, heat, 1.0).float())
    if "top_k" in needs:
        k = number["top_k"].long().clamp(max=out.shape[-1])
        least = out.sort(-1, descending=True).values.gather(-1, (k - 1).clamp(min=0))
        out = out.masked_fill((k > 0) & (out < least), -torch.inf)
    if "top_p" in needs:
        p = number["top_p"]
        out = torch.where(p < 1, rules.top_p(out, p), out)
    if "min_p" in needs:
        p = number["min_p"].float()
        out = torch.where(p > 0, rules.min_p(out, p), out)
    return rules.look_up(out, uniform)
