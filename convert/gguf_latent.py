"""Latent attention in GGUF files: llama.cpp takes it for one wide head of keys, and has what makes
keys and values of the latent as two stacks, by head.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..errors import CheckpointError, ConfigError
from ..nn.spec import AttentionSpec, ModelSpec
from .gguf_file import GGUF, GGUFTensor

_KEYS, _VALUES = "attention.key_length_mla", "attention.value_length_mla"
_RANK, _QUERY_RANK = "attention.kv_lora_rank", "attention.q_lora_rank"
LOG_MULTIPLIER = "rope.scaling.yarn_log_multiplier"
KNOWN = {_KEYS, _VALUES, _RANK, _QUERY_RANK, LOG_MULTIPLIER}
# Our module -> ggml's stacks [h, r, nope] and [h, v, r].
BOTH, STACKS = "layers.*.attn.kv_b", ("attn_k_b", "attn_v_b")


def model_fields(spec: ModelSpec) -> dict[str, Any]:
    """The fields of the attention of `spec`, of which every layer has the same."""
    attention = next(spec.attentions())
    latent, rope = attention.latent, attention.rope
    assert latent is not None and rope is not None
    made: dict[str, Any] = {
        "attention.head_count_kv": 1,
        "attention.key_length": latent.kv_rank + rope.dim,
        "attention.value_length": latent.kv_rank,
        _KEYS: attention.head_dim,
        _VALUES: latent.value_dim,
        _RANK: latent.kv_rank,
    }
    if latent.q_rank is not None:
        made[_QUERY_RANK] = latent.q_rank
    if rope.mscale_all_dim:
        made[LOG_MULTIPLIER] = 0.1 * rope.mscale_all_dim
    return made


def config_fields(own: Mapping[str, Any], gguf: GGUF) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the fields as those of a file of heads as wide as what is rotated, the config.json's of the
    latent). Raises ConfigError for sizes that do not fit.
    """
    names = (_KEYS, _VALUES, _RANK, "rope.dimension_count", "attention.head_count")
    sizes: list[Any] = [own.get(name) for name in names]
    if not all(type(size) is int and size > 0 for size in sizes):
        raise ConfigError(
            f"{', '.join(names)} are {sizes!r:.100}, expected positive integers", file=gguf.file
        )
    keys, values, rank, turned, heads = sizes
    wide = own.get("attention.key_length"), own.get("attention.value_length")
    if keys <= turned or wide != (rank + turned, rank) or own.get("attention.head_count_kv") != 1:
        raise ConfigError(
            f"keys of {keys}, {turned} rotated, and a latent of {rank} do not fit widths {wide}",
            file=gguf.file,
        )
    flat = {name: value for name, value in own.items() if name not in KNOWN - {LOG_MULTIPLIER}}
    flat |= {"attention.key_length": turned, "attention.value_length": turned}
    fields = {
        "q_lora_rank": own.get(_QUERY_RANK),
        "kv_lora_rank": rank,
        "qk_rope_head_dim": turned,
        "qk_nope_head_dim": keys - turned,
        "v_head_dim": values,
        "rope_interleave": True,
    }
    return {**flat, "attention.head_count_kv": heads}, fields


def stack(
    name: str, attention: AttentionSpec, make: Callable[[], torch.Tensor]
) -> tuple[tuple[int, ...], Callable[[], torch.Tensor]]:
    """The shape of ggml's stack `name`, and what makes it of the matrix that `make` gives."""
    latent, rope = attention.latent, attention.rope
    assert latent is not None and rope is not None
    sizes = (attention.head_dim - rope.dim, latent.value_dim)
    keys = f".{STACKS[0]}." in name

    def one() -> torch.Tensor:
        parts = make().view(attention.heads, sum(sizes), -1).split_with_sizes(sizes, 1)
        return parts[0].mT.contiguous() if keys else parts[1].contiguous()

    shape = (latent.kv_rank, sizes[0]) if keys else (sizes[1], latent.kv_rank)
    return (attention.heads, *shape), one


def joined(keys: GGUFTensor, values: GGUFTensor) -> tuple[int, int]:
    """The shape of the matrix that both stacks make; CheckpointError where they do not fit."""
    if len(keys.shape) != 3 or len(values.shape) != 3 or keys.shape[:2] != values.shape[::2]:
        raise CheckpointError(
            f"shapes {list(keys.shape)} and {list(values.shape)} of keys and values do not fit",
            tensor=keys.name,
            file=keys.file,
        )
    return keys.shape[0] * (keys.shape[2] + values.shape[1]), keys.shape[1]
