"""Granite 3 with a mixture of experts in every layer, stored as stacks."""

from ...nn.spec import ModelSpec
from ..config_fields import Fields
from ..mixture import mlp_spec, moe_spec, stacked, with_experts
from ..names import LLAMA, names
from . import granite

_BLOCK = "model.layers.*.block_sparse_moe"
_STACKS = stacked("block_sparse_moe")
_GATE_UP, _DOWN = _STACKS.values()

NAMES = names(
    LLAMA,
    {
        "layers.*.mlp.router": f"{_BLOCK}.router.layer",
        # An expert's parts of a stack, which adapters are named by.
        "layers.*.mlp.experts.*.gate": f"{_BLOCK}.experts.*.gate_proj",
        "layers.*.mlp.experts.*.up": f"{_BLOCK}.experts.*.up_proj",
        "layers.*.mlp.experts.*.down": f"{_BLOCK}.experts.*.down_proj",
    },
    fused={**_STACKS, f"{_BLOCK}.input_linear": _GATE_UP, f"{_BLOCK}.output_linear": _DOWN},
    aliases={f"{_BLOCK}.router": "layers.*.mlp.router"},
)


def spec(fields: Fields) -> ModelSpec:
    """Matches transformers' `GraniteMoeForCausalLM`."""
    moe = moe_spec(
        fields,
        mlp_spec(fields, "intermediate_size", 11008),
        count="num_local_experts",
        experts=8,
        active=2,
        router="top_softmax",
    )
    return with_experts(granite.spec(fields), moe)
