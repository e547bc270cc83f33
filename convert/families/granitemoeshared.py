"""Granite 3 with a mixture in every layer, and an MLP beside it for every token."""

from ...nn.spec import ModelSpec
from ..config_fields import Fields
from ..mixture import mlp_spec, with_experts
from ..names import names
from . import granite, granitemoe, granitemoehybrid

NAMES = names(
    dict(granitemoe.NAMES.table),
    granitemoehybrid.SHARED_NAMES,
    fused=dict(granitemoe.NAMES.fused) | granitemoehybrid.SHARED_FUSED,
    aliases=dict(granitemoe.NAMES.aliases),
)


def spec(fields: Fields) -> ModelSpec:
    """Matches transformers' `GraniteMoeSharedForCausalLM`."""
    made = granite.spec(fields)
    shared = None
    if fields.integer("shared_intermediate_size", 1024, low=0):
        shared = mlp_spec(fields, "shared_intermediate_size", 1024)
    return with_experts(made, granitemoe.mixture(fields, shared))
