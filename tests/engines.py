"""Engines over small models in fp64, and what `generate` answers in their stead."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from hybrids import small

from purelm import Engine, Request, Sampling
from purelm.nn.generate import generate

WARM = Sampling(temperature=0.9, top_k=40, min_p=0.01)


def text(seed: int, length: int, vocab: int = 50) -> tuple[int, ...]:
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(1, vocab, (length,), generator=g).tolist())


def stand_in(kind: str = "full") -> Any:
    """What the engine asks of a model, over a small one in fp64."""
    spec, params = small(kind)
    return SimpleNamespace(
        spec=spec,
        params=params,
        adapters={},
        device=torch.device("cpu"),
        tokenizer=None,
        config={},
        generation_config={},
        qat_scheme=None,
        own_trees=lambda: (params,),
        derives=lambda: False,
        computed_params=lambda: params,
    )


def alone(model: Any, request: Request) -> list[int]:
    seed = request.seed
    out = generate(
        model.params,
        model.spec,
        torch.tensor([request.prompt]),
        max_new_tokens=request.max_new_tokens,
        sampling=request.sampling,
        generator=None if seed is None else torch.Generator().manual_seed(seed),
        eos_ids=request.eos_ids or (),
    )
    return [int(t) for t in out[0, len(request.prompt) :]]


def ready(engine: Engine, *, lags: bool = False, replays: bool = False) -> Engine:
    """The engine as on a GPU, as far as a CPU can be one."""
    engine._lags, engine._rows.graphs, engine._rows.pads = lags, replays, replays
    return engine


def recorded(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """In the place of a capture: what is replayed is the step as it was then."""
    return step
