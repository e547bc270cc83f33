"""The fields that mixtures of experts have in common, read into the `MoESpec` of their layers."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from ..nn.spec import LayerSpec, MLPSpec, ModelSpec, MoESpec
from .config_fields import Fields
from .dense import ACTIVATIONS


def expert_names(
    block: str,
    gate: str = "gate_proj",
    up: str = "up_proj",
    down: str = "down_proj",
    *,
    router: str = "gate",
) -> dict[str, str]:
    """The names of a router and its experts, stored one by one in the module `block` of a layer.

    Where experts are stored as stacks alone, theirs are the names that adapters have.
    """
    inner = f"model.layers.*.{block}.experts.*"
    return {
        "layers.*.mlp.router": f"model.layers.*.{block}.{router}",
        "layers.*.mlp.experts.*.gate": f"{inner}.{gate}",
        "layers.*.mlp.experts.*.up": f"{inner}.{up}",
        "layers.*.mlp.experts.*.down": f"{inner}.{down}",
    }


def shared_names(module: str) -> dict[str, str]:
    """The names of the MLP beside a layer's experts that every token passes, its `module`."""
    return {
        f"layers.*.mlp.shared.{part}": f"model.layers.*.{module}.{part}_proj"
        for part in ("gate", "up", "down")
    }


# DeepSeek-V3's, whose routers have a bias for the choice alone.
SIGMOID_NAMES = {
    **expert_names("mlp"),
    "layers.*.mlp.router.bias": "model.layers.*.mlp.gate.e_score_correction_bias",
    **shared_names("mlp.shared_experts"),
}


def stacked(block: str | None = None) -> dict[str, tuple[str, ...]]:
    """The two tensors [x, 2f, e] and [x, e, f] that transformers 5 has in place of `experts.*`, in
    the module `block` of a layer, or in the layer itself.
    """
    experts = f"model.layers.*.{block}.experts" if block else "model.layers.*.experts"
    return {
        f"{experts}.gate_up_proj": ("layers.*.mlp.experts.*.gate", "layers.*.mlp.experts.*.up"),
        f"{experts}.down_proj": ("layers.*.mlp.experts.*.down",),
    }


def mlp_spec(fields: Fields, width: str, default: int) -> MLPSpec:
    """An expert, as wide as the field `width` says."""
    return MLPSpec(fields.integer(width, default), fields.choice("hidden_act", ACTIVATIONS, "silu"))


def moe_spec(
    fields: Fields,
    mlp: MLPSpec,
    *,
    count: str = "num_experts",
    per_token: str = "num_experts_per_tok",
    experts: int | None = None,
    active: int | None = None,
    **others: Any,
) -> MoESpec:
    """A mixture of MLPs like `mlp`; `count` and `per_token` name the fields of how many there are
    and how many a token passes, which have no default where none is given; `others` as in
    `MoESpec`.

    Raises ConfigError where a token would pass more experts than there are, or for a loss term.
    """
    number = fields.integer(count, *([] if experts is None else [experts]))
    picked = fields.integer(per_token, *([] if active is None else [active]))
    if picked > number:
        raise fields.error(f"{per_token} is {picked}, and {count} is {number}")
    # The auxiliary loss, which transformers adds only where the logits are asked for.
    fields.expect("output_router_logits", False)
    fields.take("router_aux_loss_coef", 0.0)
    return MoESpec(number, picked, mlp, **others)


def grouped(
    fields: Fields, experts: int, *, groups: int = 1, best: int = 1, active: int = 8
) -> dict[str, Any]:
    """`n_group` and `topk_group` as `MoESpec`'s groups; ConfigError where they do not fit."""
    groups = fields.integer("n_group", groups)
    best = fields.integer("topk_group", best)
    active = fields.integer("num_experts_per_tok", active)
    each = experts // groups
    # A group counts with the sum of its two best experts.
    if experts % groups or each < 2 or best > groups or active > best * each:
        raise fields.error(
            f"n_group is {groups} and topk_group {best}: n_routed_experts {experts} do not make "
            f"groups of two or more, of which {best} have num_experts_per_tok {active}"
        )
    return {"groups": groups, "active_groups": best}


def with_sigmoid_experts(
    fields: Fields,
    spec: ModelSpec,
    *,
    experts: int | None,
    width: int,
    scale: float,
    dense: int | frozenset[int],
    groups: int = 1,
    best: int = 1,
    active: int | None = 8,
    normalise: bool = True,
) -> ModelSpec:
    """The spec with DeepSeek-V3's mixtures behind the first layers: routed by sigmoids and groups,
    with shared experts as one MLP. The keywords are the family's own defaults; where `dense` is no
    number, they are the layers without experts, which no field tells.
    """
    each = mlp_spec(fields, "moe_intermediate_size", width)
    moe = moe_spec(
        fields,
        each,
        count="n_routed_experts",
        experts=experts,
        active=active,
        router="sigmoid",
        wide_router=True,
        choice_bias=True,
        normalise=fields.flag("norm_topk_prob", normalise),
        normalise_eps=1e-20,
        scale=fields.number("routed_scaling_factor", scale),
        shared=replace(each, dim=each.dim * fields.integer("n_shared_experts", 1)),
        **grouped(
            fields,
            fields.integer("n_routed_experts", experts),
            groups=groups,
            best=best,
            active=active or 8,
        ),
    )
    if isinstance(dense, int):
        dense = frozenset(range(fields.integer("first_k_dense_replace", dense, low=0)))
    return with_experts(spec, moe, dense)


def with_experts(spec: ModelSpec, moe: MoESpec, dense: frozenset[int] = frozenset()) -> ModelSpec:
    """The spec with this mixture in every layer that is not in `dense`."""

    def changed(i: int, layer: LayerSpec) -> LayerSpec:
        return layer if i in dense else replace(layer, mlp=moe)

    return replace(spec, layers=tuple(changed(i, x) for i, x in enumerate(spec.layers)))


def beside(fields: Fields, spec: ModelSpec) -> ModelSpec:
    """The spec with a mixture beside the MLP of each layer, where `enable_moe_block` says so, each
    with norms of its own (Gemma 4).
    """
    if not fields.flag("enable_moe_block", False):
        for name in ("num_experts", "top_k_experts", "moe_intermediate_size"):
            fields.take(name, None)
        return spec

    def changed(layer: LayerSpec) -> LayerSpec:
        shared = layer.mlp
        assert isinstance(shared, MLPSpec)
        moe = moe_spec(
            fields,
            replace(shared, dim=fields.integer("moe_intermediate_size")),
            per_token="top_k_experts",
            shared=shared,
            norms=layer.norm,
            router_norm=replace(layer.norm, weight=False),
        )
        return replace(layer, mlp=moe)

    return replace(spec, layers=tuple(map(changed, spec.layers)))


def layer_numbers(fields: Fields, name: str, default: Iterable[int]) -> frozenset[int]:
    """A list of numbers of layers; `default` where there is none."""
    depth = fields.integer("num_hidden_layers")
    given = fields.take(name, None)
    if given is None:
        return frozenset(default)
    if not isinstance(given, list) or not all(type(i) is int and 0 <= i < depth for i in given):
        raise fields.error(f"{name} is {given!r:.200}, expected numbers of the {depth} layers")
    return frozenset(given)


def dense_layers(fields: Fields) -> frozenset[int]:
    """The layers without experts, by `decoder_sparse_step` and `mlp_only_layers` (Qwen)."""
    depth = fields.integer("num_hidden_layers")
    step = fields.integer("decoder_sparse_step", 1)
    only = layer_numbers(fields, "mlp_only_layers", ())
    return frozenset(i for i in range(depth) if i in only or (i + 1) % step)


def interleaved_layers(fields: Fields) -> frozenset[int]:
    """The layers without experts, by `interleave_moe_layer_step` and `moe_layers` (Llama 4)."""
    depth, step = (
        fields.integer("num_hidden_layers"),
        fields.integer("interleave_moe_layer_step", 1),
    )
    return frozenset(range(depth)) - layer_numbers(
        fields, "moe_layers", range(step - 1, depth, step)
    )
