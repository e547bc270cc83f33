"""A layer of a decoding step in few launches, where its weights are packed.

Norm, q with k and v, heads and cache, attention in its two parts, o with the residual; norm, gate
with up, down with the residual: nine. A norm of what a branch makes is one more each. Each half
runs so by itself; the other, and other layers, run as `decoder.layer` has them.
"""

from typing import NamedTuple

import torch

from ..kernels.decode_attention import decode_attention
from ..kernels.gated import ACTIVATIONS
from ..kernels.head_step import head_step
from . import packed, rope, tree
from .attention import Heads, Span, head_norm, queries, reach, terms
from .cache import Buffers
from .decoder import fed
from .layer_inputs import ended
from .lora import LoRA
from .mixer import mixer
from .norm import add, norm
from .products import Projection
from .spec import AttentionSpec, LayerSpec, MLPSpec, MoESpec

Group = tuple[list[Projection], list[LoRA | None]]


class Fused(NamedTuple):
    """Which halves of a layer run in few launches."""

    attention: bool
    mlp: bool


def covers(
    x: torch.Tensor,
    p: tree.Tree,
    adapters: tree.Tree,
    table: rope.Table | None,
    spec: LayerSpec,
) -> Fused:
    """Which halves `layer` can run so for x [b, e]."""
    if spec.parallel:
        return Fused(False, False)

    def taken(part: str, *groups: tuple[str, ...]) -> bool:
        return all(packed.takes_all(x, *_group(p, adapters, part, *names)) for names in groups)

    how = spec.attention if spec.recurrent is None else None
    turned = table is not None and table.query_scale is None
    attention = turned and how is not None and _plain_attention(how)
    if attention and how is not None:
        attention = taken("attn", how.projections, ("o",))
    return Fused(attention, _plain_mlp(spec.mlp) and taken("mlp", ("gate", "up"), ("down",)))


def _plain_mlp(mlp: MLPSpec | MoESpec) -> bool:
    """Whether the MLP is made of what is here and nothing else."""
    if not isinstance(mlp, MLPSpec) or not mlp.gated or mlp.activation not in ACTIVATIONS:
        return False
    return (mlp.gate_scale, mlp.down_scale) == (1.0, 1.0)


def _plain_attention(spec: AttentionSpec) -> bool:
    """Whether attention is."""
    if spec.rope is None or not spec.rope.dim or spec.latent is not None or spec.clip is not None:
        return False
    if (spec.in_scale, spec.out_scale) != (1.0, 1.0) or spec.gated:
        return False
    how = spec.qk_norm
    if how is None:
        return True
    return (
        how.kind == "rms" and how.weight and spec.qk_norm_over == "head" and not spec.qk_norm_after
    )


def _group(p: tree.Tree, adapters: tree.Tree, part: str, *names: str) -> Group:
    """Projections that run together, with their adapters."""
    own = tree.get(adapters, part) or {}
    return [p[part][name] for name in names], [own.get(name) for name in names]


def layer(
    x: torch.Tensor,
    p: tree.Tree,
    adapters: tree.Tree,
    table: rope.Table | None,
    seen: Span,
    starts: None,
    heads: Heads | None,
    given: torch.Tensor | None,
    fused: Fused,
    *,
    spec: LayerSpec,
    buffers: Buffers,
) -> torch.Tensor:
    """`decoder.layer` of one token a row, x [b, 1, e] -> [b, 1, e], of which the halves that are
    `fused` run so. The token's keys and values are written to `buffers`, those of `heads` were.
    """
    inner = norm(x, p.get("attn_norm"), spec.norm) if spec.pre_norm else x
    if fused.attention:
        assert table is not None
        own = table, seen, buffers, None if spec.lends else heads
        mid = _attended(x[:, 0], inner[:, 0], p, adapters, *own, spec)[:, None]
    else:
        args = inner, p, adapters or {}, table, seen, starts
        branch = mixer(*args, spec=spec, buffers=buffers, heads=heads)
        mid = add(x, branch, p.get("attn_post_norm"), spec)
    inner = norm(mid, p.get("mlp_norm"), spec.norm) if spec.mlp_normed else mid
    if fused.mlp:
        assert isinstance(spec.mlp, MLPSpec)
        gate_up = _group(p, adapters, "mlp", "gate", "up")
        hidden = packed.project(inner[:, 0], *gate_up, activation=spec.mlp.activation)
        made = _onto(mid[:, 0], hidden, p, adapters, ("mlp", "down"), spec)[:, None]
    else:
        made = fed(mid, inner, p, adapters, spec)
    return ended(made, p, adapters, given, spec)


def _attended(
    x: torch.Tensor,
    inner: torch.Tensor,
    p: tree.Tree,
    adapters: tree.Tree,
    table: rope.Table,
    seen: Span,
    buffers: Buffers,
    heads: Heads | None,
    spec: LayerSpec,
) -> torch.Tensor:
    """x [b, e] and what attention makes of inner [b, e]."""
    how = spec.attention
    assert how is not None and how.rope is not None
    made = packed.project(inner, *_group(p, adapters, "attn", *how.projections))
    if heads is not None:
        keys, values = heads
        q = queries(made.view(x.shape[0], 1, how.heads, -1), p["attn"], how, table)[:, 0]
    else:
        state, at = buffers
        assert isinstance(at, torch.Tensor)
        keys, values = state["keys"], state["values"]
        q = head_step(
            *(made, table.cos[:, 0], table.sin[:, 0], keys, values, at),
            interleaved=how.rope.interleaved,
            norm=head_norm(p["attn"], how),
            value_eps=None if how.v_norm is None else how.v_norm.eps,
            keys_as_values=how.keys_as_values,
        )
    own = terms(how, p["attn"], reach(keys, seen), keys.device)
    out = decode_attention(q, keys, values, *seen, **own).flatten(1)
    return _onto(x, out, p, adapters, ("attn", "o"), spec)


def _onto(
    x: torch.Tensor,
    made: torch.Tensor,
    p: tree.Tree,
    adapters: tree.Tree,
    path: tuple[str, str],
    spec: LayerSpec,
) -> torch.Tensor:
    """x [b, e] and the branch that the projection at `path` makes, normalised if the layer does."""
    group = _group(p, adapters, *path)
    if not spec.post_norm:
        return packed.project(made, *group, residual=x, residual_scale=spec.residual_scale)
    return add(x, packed.project(made, *group), p.get(f"{path[0]}_post_norm"), spec)
