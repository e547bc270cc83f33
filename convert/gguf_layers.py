"""Fields of GGUF files that are lists by layer, or are said twice, for layers with a window and
without (Gemma 4).
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..errors import ConfigError
from ..nn.spec import MLPSpec, ModelSpec, MoESpec, RopeSpec
from .gguf_file import GGUF, read_divisors

PATTERN, SHARED = "attention.sliding_window_pattern", "attention.shared_kv_layers"
INPUTS = "embedding_length_per_layer_input"
_WINDOWED = {
    "attention.key_length_swa",
    "attention.value_length_swa",
    "rope.dimension_count_swa",
    "rope.freq_base_swa",
}
KNOWN = {PATTERN, SHARED, INPUTS, *_WINDOWED}
_KV_HEADS, _INNER = "attention.head_count_kv", "feed_forward_length"
_KINDS = {True: "sliding_attention", False: "full_attention"}
# What llama.cpp divides a frequency by so that nothing turns.
STILL = 1e30


def model_fields(spec: ModelSpec) -> dict[str, Any]:
    """The fields that say how the layers differ; those without a window are who others' are of.

    Raises ConfigError for layers that read keys and values of others than llama.cpp has them read:
    the last but one layer with some of its own where there is a window, else the last.
    """
    found = list(spec.attentions())
    own = sum(a.kv_from is None for a in found)
    for i, a in enumerate(found):
        source = None if i < own else own - (1 if a.window is None else 2)
        if a.kv_from != source:
            raise ConfigError(
                f"layer {i} reads keys and values of layer {a.kv_from}, which a GGUF file makes "
                f"those of layer {source}"
            )
    full = next((a for a in found if a.window is None), found[0])
    slides = next((a for a in found if a.window is not None), full)
    dense = [x.mlp.shared if isinstance(x.mlp, MoESpec) else x.mlp for x in spec.layers]
    made: dict[str, Any] = {
        PATTERN: [a.window is not None for a in found],
        SHARED: len(found) - own,
        INPUTS: spec.inputs.dim if spec.inputs else 0,
        _KV_HEADS: [a.kv_heads for a in found],
        _INNER: [mlp.dim for mlp in dense if isinstance(mlp, MLPSpec)],
        "attention.key_length": full.head_dim,
        "attention.value_length": full.head_dim,
        "attention.key_length_swa": slides.head_dim,
        "attention.value_length_swa": slides.head_dim,
        "rope.dimension_count": full.head_dim,
        "rope.dimension_count_swa": slides.head_dim,
    }
    if slides.rope is not None:
        made["rope.freq_base_swa"] = float(slides.rope.theta)
    return made


def divisors(rope: RopeSpec) -> torch.Tensor:
    """What each plain frequency of a "proportional" rotation is divided by, fp32 [dim / 2]."""
    made = torch.full((rope.dim // 2,), STILL)
    made[: rope.turned] = rope.factor
    return made


def config_fields(
    own: Mapping[str, Any], gguf: GGUF, number: Callable[..., float]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the fields as those of a file without lists, of its layers with a window; the fields of a
    config.json that say how the others differ). number(name, default=): one of the file's numbers.

    Raises ConfigError for lists that no such model has.
    """
    depth = _whole(own, "block_count", gguf)
    slides = own.get(PATTERN)
    fits = isinstance(slides, list) and 0 < len(slides) == depth
    if not isinstance(slides, list) or not fits or not all(type(x) is bool for x in slides):
        raise ConfigError(f"{PATTERN} is {slides!r:.60}, expected {depth} booleans", file=gguf.file)
    shared = _whole(own, SHARED, gguf, 0)
    heads = _by_kind(own, _KV_HEADS, slides, gguf)
    inner = own.get(_INNER)
    widths: list[Any] = inner if isinstance(inner, list) else [inner] * depth
    if len(widths) != depth or not all(type(width) is int for width in widths):
        raise ConfigError(
            f"{_INNER} is {inner!r:.120}, expected {depth} whole numbers", file=gguf.file
        )
    first = depth - shared
    doubled = 0 < shared < depth and len(widths) == depth and widths[-1] == 2 * widths[0]
    if widths != [widths[0]] * first + [widths[0] * (1 + doubled)] * (depth - first):
        raise ConfigError(f"{_INNER} is {inner!r:.120}, which no such model has", file=gguf.file)
    wide = _whole(own, "attention.key_length", gguf)
    narrow = _whole(own, "attention.key_length_swa", gguf, wide)
    for name, want in (
        ("attention.value_length", wide),
        ("attention.value_length_swa", narrow),
        ("rope.dimension_count", wide),
        ("rope.dimension_count_swa", narrow),
    ):
        if _whole(own, name, gguf, want) != want:
            raise ConfigError(f"{name} differs from the head width {want}", file=gguf.file)
    flat = {name: value for name, value in own.items() if name not in KNOWN}
    flat |= {_KV_HEADS: heads[True], _INNER: widths[0], "attention.key_length": narrow}
    flat |= {"attention.value_length": narrow, "rope.dimension_count": narrow}
    full = next((i for i in range(first) if not slides[i]), None)
    fields = {
        "layer_types": [_KINDS[x] for x in slides],
        "num_kv_shared_layers": shared,
        "use_double_wide_mlp": doubled,
        "hidden_size_per_layer_input": _whole(own, INPUTS, gguf, 0),
        "global_head_dim": wide,
        "num_global_key_value_heads": heads[False],
        "attention_k_eq_v": full is not None and f"blk.{full}.attn_v.weight" not in gguf.tensors,
        "rope_parameters": {
            "full_attention": {
                "rope_theta": number("rope.freq_base", default=1e6),
                **_proportion(gguf, wide),
            },
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": number("rope.freq_base_swa", default=1e4),
            },
        },
    }
    table = gguf.tensors.get("per_layer_token_embd.weight")
    if table is not None:
        fields["vocab_size_per_layer_input"] = table.shape[0]
    return flat, fields


def _proportion(gguf: GGUF, width: int) -> dict[str, Any]:
    info = gguf.tensors.get("rope_freqs.weight")
    if info is None:
        return {"rope_type": "default"}
    found = read_divisors(info)
    turned = int((found < STILL / 2).sum())
    factor = float(found[0]) if turned else 0.0
    want = divisors(RopeSpec(width, 1.0, "proportional", factor, turned=turned))
    if not turned or found.shape != want.shape or not torch.equal(found, want):
        raise ConfigError("the rope's divisors are not those of Gemma 4", file=gguf.file)
    share = 2 * turned / width
    return {"rope_type": "proportional", "partial_rotary_factor": share, "factor": factor}


def _by_kind(own: Mapping[str, Any], name: str, slides: list[bool], gguf: GGUF) -> dict[bool, int]:
    """The number of layers with a window, and of those without."""
    value = own.get(name)
    each = value if isinstance(value, list) else [value] * len(slides)
    found = {kind: {n for n, x in zip(each, slides, strict=False) if x == kind} for kind in _KINDS}
    if len(each) != len(slides) or any(len(some) > 1 for some in found.values()):
        raise ConfigError(f"{name} is {value!r:.120}, expected one number a kind", file=gguf.file)
    whole = set(each)
    return {kind: min(some or whole) for kind, some in found.items()}


def _whole(own: Mapping[str, Any], name: str, gguf: GGUF, default: int | None = None) -> int:
    value = own.get(name, default)
    if type(value) is not int or not 0 <= value < 2**31:
        raise ConfigError(f"{name} is {value!r:.60}, expected a whole number", file=gguf.file)
    return value
