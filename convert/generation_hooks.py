"""The caller's processors and criteria as the hooks of `nn.generate`, and its generator."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..errors import ArgumentError
from .grammar import Follower, Grammar


def generator_of(seed: int | None, generator: torch.Generator | None) -> torch.Generator:
    if seed is not None and generator is not None:
        raise ArgumentError("both seed and generator are given; pass one")
    if generator is not None:
        return generator
    made = torch.Generator()
    if seed is None:
        made.seed()
        return made
    try:
        return made.manual_seed(seed)
    except (RuntimeError, ValueError):
        raise ArgumentError(f"seed is {seed!r}, expected a whole number of 64 bits") from None


def criterion_hook(criterion: Callable[..., Any]) -> Callable[[torch.Tensor], torch.Tensor]:
    def stop(ids: torch.Tensor) -> torch.Tensor:
        verdict = criterion(ids, None)
        made = verdict if isinstance(verdict, torch.Tensor) else torch.tensor(bool(verdict))
        if made.numel() != 1 and made.shape != ids.shape[:1]:
            raise ArgumentError(
                f"a stopping criterion gave shape {list(made.shape)}, expected one value or "
                f"{list(ids.shape[:1])}, one a row"
            )
        return made.reshape(-1).expand(ids.shape[0])

    return stop


def any_of(
    stops: Sequence[Callable[[torch.Tensor], torch.Tensor]],
) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda ids: torch.stack([stop(ids).to(ids.device) for stop in stops]).any(0)


def processed(
    processors: Sequence[Callable[..., Any]],
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    def adjust(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        shape = scores.shape
        for process in processors:
            scores = process(ids, scores)
            found = list(scores.shape) if isinstance(scores, torch.Tensor) else type(scores)
            if found != list(shape):
                raise ArgumentError(f"a logits processor gave {found}, expected {list(shape)}")
        return scores

    return adjust


def constrained(
    grammars: Sequence[Grammar | None],
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Rules out what a prompt's grammar does not allow next; each prompt has as many rows."""
    followers = [None if grammar is None else Follower(grammar) for grammar in grammars]
    start: int | None = None

    def adjust(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        nonlocal start
        if start is None:
            start = ids.shape[1]
        banned = torch.zeros(scores.shape, dtype=torch.bool)
        rows = len(banned) // len(followers)
        for i, answer in enumerate(ids[:, start:].tolist()):
            follower = followers[i // rows]
            allowed = None if follower is None else follower.allowed(answer)
            if allowed is not None:
                banned[i] = ~allowed
        for follower in followers:
            if follower is not None:
                follower.turn()
        return scores.masked_fill(banned.to(scores.device), -torch.inf)

    return adjust


def allowed_by(
    choose: Callable[[int, torch.Tensor], Any], prompts: int
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """transformers' `prefix_allowed_tokens_fn`: (prompt's number, its ids) -> ids that may come."""

    def adjust(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        banned = torch.ones_like(scores, dtype=torch.bool)
        rows = len(ids) // prompts
        for i, row in enumerate(ids):
            allowed = torch.as_tensor(choose(i // rows, row), dtype=torch.int64)
            if allowed.numel() == 0:
                raise ArgumentError("prefix_allowed_tokens_fn allows no token")
            if int(allowed.min()) < 0 or int(allowed.max()) >= scores.shape[-1]:
                raise ArgumentError(
                    f"prefix_allowed_tokens_fn allows {allowed.tolist()!r:.100}, the model has "
                    f"{scores.shape[-1]} tokens"
                )
            banned[i, allowed.to(ids.device)] = False
        return scores.masked_fill(banned, -torch.inf)

    return adjust
