"""What `generate` returns with return_dict_in_generate=True."""

from dataclasses import dataclass, field, fields, replace

import torch

from ..nn.beam import Found


@dataclass(frozen=True)
class GenerationOutput:
    """sequences [b, s + n]; scores: per new token what it was chosen from, [b, v] in fp32; logits:
    per new token what the model gave, [b, v]. Of beams, sequences_scores and beam_indices are
    `nn.beam.Found`'s, scores the adjusted log-probabilities of every beam. Also reads by name, as
    transformers' output does.
    """

    sequences: torch.Tensor
    scores: tuple[torch.Tensor, ...] | None = None
    logits: tuple[torch.Tensor, ...] | None = None
    sequences_scores: torch.Tensor | None = None
    beam_indices: torch.Tensor | None = None

    def __getitem__(self, name: str) -> torch.Tensor | tuple[torch.Tensor, ...]:
        value = getattr(self, name) if name in {f.name for f in fields(self)} else None
        if value is None:
            raise KeyError(name)
        return value  # type: ignore[no-any-return]


@dataclass
class Record:
    """Keeps what `nn.generate` tells its `on_scores`."""

    want_scores: bool
    want_logits: bool
    scores: list[torch.Tensor] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)

    def __call__(self, logits: torch.Tensor, scores: torch.Tensor) -> None:
        if self.want_scores:
            self.scores.append(scores)
        if self.want_logits:
            self.logits.append(logits)

    def output(self, sequences: torch.Tensor) -> GenerationOutput:
        """All of it, copied out of inference mode, so that training may use it."""
        return GenerationOutput(
            sequences,
            tuple(x.clone() for x in self.scores) if self.want_scores else None,
            tuple(x.clone() for x in self.logits) if self.want_logits else None,
        )

    def output_of_beams(self, found: Found) -> GenerationOutput:
        """The same of a beam search; scores of sequences come with the scores of tokens."""
        out = replace(self.output(found.sequences), beam_indices=found.rows)
        return replace(out, sequences_scores=found.scores) if self.want_scores else out
