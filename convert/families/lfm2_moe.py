"""LFM2 with mixtures, routed by sigmoids, behind its first layers."""

from ...nn.spec import MLPSpec, ModelSpec, NormSpec, ShortConvSpec
from ..config_fields import Fields
from ..dense import dense_spec
from ..hybrid import with_recurrent
from ..mixture import expert_names, moe_spec, stacked, with_experts
from ..names import names
from . import lfm2

_BLOCK = "feed_forward"
NAMES = names(
    dict(lfm2.NAMES.table),
    expert_names(_BLOCK, "w1", "w3", "w2"),
    {"layers.*.mlp.router.bias": f"model.layers.*.{_BLOCK}.expert_bias"},
    fused=stacked(_BLOCK),
)


def spec(fields: Fields) -> ModelSpec:
    """Matches transformers' `Lfm2MoeForCausalLM`."""
    fields.rename("tie_embedding", "tie_word_embeddings")
    made = dense_spec(
        fields,
        kv_heads=8,
        max_positions=128_000,
        theta=1e6,
        tied=True,
        norm=NormSpec(fields.number("norm_eps", 1e-5)),
        qk_norm=True,
        activation="silu",
    )
    depth, dim = len(made.layers), made.dim
    types = fields.texts("layer_types", depth, ("conv", "full_attention"))
    if types is None:
        raise fields.error("layer_types is missing: it says which layers are convolutions")
    conv = ShortConvSpec(dim, fields.integer("conv_L_cache", 3), fields.flag("conv_bias", False))
    made = with_recurrent(made, conv, [kind == "conv" for kind in types])
    moe = moe_spec(
        fields,
        MLPSpec(fields.integer("moe_intermediate_size", 1792)),
        experts=32,
        active=4,
        router="sigmoid",
        choice_bias=fields.flag("use_expert_bias", True),
        normalise=fields.flag("norm_topk_prob", True),
        normalise_eps=1e-6,
        scale=fields.number("routed_scaling_factor", 1.0),
    )
    dense = fields.integer("num_dense_layers", 2, low=0)
    return with_experts(made, moe, frozenset(range(dense)))
