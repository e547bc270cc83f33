"""Models of which some layers have another mixer in place of attention."""

from collections.abc import Sequence
from dataclasses import replace

from ..nn.spec import ModelSpec, RecurrentSpec


def with_recurrent(spec: ModelSpec, recurrent: RecurrentSpec, where: Sequence[bool]) -> ModelSpec:
    """The spec with `recurrent` in place of attention in the layers for which `where` is true."""
    layers = (
        replace(layer, attention=None, recurrent=recurrent) if here else layer
        for layer, here in zip(spec.layers, where, strict=True)
    )
    return replace(spec, layers=tuple(layers))
