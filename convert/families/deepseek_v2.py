"""DeepSeek-V2 and its Lite and Coder models: latent attention, mixtures routed by softmax."""

from dataclasses import replace

from ...nn.spec import ModelSpec
from ..config_fields import Fields
from ..mixture import expert_names, grouped, mlp_spec, moe_spec, shared_names, stacked, with_experts
from ..names import names
from . import deepseek_v3

NAMES = names(
    {ours: hf for ours, hf in deepseek_v3.NAMES.table if ours != "layers.*.mlp.router.bias"},
    expert_names("mlp"),
    shared_names("mlp.shared_experts"),
    fused=stacked("mlp"),
    peft_joins=True,
)


def spec(fields: Fields) -> ModelSpec:
    """Matches transformers' `DeepseekV2ForCausalLM`, whose rotation is always of neighbours."""
    made = deepseek_v3.latent_spec(fields, positions=2048)
    fields.expect("rope_interleave", True)
    fields.expect("mlp_bias", False)
    # transformers never divides the weights by their sum, whatever is written.
    fields.expect("norm_topk_prob", False)
    fields.expect("scoring_func", "softmax")
    fields.expect("moe_layer_freq", 1)
    for name in ("ep_size", "aux_loss_alpha", "seq_aux"):
        fields.take(name, None)
    method = fields.choice("topk_method", {"greedy": False, "group_limited_greedy": True}, "greedy")
    count = fields.integer("n_routed_experts", 64)
    groups = grouped(fields, count) if method else {}
    for name in ("n_group", "topk_group"):
        fields.take(name, None)
    each = mlp_spec(fields, "moe_intermediate_size", 1407)
    moe = moe_spec(
        fields,
        each,
        count="n_routed_experts",
        experts=64,
        wide_router=True,
        normalise=False,
        group_best=1,
        scale=fields.number("routed_scaling_factor", 1.0),
        shared=replace(each, dim=each.dim * fields.integer("n_shared_experts", 2)),
        **groups,
    )
    first = fields.integer("first_k_dense_replace", 0, low=0)
    return with_experts(made, moe, frozenset(range(first)))
