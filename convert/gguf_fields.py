"""What a model is, as the fields of a GGUF file, and the check that they say it."""

import math
from collections.abc import Iterator
from dataclasses import fields as dataclass_fields
from dataclasses import is_dataclass, replace
from typing import Any

import torch

from ..errors import ConfigError
from ..nn.rope import attention_factor
from ..nn.spec import AttentionSpec, ModelSpec, RopeSpec
from . import gguf_folded, gguf_latent, gguf_layers
from .dense import map_attention, with_attention
from .gguf_architecture import KV_HEADS, ROTATED, Architecture
from .gguf_architectures import families, of_family
from .gguf_values import BOOLEANS, INTEGERS, VALUES, main_rope, width

# Architectures for which llama.cpp looks for LongRoPE's divisors.
_LONGROPE = ("phi3", "llama")
# Fields of a file are fp32.
_FP32 = 1e-6


def architecture_of(family: str) -> Architecture:
    """How models of this model_type are written; raises ConfigError where they are not."""
    found = of_family(family)
    if found is None:
        raise ConfigError(
            f"models of the family {family!r} are not written as GGUF; those that are: "
            f"{', '.join(families())}"
        )
    return found


def expressed(spec: ModelSpec, architecture: Architecture, tied: bool) -> ModelSpec:
    """The spec that the file will stand for: without windows that llama.cpp does not have for such
    models, whose context ends with the window then. LongRoPE's factor follows from the context
    there, and what it gives is said.
    """
    spec = map_attention(replace(spec, tied=tied), lambda _, a: _with_said(a, spec.max_positions))
    if architecture.folded:
        spec = gguf_folded.folded(spec)
    windows = [a.window for a in spec.attentions() if a.window is not None]
    if architecture.windows or not windows:
        return spec
    context = min(spec.max_positions, *windows)
    return replace(with_attention(spec, window=None), max_positions=context)


def _with_said(attention: AttentionSpec, context: int) -> AttentionSpec:
    rope = attention.rope
    if rope is None or rope.kind != "longrope":
        return attention
    said = replace(
        rope,
        factor=context / rope.original_positions,
        attention_factor=attention_factor(rope),
        short_factors=_rounded(rope.short_factors),
        long_factors=_rounded(rope.long_factors),
    )
    return replace(attention, rope=said)


def _rounded(values: tuple[float, ...]) -> tuple[float, ...]:
    """As a tensor of the file holds them."""
    return tuple(torch.tensor(values).tolist())


def model_fields(spec: ModelSpec, architecture: Architecture, name: str) -> dict[str, Any]:
    """The fields of a file of the model `spec`, called `name`; raises ConfigError for a rotation
    that they cannot say.
    """
    first, rope = next(spec.attentions(), None), main_rope(spec)
    if first is None:
        raise ConfigError("no layer has attention, which a GGUF file cannot say")
    if rope is None and not any(field.key == ROTATED for field in architecture.fields):
        raise ConfigError("no layer has a rotary embedding, which a GGUF file cannot say")
    rope = rope or RopeSpec(first.head_dim, 10000.0)
    own: dict[str, Any] = {
        "vocab_size": spec.vocab,
        "context_length": spec.max_positions,
        "embedding_length": spec.dim,
        "block_count": len(spec.layers),
        "feed_forward_length": width(spec),
        "attention.head_count": first.heads,
        "attention.head_count_kv": first.kv_heads,
        "attention.key_length": first.head_dim,
        "attention.value_length": first.head_dim,
        architecture.eps[0]: float(spec.norm.eps),
        "rope.dimension_count": rope.dim,
        "rope.freq_base": float(rope.theta),
    }
    for field in architecture.fields:
        value = VALUES[field.key](spec)
        if value is not None:
            if field.key == "logit_scale" and architecture.divided:
                value = 1.0 / value
            kinds = {bool: BOOLEANS, int: INTEGERS}
            own[field.key] = next((k for k, keys in kinds.items() if field.key in keys), float)(
                value
            )
    own |= architecture.fixed
    if architecture.mixers is not None:
        own[KV_HEADS] = [x.attention.kv_heads if x.attention else 0 for x in spec.layers]
    if architecture.latent:
        own |= gguf_latent.model_fields(spec)
    if architecture.by_layer:
        own |= gguf_layers.model_fields(spec)
    if rope.kind in ("linear", "yarn"):
        own["rope.scaling.type"] = rope.kind
        own["rope.scaling.factor"] = float(rope.factor)
        if rope.kind == "yarn":
            own["rope.scaling.original_context_length"] = rope.original_positions
    elif rope.kind == "longrope" and architecture.name in _LONGROPE:
        # Without the factor, by which llama.cpp would divide positions besides.
        own["rope.scaling.type"] = rope.kind
        own["rope.scaling.attn_factor"] = float(attention_factor(rope))
        own["rope.scaling.original_context_length"] = rope.original_positions
    elif rope.kind not in ("default", "llama3") and not architecture.by_layer:
        raise ConfigError(f"the rope scaling {rope.kind!r} cannot be put into a GGUF file")
    general: dict[str, Any] = {
        "general.architecture": architecture.name,
        "general.type": "model",
        "general.name": name,
        "general.quantization_version": 2,
    }
    return general | {f"{architecture.name}.{key}": value for key, value in own.items()}


def check_same(read: ModelSpec, spec: ModelSpec) -> None:
    """Raise ConfigError unless both are the same model, but for how it is initialised and for
    numbers rounded to fp32.
    """
    differences = list(_differences("", replace(read, init_std=spec.init_std), spec))
    if differences:
        raise ConfigError(f"read back, {'; '.join(differences[:4]):.600}")


def _differences(path: str, one: Any, other: Any) -> Iterator[str]:
    if isinstance(one, float) and isinstance(other, float):
        if not math.isclose(one, other, rel_tol=_FP32):
            yield f"{path} would be {one} and is {other}"
    elif isinstance(one, tuple) and isinstance(other, tuple) and len(one) == len(other):
        for i, pair in enumerate(zip(one, other, strict=True)):
            yield from _differences(f"{path}.{i}", *pair)
    elif is_dataclass(one) and type(one) is type(other):
        for field in dataclass_fields(one):
            name = f"{path}.{field.name}".lstrip(".")
            yield from _differences(name, getattr(one, field.name), getattr(other, field.name))
    elif one != other:
        yield f"{path} would be {one!r:.120} and is {other!r:.120}"
