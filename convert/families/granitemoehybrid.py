"""Granite 4: Mamba 2 or attention by layer, an MLP for every token, and maybe experts beside it."""

from ...nn.spec import ModelSpec, NormSpec
from ..config_fields import Fields
from ..dense import with_attention, with_layers
from ..hybrid import mamba2_names, mamba2_spec, with_recurrent
from ..mixture import mlp_spec
from ..names import names
from . import granite, granitemoe

_SHARED = "model.layers.*.shared_mlp"
_PARTS = {"gate": "gate_proj", "up": "up_proj", "down": "output_linear"}


def _fused(path: str) -> dict[str, tuple[str, ...]]:
    return {
        f"{_SHARED}.input_linear": (f"{path}.gate", f"{path}.up"),
        f"{_SHARED}.output_linear": (f"{path}.down",),
    }


# Of the MLP beside experts.
SHARED_NAMES = {
    f"layers.*.mlp.shared.{ours}": f"{_SHARED}.{theirs}" for ours, theirs in _PARTS.items()
}
SHARED_FUSED = _fused("layers.*.mlp.shared")
NAMES = names(
    dict(granitemoe.NAMES.table),
    mamba2_names("mamba"),
    # Beside experts the MLP is their shared one, without experts it is the layer's own.
    {f"layers.*.mlp.{ours}": f"{_SHARED}.{theirs}" for ours, theirs in _PARTS.items()},
    SHARED_NAMES,
    fused=dict(granitemoe.NAMES.fused) | _fused("layers.*.mlp"),
    or_fused=SHARED_FUSED,
    aliases=dict(granitemoe.NAMES.aliases),
)
_MAMBA = ("mamba", "linear_attention")


def spec(fields: Fields) -> ModelSpec:
    """Matches transformers' `GraniteMoeHybridForCausalLM`."""
    made = granite.spec(fields)
    norm = NormSpec(fields.number("rms_norm_eps", 1e-6))
    if fields.take("position_embedding_type", None) != "rope":
        made = with_attention(made, rope=None)
    fields.expect("normalization_function", "rmsnorm")
    fields.take("init_method", None)
    fields.rename("layers_block_type", "layer_types")
    depth = len(made.layers)
    types = fields.texts("layer_types", depth, (*_MAMBA, "attention", "full_attention"))
    mamba = mamba2_spec(
        fields,
        fields.integer("mamba_expand", 2) * made.dim,
        out_bias=fields.flag("mamba_proj_bias", False),
        norm=norm,
    )
    made = with_recurrent(made, mamba, [kind in _MAMBA for kind in types or ["mamba"] * depth])
    shared = mlp_spec(fields, "shared_intermediate_size", 1024)
    count = fields.integer("num_local_experts", 8, low=0)
    if not count:
        for name in ("num_experts_per_tok", "router_aux_loss_coef", "output_router_logits"):
            fields.take(name, None)
        return with_layers(made, mlp=shared)
    return with_layers(made, mlp=granitemoe.mixture(fields, shared))
