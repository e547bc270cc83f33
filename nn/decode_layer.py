"""A layer of a decoding step in few launches, for plain layers of packed weights.

Norm, q with k and v, heads and cache, attention in its two parts, o with the residual, norm, gate
with up, down with the residual: nine. Other layers run as `decoder.layer` has them.
"""

import torch

from ..kernels.decode_attention import decode_attention
from ..kernels.gated import ACTIVATIONS
from ..kernels.head_step import head_step
from . import packed, rope, tree
from .attention import Span, head_norm, reach, terms
from .cache import Buffers
from .lora import LoRA
from .norm import norm
from .products import Projection
from .spec import AttentionSpec, LayerSpec, MLPSpec

Group = tuple[list[Projection], list[LoRA | None]]


def covers(
    x: torch.Tensor,
    p: tree.Tree,
    adapters: tree.Tree,
    table: rope.Table | None,
    spec: LayerSpec,
) -> bool:
    """Whether `layer` can run it for x [b, e]."""
    if not _plain(spec) or table is None or table.query_scale is not None:
        return False
    return all(packed.takes_all(x, *group) for group in _groups(p, adapters))


def _plain(spec: LayerSpec) -> bool:
    """Whether the layer is made of what is here and nothing else."""
    attention, mlp = spec.attention, spec.mlp
    if attention is None or spec.recurrent is not None or not isinstance(mlp, MLPSpec):
        return False
    if not spec.pre_norm or spec.post_norm or spec.parallel or spec.scaled:
        return False
    if spec.inputs is not None:
        return False
    if not mlp.gated or mlp.activation not in ACTIVATIONS:
        return False
    return (mlp.gate_scale, mlp.down_scale) == (1.0, 1.0) and _plain_attention(attention)


def _plain_attention(spec: AttentionSpec) -> bool:
    if spec.rope is None or not spec.rope.dim or spec.latent is not None or spec.clip is not None:
        return False
    if (spec.in_scale, spec.out_scale) != (1.0, 1.0) or spec.gated or spec.v_norm is not None:
        return False
    if spec.lends or spec.projections != ("q", "k", "v"):
        return False
    how = spec.qk_norm
    if how is None:
        return True
    return (
        how.kind == "rms" and how.weight and spec.qk_norm_over == "head" and not spec.qk_norm_after
    )


def _groups(p: tree.Tree, adapters: tree.Tree) -> tuple[Group, Group, Group, Group]:
    """The projections that run together, with their adapters."""

    def group(part: str, *names: str) -> Group:
        own = tree.get(adapters, part) or {}
        return [p[part][name] for name in names], [own.get(name) for name in names]

    return (
        group("attn", "q", "k", "v"),
        group("attn", "o"),
        group("mlp", "gate", "up"),
        group("mlp", "down"),
    )


def layer(
    x: torch.Tensor,
    p: tree.Tree,
    adapters: tree.Tree,
    table: rope.Table,
    seen: Span,
    buffers: Buffers,
    spec: LayerSpec,
) -> torch.Tensor:
    """x [b, e], one token a row -> [b, e]; the token's keys and values are written to `buffers`."""
    how, mlp = spec.attention, spec.mlp
    assert how is not None and how.rope is not None and isinstance(mlp, MLPSpec)
    state, at = buffers
    assert isinstance(at, torch.Tensor)
    keys, values = state["keys"], state["values"]
    qkv, o, gate_up, down = _groups(p, adapters)
    q = head_step(
        packed.project(norm(x, p.get("attn_norm"), spec.norm), *qkv),
        table.cos[:, 0],
        table.sin[:, 0],
        keys,
        values,
        at,
        interleaved=how.rope.interleaved,
        norm=head_norm(p["attn"], how),
    )
    own = terms(how, p["attn"], reach(keys, seen), keys.device)
    out = decode_attention(q, keys, values, *seen, **own).flatten(1)
    scale = spec.residual_scale
    x = packed.project(out, *o, residual=x, residual_scale=scale)
    inner = norm(x, p.get("mlp_norm"), spec.norm)
    hidden = packed.project(inner, *gate_up, activation=mlp.activation)
    return packed.project(hidden, *down, residual=x, residual_scale=scale)
