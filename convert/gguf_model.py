"""What a GGUF file says about its model, in Hugging Face's words: config fields, tensor names."""

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from ..errors import CheckpointError, ConfigError
from ..nn.spec import RopeSpec
from . import gguf_latent, gguf_layers, gguf_shapes
from .gguf_architecture import EXPERTS, KV_HEADS, Architecture, Field
from .gguf_architectures import NAMES, of_file
from .gguf_file import GGUF, GGUFTensor, read_divisors
from .gguf_names import ROPE_FREQS, ROPE_LONG, ROPE_SHORT, ROPE_TENSORS, to_hf
from .gguf_values import BOOLEANS, INTEGERS, divisors
from .registry import FAMILIES
from .shards import Checkpoint

_INTEGERS = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "context_length": "max_position_embeddings",
}
_KNOWN = {
    *_INTEGERS,
    KV_HEADS,
    "attention.key_length",
    "attention.value_length",
    "expert_feed_forward_length",
    "feed_forward_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.attn_factor",
    "rope.scaling.factor",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "rope.scaling.type",
    "vocab_size",
}
# Experts that a stack may have; a file can announce any number.
_MAX_EXPERTS = 1 << 12


def architecture_of(gguf: GGUF) -> Architecture:
    """What the file says it is; raises ConfigError for an architecture that is not known."""
    name = gguf.fields.get("general.architecture")
    found = of_file(name, _own(gguf))
    if found is None:
        raise ConfigError(
            f"the GGUF architecture {name!r:.60} is not read; known are {', '.join(NAMES)}",
            file=gguf.file,
        )
    return found


def config_fields(gguf: GGUF) -> dict[str, Any]:
    """The fields of the config.json that the file stands for.

    Raises ConfigError for an architecture or a field that would change the math and is not known.
    """
    architecture, own = architecture_of(gguf), _own(gguf)
    eps, hf_eps = architecture.eps
    known = {*_KNOWN, eps, *(field.key for field in architecture.fields), *architecture.fixed}
    if architecture.by_layer:
        known |= gguf_layers.KNOWN
    if architecture.latent:
        known |= gguf_latent.KNOWN
    unknown = {n: v for n, v in own.items() if n not in known and v not in (0, None)}
    if unknown:
        shown = ", ".join(f"{name:.60}={value!r:.40}" for name, value in unknown.items())
        raise ConfigError(f"no part of the model covers the fields {shown:.500}", file=gguf.file)
    for name, value in architecture.fixed.items():
        found = own.get(name, value)
        if type(found) is not type(value) or not math.isclose(found, value, rel_tol=1e-6):
            raise ConfigError(f"{name} is {own[name]!r:.60}, expected {value}", file=gguf.file)
    fields: dict[str, Any] = {
        "architectures": [FAMILIES[architecture.family].hf_class],
        "model_type": architecture.family,
        **architecture.constants,
    }
    layers: dict[str, Any] = {}
    if architecture.by_layer:
        own, layers = gguf_layers.config_fields(own, gguf, partial(_number, own, gguf=gguf))
    latent: dict[str, Any] = {}
    if architecture.latent:
        own, latent = gguf_latent.config_fields(own, gguf)
    for name, hf in _INTEGERS.items():
        fields[hf] = _integer(own, name, gguf)
    if architecture.mixers is not None:
        fields["layer_types"], kv_heads = _mixers(own, architecture.mixers, gguf)
        own = {**own, KV_HEADS: kv_heads}
    # A model of nothing but experts needs not say how wide another MLP were.
    inner = own.get("expert_feed_forward_length")
    fields["intermediate_size"] = _integer(own, "feed_forward_length", gguf, inner)
    heads = fields["num_attention_heads"]
    fields["num_key_value_heads"] = _integer(own, KV_HEADS, gguf, heads)
    width = _integer(own, "attention.key_length", gguf, fields["hidden_size"] // heads)
    fields["head_dim"] = width
    rotated = _integer(own, "rope.dimension_count", gguf, width)
    if architecture.partial:
        fields["partial_rotary_factor"] = rotated / width
        rotated = width
    for name, found in (("rope.dimension_count", rotated), ("attention.value_length", None)):
        if (found or _integer(own, name, gguf, width)) != width:
            raise ConfigError(f"{name} differs from the head width {width}", file=gguf.file)
    fields[hf_eps] = _number(own, eps, gguf)
    fields["rope_theta"] = _number(own, "rope.freq_base", gguf, 10000.0)
    for field in architecture.fields:
        if field.key in own or field.default is not None or field.required:
            fields[field.hf] = _read(own, field, fields, gguf)
    if architecture.query_scale is not None:
        wide = fields["num_hidden_layers"] == architecture.query_scale
        scalar = fields["hidden_size"] // heads if wide else width
        fields["query_pre_attn_scalar"] = scalar
    scaling = None if layers else _scaling(own, architecture, gguf) or _llama3(gguf, fields)
    if scaling:
        fields["rope_scaling"] = scaling
        if architecture.original:
            name = "original_max_position_embeddings"
            fields[name] = scaling.get(name, fields["max_position_embeddings"])
    embed = gguf.tensors.get("token_embd.weight")
    if embed is None:
        raise CheckpointError("the tensor is missing", tensor="token_embd.weight", file=gguf.file)
    fields["vocab_size"] = embed.shape[0]
    fields["tie_word_embeddings"] = architecture.tied or "output.weight" not in gguf.tensors
    if architecture.full:
        full = ["full_attention"] * fields["num_hidden_layers"]
        fields |= {"sliding_window": None, "layer_types": full}
    if layers:
        fields.update(layers)
        del fields["rope_theta"]
    fields |= latent
    kinds = {re.sub(r"^blk\.\d+\.", "blk.0.", name) for name in gguf.tensors}
    for hf, tensor in architecture.flags.items():
        fields[hf] = tensor in kinds
    for name, hf in (("bos", "bos"), ("eos", "eos"), ("padding", "pad")):
        value = gguf.fields.get(f"tokenizer.ggml.{name}_token_id")
        if value is not None:
            fields[f"{hf}_token_id"] = value
    return fields


def checkpoint(gguf: GGUF) -> Checkpoint:
    """The file's tensors under the names of a Hugging Face checkpoint, experts one by one.

    Raises CheckpointError for names that no such model has.
    """
    architecture, own = architecture_of(gguf), _own(gguf)
    made: dict[str, GGUFTensor] = {}
    for name, info in gguf.tensors.items():
        if name in ROPE_TENSORS:
            continue
        if architecture.latent:
            name, info = _whole(name, info, gguf)
        hf = to_hf(name, architecture)
        if hf is not None and info.stacks and hf in made:
            continue
        if hf is None or hf in made:
            raise CheckpointError(
                "no part of the model has this tensor", tensor=name[:200], file=gguf.file
            )
        if architecture.permuted and (".attn_q." in name or ".attn_k." in name):
            heads = own["attention.head_count"]
            if ".attn_k." in name:
                heads = own.get(KV_HEADS, heads)
                heads = max(heads) if isinstance(heads, list) else heads
            if info.shape[0] % (2 * heads):
                raise CheckpointError(
                    f"{info.shape[0]} rows are not those of {heads} heads",
                    tensor=name,
                    file=info.file,
                )
            info = replace(info, heads=heads)
        if hf.endswith("norm.weight") and not name.endswith(gguf_shapes.PLAIN):
            info = replace(info, offset_by=architecture.offset)
        decay = name.endswith(gguf_shapes.DECAYS)
        info = replace(info, shape=gguf_shapes.loaded(name, info.shape), decay=decay)
        for part in _experts(info, own) if "*" in hf else (info,):
            number = 0 if part is info else (part.offset - info.offset) // part.nbytes
            named = hf.replace("*", str(number))
            made[named] = replace(part, name=named)
    return Checkpoint(gguf.file.parent, (gguf.file,), MappingProxyType(made), MappingProxyType({}))


def _whole(name: str, info: GGUFTensor, gguf: GGUF) -> tuple[str, GGUFTensor]:
    """A stack of latent attention as the matrix of both, under its name; others as they are."""
    layer, _, kind = name.removesuffix(".weight").rpartition(".")
    if kind not in gguf_latent.STACKS:
        return name, info
    both = [gguf.tensors.get(f"{layer}.{stack}.weight") for stack in gguf_latent.STACKS]
    keys, values = both
    if keys is None or values is None:
        raise CheckpointError("the other stack is missing", tensor=name[:200], file=gguf.file)
    shape = gguf_latent.joined(keys, values)
    name = f"{layer}.attn_kv_b.weight"
    return name, replace(keys, name=name, shape=shape, stacks=(keys, values))


def _experts(info: GGUFTensor, own: Mapping[str, Any]) -> list[GGUFTensor]:
    """The matrices that a stack consists of."""
    count = own.get(EXPERTS)
    if type(count) is not int or not 0 < count <= _MAX_EXPERTS or info.shape[:1] != (count,):
        raise CheckpointError(
            f"found shape {list(info.shape)}, expected a matrix for each of {count!r:.40} experts",
            tensor=info.name,
            file=info.file,
        )
    size = info.nbytes // count
    return [
        replace(info, shape=info.shape[1:], offset=info.offset + i * size, nbytes=size)
        for i in range(count)
    ]


def _own(gguf: GGUF) -> dict[str, Any]:
    """The fields of the file's architecture, without its name."""
    prefix = f"{gguf.fields.get('general.architecture')!s:.60}."
    return {n.removeprefix(prefix): v for n, v in gguf.fields.items() if n.startswith(prefix)}


def _mixers(own: Mapping[str, Any], kinds: tuple[str, str], gguf: GGUF) -> tuple[list[str], int]:
    """The kind of each layer, and how many heads of keys those with attention have."""
    found, depth = own.get(KV_HEADS), own.get("block_count")
    heads = set(found) - {0} if isinstance(found, list) and len(found) == depth else set()
    if len(heads) != 1 or not isinstance(found, list):
        raise ConfigError(
            f"{KV_HEADS} is {found!r:.120}, expected one number, or 0, for each of {depth!r:.20} "
            "layers",
            file=gguf.file,
        )
    return [kinds[count != 0] for count in found], heads.pop()


def _read(own: Mapping[str, Any], field: Field, fields: Mapping[str, Any], gguf: GGUF) -> Any:
    """The value of a field as a config.json has it, of which there are `fields` so far."""
    if field.key not in own and field.default is not None:
        return fields[field.default] if isinstance(field.default, str) else field.default
    if field.key in BOOLEANS:
        value = own[field.key]
        if not isinstance(value, bool):
            raise ConfigError(f"{field.key} is {value!r:.60}, expected a boolean", file=gguf.file)
        return value if field.words is None else field.words[value]
    if field.key not in INTEGERS:
        return _number(own, field.key, gguf)
    value = _integer(own, field.key, gguf, low=field.low)
    if field.over is None:
        return value
    if value % fields[field.over]:
        raise ConfigError(
            f"{field.key} is {value}, expected a multiple of {field.over}, {fields[field.over]}",
            file=gguf.file,
        )
    return value // fields[field.over]


def _integer(
    own: Mapping[str, Any], name: str, gguf: GGUF, default: int | None = None, *, low: int = 1
) -> int:
    value = own.get(name, default)
    if type(value) is not int or not low <= value < 2**31:
        kind = "a positive" if low else "an"
        raise ConfigError(f"{name} is {value!r:.60}, expected {kind} integer", file=gguf.file)
    return value


def _number(own: Mapping[str, Any], name: str, gguf: GGUF, default: float | None = None) -> float:
    value = own.get(name, default)
    if not isinstance(value, float) or not 0 < value < 1e30:
        raise ConfigError(f"{name} is {value!r:.60}, expected a positive number", file=gguf.file)
    # Stored in fp32; the shortest decimal that is the same fp32 is what was meant.
    return float(str(np.float32(value)))


def _scaling(
    own: Mapping[str, Any], architecture: Architecture, gguf: GGUF
) -> dict[str, Any] | None:
    kind = own.get("rope.scaling.type", "none")
    # Phi-3's files do not always name it.
    if kind == "longrope" or (kind == "none" and ROPE_LONG in gguf.tensors):
        return _longrope(own, gguf)
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise ConfigError(f"rope.scaling.type {kind!r:.60} is not known", file=gguf.file)
    made = {"rope_type": kind, "factor": _number(own, "rope.scaling.factor", gguf)}
    if kind == "yarn":
        name = "rope.scaling.original_context_length"
        made["original_max_position_embeddings"] = _integer(own, name, gguf)
        if gguf_latent.LOG_MULTIPLIER in own:
            wide = 10 * _number(own, gguf_latent.LOG_MULTIPLIER, gguf)
            made |= {"mscale": wide, "mscale_all_dim": wide}
        made |= architecture.yarn
    return made


def _longrope(own: Mapping[str, Any], gguf: GGUF) -> dict[str, Any]:
    """LongRoPE, whose divisors are tensors."""
    found = {}
    for name, tensor in (("long_factor", ROPE_LONG), ("short_factor", ROPE_SHORT)):
        info = gguf.tensors.get(tensor)
        if info is None:
            raise CheckpointError(
                "LongRoPE needs a vector of divisors here", tensor=tensor, file=gguf.file
            )
        found[name] = read_divisors(info).tolist()
    return {
        "rope_type": "longrope",
        "attention_factor": _number(own, "rope.scaling.attn_factor", gguf, 1.0),
        "original_max_position_embeddings": _integer(
            own, "rope.scaling.original_context_length", gguf
        ),
        **found,
    }


def _llama3(gguf: GGUF, fields: Mapping[str, Any]) -> dict[str, Any] | None:
    """Llama 3.1's scaling, which a file holds as a divisor per frequency."""
    info = gguf.tensors.get(ROPE_FREQS)
    if info is None:
        return None
    found = read_divisors(info)
    scaling: dict[str, Any] = {
        "factor": float(found.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }
    width, theta = fields["head_dim"], fields["rope_theta"]
    want = divisors(RopeSpec(width, theta, "llama3", original_positions=8192, **scaling))
    if found.shape != want.shape or not torch.allclose(found, want, rtol=1e-4, atol=0.0):
        raise ConfigError("the rope's divisors are not those of Llama 3.1", file=gguf.file)
    return {"rope_type": "llama3", "original_max_position_embeddings": 8192, **scaling}
