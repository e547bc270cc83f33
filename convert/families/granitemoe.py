"""Granite 3 with a mixture of experts in every layer, stored as stacks."""

from ...nn.spec import MLPSpec, ModelSpec, MoESpec
from ..config_fields import Fields
from ..mixture import expert_names, mlp_spec, moe_spec, stacked, with_experts
from ..names import LLAMA, names
from . import granite

_BLOCK = "model.layers.*.block_sparse_moe"
_STACKS = stacked("block_sparse_moe")
_GATE_UP, _DOWN = _STACKS.values()

NAMES = names(
    LLAMA,
    expert_names("block_sparse_moe", router="router.layer"),
    fused={**_STACKS, f"{_BLOCK}.input_linear": _GATE_UP, f"{_BLOCK}.output_linear": _DOWN},
    aliases={f"{_BLOCK}.router": "layers.*.mlp.router"},
)


def spec(fields: Fields) -> ModelSpec:
    """Matches transformers' `GraniteMoeForCausalLM`."""
    return with_experts(granite.spec(fields), mixture(fields))


def mixture(fields: Fields, shared: MLPSpec | None = None) -> MoESpec:
    """Granite's experts, beside which every token may pass a `shared` MLP."""
    return moe_spec(
        fields,
        mlp_spec(fields, "intermediate_size", 11008),
        count="num_local_experts",
        experts=8,
        active=2,
        router="top_softmax",
        shared=shared,
    )
