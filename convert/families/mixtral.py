"""Mixtral: Mistral with a mixture of experts in every layer."""

from ...nn.spec import ModelSpec, NormSpec
from ..config_fields import Fields
from ..dense import dense_spec
from ..mixture import expert_names, mlp_spec, moe_spec, stacked, with_experts
from ..names import LLAMA, names

NAMES = names(
    LLAMA,
    expert_names("block_sparse_moe", "w1", "w3", "w2"),
    # As transformers 5 has them in memory.
    fused=stacked("mlp"),
    peft_joins=True,
    aliases={"model.layers.*.mlp.gate": "layers.*.mlp.router"},
)


def spec(fields: Fields) -> ModelSpec:
    """Matches transformers' `MixtralForCausalLM`."""
    window = fields.integer_or_null("sliding_window", None)
    fields.expect("router_jitter_noise", 0)
    made = dense_spec(
        fields,
        kv_heads=8,
        max_positions=131072,
        theta=1e6,
        norm=NormSpec(fields.number("rms_norm_eps", 1e-5)),
        windows=(window,) * fields.integer("num_hidden_layers"),
    )
    mlp = mlp_spec(fields, "intermediate_size", 14336)
    return with_experts(made, moe_spec(fields, mlp, count="num_local_experts", experts=8, active=2))
