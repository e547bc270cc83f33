"""The caller's processors and criteria as the hooks of `nn.generate`, and its generator."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..errors import ArgumentError


def generator_of(seed: int | None, generator: torch.Generator | None) -> torch.Generator:
    if seed is not None and generator is not None:
        raise ArgumentError("both seed and generator are given; pass one")
    if generator is not None:
        return generator
    made = torch.Generator()
    if seed is None:
        made.seed()
        return made
    return made.manual_seed(seed)


def criterion_hook(criterion: Callable[..., Any]) -> Callable[[torch.Tensor], torch.Tensor]:
    def stop(ids: torch.Tensor) -> torch.Tensor:
        verdict = criterion(ids, None)
        made = verdict if isinstance(verdict, torch.Tensor) else torch.tensor(bool(verdict))
        return made.expand(ids.shape[0])

    return stop


def any_of(
    stops: Sequence[Callable[[torch.Tensor], torch.Tensor]],
) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda ids: torch.stack([stop(ids).to(ids.device) for stop in stops]).any(0)


def processed(
    processors: Sequence[Callable[..., Any]],
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    def adjust(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for process in processors:
            scores = process(ids, scores)
        return scores

    return adjust
