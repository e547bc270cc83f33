"""StableLM 2: LayerNorm, a quarter of each head rotated, branches in turn or side by side."""

from ...nn.spec import ModelSpec, NormSpec
from ..config_fields import Fields
from ..dense import dense_spec, head_width, with_layers
from ..names import LLAMA, names
from ..rope_config import rope_spec

NAMES = names(LLAMA)
_POSITIONS = 4096


def spec(fields: Fields) -> ModelSpec:
    """Matches transformers' `StableLmForCausalLM`."""
    fields.expect("qk_layernorm", False)
    positions = fields.integer("max_position_embeddings", _POSITIONS)
    rope = rope_spec(fields, head_width(fields), positions, 10000.0, partial=0.25)
    made = dense_spec(
        fields,
        kv_heads=32,
        max_positions=_POSITIONS,
        qkv_bias=fields.flag("use_qkv_bias", False),
        norm=NormSpec(fields.number("layer_norm_eps", 1e-5), kind="layer", bias=True),
        ropes=(rope,) * fields.integer("num_hidden_layers"),
    )
    return with_layers(made, parallel=fields.flag("use_parallel_residual", False))
