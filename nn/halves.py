"""A layer's two halves: which functions stand behind their norms, and which of them are not
written by hand.
"""

from functools import partial
from typing import cast

import torch

from ..kernels.attention import Documents
from ..quant.fake import Fake
from . import experts, recurrent, rope, tree
from .again import Again
from .attention import Heads, Visible
from .fast_attention import FastAttention
from .fast_experts import FastExperts
from .fast_latent import FastLatent
from .fast_mlp import FastMLP
from .fast_recurrent import FastRecurrent
from .half import Function, Half
from .linear import seed_after
from .mixer import attention
from .mlp import mlp
from .residuals import Policy
from .spec import AttentionSpec, LayerSpec, MoESpec
from .stacks import KEY

# What the parts of a layer's params are called.
PARTS = {"attn": "attention", "recurrent": "the recurrent mixer", "mlp": "the MLP"}
# In place of parts: all of a layer, of which nothing but the input is kept.
WHOLE = "layer"


def halves(
    spec: LayerSpec,
    p: tree.Tree,
    adapters: tree.Tree,
    table: rope.Table | None,
    seen: Visible,
    starts: torch.Tensor | None,
    policy: Policy,
    seed: int | None,
    heads: Heads | None = None,
) -> tuple[Half, Half]:
    """(mixer, MLP) of a layer with frozen params; arguments as of `decoder.layer`."""
    again = _again(spec, p, adapters, seen, seed)
    mixers: dict[str, Function] = {}
    if spec.attention is not None:
        mixers["attn"] = Again(partial(attention, spec=spec.attention, table=table, seen=seen))
        if "attn" not in again:
            mixers["attn"] = _fast_attention(spec.attention, table, seen, policy, heads)
    if spec.recurrent is not None:
        mixers["recurrent"] = FastRecurrent(spec.recurrent, starts, policy)
        if "recurrent" in again:
            mixers["recurrent"] = Again(partial(recurrent.mix, spec=spec.recurrent, starts=starts))
    mixer = Half(mixers, spec.norm if spec.pre_norm else None, "attn_norm", seed)
    function: Function
    tile = None
    if isinstance(spec.mlp, MoESpec):
        function = Again(partial(experts.moe, spec=spec.mlp))
        if "mlp" not in again:
            function = FastExperts(spec.mlp, policy)
    else:
        function = (
            Again(partial(mlp, spec=spec.mlp)) if "mlp" in again else FastMLP(spec.mlp, policy)
        )
        tile = policy.tile
    shared = spec.parallel and not spec.own_norms
    own = "attn_norm" if shared else "mlp_norm"
    how = mixer.norm if spec.mlp_normed else None
    return mixer, Half({"mlp": function}, how, own, seed_after(seed, 4), tile)


def _again(
    spec: LayerSpec, p: tree.Tree, adapters: tree.Tree, seen: Visible, seed: int | None
) -> dict[str, str]:
    waits = None
    if isinstance(spec.mlp, MoESpec):
        worn = tree.get(adapters, "mlp", KEY)
        waits = experts.waits_for(p["mlp"][KEY], worn, spec.mlp, seed)
    masked = isinstance(seen, torch.Tensor)
    rounded = any(isinstance(leaf, Fake) for leaf in tree.leaves(p))
    return runs_again(spec, adapters, masked=masked, rounded=rounded, waits=waits)


def whole(
    spec: LayerSpec, p: tree.Tree, adapters: tree.Tree, seen: Visible, seed: int | None
) -> bool:
    """Whether all of a layer runs again: it shares keys and values, and its attention does."""
    shares = spec.lends or spec.kv_from is not None
    return shares and WHOLE in _again(spec, p, adapters, seen, seed)


def _fast_attention(
    spec: AttentionSpec,
    table: rope.Table | None,
    seen: Visible,
    policy: Policy,
    heads: Heads | None,
) -> Function:
    documents = cast("Documents | None", seen)
    if spec.latent is None:
        return FastAttention(spec, table, documents, policy, heads)
    assert table is not None
    return FastLatent(spec, table, documents, policy)


def by_hand(half: Half, part: str) -> bool:
    """Whether a part's function is written by hand, and reads its adapters cast."""
    return not isinstance(half.functions[part], Again)


def runs_again(
    spec: LayerSpec,
    adapters: tree.Tree = None,
    *,
    masked: bool = False,
    dora: bool = False,
    rounded: bool = False,
    waits: str | None = None,
) -> dict[str, str]:
    """Which parts of a layer autograd runs again in backward, or `WHOLE`, and what makes it so.

    masked: whether the batch needs a mask; dora: whether all parts have DoRA with dropout; rounded:
    whether weights are rounded in training; waits: why experts run one after the other.
    """
    found: dict[str, str] = {}
    if spec.attention is not None and masked:
        found["attn"] = "a mask"
    if isinstance(spec.mlp, MoESpec) and spec.mlp.norms is not None and spec.mlp.shared_gate:
        found["mlp"] = "a shared MLP with a gate and norms"
    elif isinstance(spec.mlp, MoESpec) and waits is not None:
        found["mlp"] = f"experts one after the other ({waits})"
    there = {"attn": spec.attention, "recurrent": spec.recurrent, "mlp": spec.mlp}
    for part in (name for name, own in there.items() if own is not None):
        worn = [f for f in tree.leaves(tree.get(adapters, part)) if f.magnitude is not None]
        if worn and part == "mlp" and isinstance(spec.mlp, MoESpec):
            found.setdefault(part, "DoRA in a mixture")
        elif dora or any(leaf.dropout for leaf in worn):
            found.setdefault(part, "DoRA with dropout")
        elif rounded:
            found.setdefault(part, "weights that are rounded in training")
    if "attn" in found and (spec.lends or spec.kv_from is not None):
        return {WHOLE: f"keys and values that layers share, and {found['attn']}"}
    return found
