"""OLMo 2: norms after the branches only, q and k normalised over their whole width."""

from typing import Any

from ...nn.spec import ModelSpec, NormSpec
from ..config_fields import Fields
from ..dense import dense_spec, with_attention, with_layers
from ..names import LLAMA, POST_NORMS, QK_NORMS, names

NAMES = names(LLAMA, QK_NORMS, POST_NORMS)


def spec(fields: Fields) -> ModelSpec:
    """Matches transformers' `Olmo2ForCausalLM`."""
    return normed_after(fields)


def normed_after(fields: Fields, **more: Any) -> ModelSpec:
    """OLMo's decoder since its second version; `more` goes to `dense_spec`."""
    bias = fields.flag("attention_bias", False)
    norm = NormSpec(fields.number("rms_norm_eps", 1e-5), cast_first=False)
    made = dense_spec(fields, qkv_bias=bias, out_bias=bias, norm=norm, qk_norm=True, **more)
    return with_layers(with_attention(made, qk_norm_over="width"), pre_norm=False, post_norm=True)
