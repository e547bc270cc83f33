"""OLMo 3: OLMo 2 with windows in three of four layers, YaRN in the others."""

from ...nn.spec import ModelSpec
from ..config_fields import Fields
from ..dense import head_width, layer_types, typed_windows
from ..names import LLAMA, POST_NORMS, QK_NORMS, names
from ..rope_config import typed_ropes
from .olmo2 import normed_after

NAMES = names(LLAMA, QK_NORMS, POST_NORMS)
_THETAS = {"full_attention": 5e5, "sliding_attention": 5e5}


def spec(fields: Fields) -> ModelSpec:
    """Matches transformers' `Olmo3ForCausalLM`."""
    types = layer_types(fields, every=4)
    positions = fields.integer("max_position_embeddings", 2048)
    ropes = typed_ropes(fields, head_width(fields), positions, _THETAS)
    return normed_after(
        fields,
        windows=typed_windows(fields, types, 4096),
        ropes=tuple(ropes[kind] for kind in types),
    )
