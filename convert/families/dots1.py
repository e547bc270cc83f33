"""dots.llm1: Qwen3's attention with DeepSeek-V3's mixtures."""

from ...nn.spec import ModelSpec
from ..config_fields import Fields
from ..dense import dense_spec, typed_windows
from ..mixture import SIGMOID_NAMES, stacked, with_sigmoid_experts
from ..names import LLAMA, QK_NORMS, names

NAMES = names(LLAMA, QK_NORMS, SIGMOID_NAMES, fused=stacked("mlp"), peft_joins=True)


def spec(fields: Fields) -> ModelSpec:
    """Matches transformers' `Dots1ForCausalLM`."""
    depth = fields.integer("num_hidden_layers")
    first = fields.integer("max_window_layers", 62, low=0)
    types = fields.texts("layer_types", depth, ("full_attention", "sliding_attention"))
    window = fields.integer_or_null("sliding_window", 4096)
    if types is None:
        slides = [window is not None and i >= first for i in range(depth)]
        types = ["sliding_attention" if here else "full_attention" for here in slides]
    bias = fields.flag("attention_bias", False)
    made = dense_spec(
        fields,
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=True,
        windows=typed_windows(fields, types, 4096),
    )
    # Of published configs.
    fields.expect("topk_method", "noaux_tc")
    fields.expect("scoring_func", "noaux_tc")
    fields.expect("moe_layer_freq", 1)
    for name in ("n_routed_experts", "n_shared_experts", "num_experts_per_tok"):
        fields.integer(name)
    return with_sigmoid_experts(
        fields, made, experts=None, active=None, width=1408, scale=1.0, dense=0, normalise=False
    )
