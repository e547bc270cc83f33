"""OLMo 1: LayerNorm without weights, projections that may be clipped."""

from ...nn.spec import ModelSpec, NormSpec
from ..config_fields import Fields
from ..dense import dense_spec, with_attention
from ..names import LLAMA, names

_NORMS = ("layers.*.attn_norm", "layers.*.mlp_norm", "norm")
NAMES = names({ours: hf for ours, hf in LLAMA.items() if ours not in _NORMS})


def spec(fields: Fields) -> ModelSpec:
    """Matches transformers' `OlmoForCausalLM`."""
    bias = fields.flag("attention_bias", False)
    norm = NormSpec(1e-5, kind="layer", weight=False)
    made = dense_spec(fields, qkv_bias=bias, out_bias=bias, norm=norm)
    return with_attention(made, clip=fields.number_or_null("clip_qkv", None))
