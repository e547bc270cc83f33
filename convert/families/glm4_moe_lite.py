"""GLM-4.7-Flash: DeepSeek-V3's latent attention and mixtures."""

from ...nn.spec import ModelSpec
from ..config_fields import Fields
from ..mixture import with_sigmoid_experts
from . import deepseek_v3

NAMES = deepseek_v3.NAMES


def spec(fields: Fields) -> ModelSpec:
    """Matches transformers' `Glm4MoeLiteForCausalLM`."""
    made = deepseek_v3.latent_spec(
        fields, positions=202752, plain=192, value=256, q_rank=768, eps=1e-5
    )
    depth = len(made.layers)
    types = fields.texts("mlp_layer_types", depth, ("dense", "sparse"))
    # Of published configs: what transformers reads the types of layers for, and what they are.
    fields.expect("first_k_dense_replace", 1)
    fields.expect("topk_method", "noaux_tc")
    fields.take("num_nextn_predict_layers", 1)
    return with_sigmoid_experts(
        fields,
        made,
        experts=64,
        active=4,
        width=1536,
        scale=1.8,
        dense=frozenset(i for i in range(depth) if (types[i] == "dense" if types else i == 0)),
    )
