"""GLM-4-0414: GLM with norms after the branches too."""

from ...nn.spec import ModelSpec
from ..config_fields import Fields
from ..dense import with_layers
from ..names import GATE_UP, LLAMA, names
from . import glm

NAMES = names(
    LLAMA,
    {
        "layers.*.attn_post_norm": "model.layers.*.post_self_attn_layernorm",
        "layers.*.mlp_post_norm": "model.layers.*.post_mlp_layernorm",
    },
    fused=GATE_UP,
)


def spec(fields: Fields) -> ModelSpec:
    """Matches transformers' `Glm4ForCausalLM`."""
    return with_layers(glm.spec(fields), post_norm=True)
