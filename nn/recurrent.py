"""Mixers whose state has one size however many tokens it has seen: which function runs which."""

from collections.abc import Sequence
from typing import Any

import torch

from . import delta_net, mamba2, short_conv, tree
from .linear import linear, project, scaled, seed_after
from .spec import DeltaNetSpec, Mamba2Spec, RecurrentSpec, ShortConvSpec

# Each a module with `core`, `empty` and `working_bytes`.
_MIXERS: dict[type, Any] = {
    ShortConvSpec: short_conv,
    Mamba2Spec: mamba2,
    DeltaNetSpec: delta_net,
}

# Dropout seeds of these projections lie so far from those of attention, which may be beside them.
_SEED_STEP = 700_001


def mix(
    x: torch.Tensor,
    p: tree.Tree,
    adapters: tree.Tree,
    spec: RecurrentSpec,
    starts: torch.Tensor | None,
    state: dict[str, torch.Tensor] | None = None,
    seed: int | None = None,
) -> torch.Tensor:
    """Normalised x [b, s, e] -> [b, s, e].

    starts [b, s]: the tokens that see none before them (None: no token of these but, without a
    state, the first). With a `state` x goes on where that ended, and it is written in place.
    """
    get, names = (adapters or {}).get, tuple(spec.inputs)
    before, after = scales(spec)
    first, last = seeds(spec, seed)
    own = [p[name] for name in names], [get(name) for name in names]
    made = project(scaled(x, before), *own, first)
    y = core(made, p, spec, starts, state)
    return scaled(linear(y, p["out"], get("out"), last), after)


def core(
    made: Sequence[torch.Tensor],
    p: tree.Tree,
    spec: RecurrentSpec,
    starts: torch.Tensor | None,
    state: dict[str, torch.Tensor] | None = None,
) -> torch.Tensor:
    """What the input projections make [b, s, ...] -> what the output projection reads."""
    y: torch.Tensor = _MIXERS[type(spec)].core(made, p, spec, starts, state)
    return y


def scales(spec: RecurrentSpec) -> tuple[float, float]:
    """What multiplies a mixer's input and what it gives."""
    return (spec.in_scale, spec.out_scale) if isinstance(spec, Mamba2Spec) else (1.0, 1.0)


def seeds(spec: RecurrentSpec, seed: int | None) -> tuple[int | None, int | None]:
    """The dropout seeds of the projections of the input and of the output."""
    first = seed_after(seed, _SEED_STEP)
    return first, seed_after(first, len(spec.inputs))


def empty(
    spec: RecurrentSpec, batch: int, dtype: torch.dtype, device: torch.device | str
) -> dict[str, torch.Tensor]:
    """The state [batch, ...] before the first token, which is zeros."""
    made: dict[str, torch.Tensor] = _MIXERS[type(spec)].empty(spec, batch, dtype, device)
    return made


def working_bytes(spec: RecurrentSpec, itemsize: int) -> int:
    """Bytes that autograd keeps and needs for one token while the mixer's backward is at work."""
    made: int = _MIXERS[type(spec)].working_bytes(spec, itemsize)
    return made


def starts(segments: torch.Tensor | None, offset: int) -> torch.Tensor | None:
    """Which tokens of segments [b, offset + s] from `offset` on begin one: bool [b, s], or None
    where there is but one.
    """
    if segments is None:
        return None
    before = segments[:, max(offset - 1, 0) : -1]
    if offset == 0:
        before = torch.cat([segments[:, :1], before], 1)
    return segments[:, offset:] != before
