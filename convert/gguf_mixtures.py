"""The architectures of GGUF files of mixtures that are routed in other ways than Mixtral's."""

from dataclasses import replace

from .gguf_architecture import EXPERTS, RMS_EPS, WINDOW, Architecture, Field

EXPERT_WIDTH = "expert_feed_forward_length"
SHARED_WIDTH = "expert_shared_feed_forward_length"
ACTIVE = Field("expert_used_count", "num_experts_per_tok")
GRANITE = (
    Field("attention.scale", "attention_multiplier", required=True),
    Field("embedding_scale", "embedding_multiplier", 1.0),
    Field("residual_scale", "residual_multiplier", 1.0),
    Field("logit_scale", "logits_scaling", 1.0),
)
# llama.cpp's number of routers that weigh by sigmoids.
GATING = {"expert_gating_func": 2}
# The bias of such a router.
CHOICE = {"exp_probs_b.bias": "layers.*.mlp.router.bias"}
_SIGMOID = (
    Field(EXPERTS, "n_routed_experts"),
    ACTIVE,
    Field(EXPERT_WIDTH, "moe_intermediate_size"),
    Field("expert_shared_count", "n_shared_experts", low=0),
    Field("expert_group_count", "n_group", 1),
    Field("expert_group_used_count", "topk_group", 1),
    Field("expert_weights_scale", "routed_scaling_factor", 1.0),
    Field("expert_weights_norm", "norm_topk_prob", False),
    Field("leading_dense_block_count", "first_k_dense_replace", 0, low=0),
)

_V2 = Architecture(
    "deepseek2",
    "deepseek_v2",
    fields=tuple(f for f in _SIGMOID if f.hf not in ("n_group", "topk_group", "norm_topk_prob")),
    constants={"norm_topk_prob": False},
    # It is llama.cpp's epsilon of the latents' norms too.
    fixed={"expert_gating_func": 1, RMS_EPS[0]: 1e-6},
    latent=True,
    modules={
        "attn_q_a": "layers.*.attn.q_a",
        "attn_q_a_norm": "layers.*.attn.q_a_norm",
        "attn_q_b": "layers.*.attn.q_b",
        "attn_kv_a_mqa": "layers.*.attn.kv_a",
        "attn_kv_a_norm": "layers.*.attn.kv_a_norm",
        "attn_kv_b": "layers.*.attn.kv_b",
    },
)
_DEEPSEEK = (
    _V2,
    replace(
        _V2,
        family="deepseek_v3",
        marker="expert_weights_norm",
        fields=_SIGMOID,
        constants={},
        fixed={**_V2.fixed, **GATING},
        tensors=CHOICE,
    ),
)
MIXTURES = (
    Architecture(
        "gpt-oss",
        "gpt_oss",
        fields=(
            Field(EXPERTS, "num_local_experts"),
            ACTIVE,
            Field(WINDOW, "sliding_window"),
            Field(EXPERT_WIDTH, "intermediate_size"),
        ),
        windows=True,
        # llama.cpp begins and ends YaRN's ramp at whole pairs of features nevertheless.
        yarn={"truncate": False},
        modules={"post_attention_norm": "layers.*.mlp_norm"},
        tensors={"attn_sinks.weight": "layers.*.attn.sinks"},
    ),
    Architecture(
        "glm4moe",
        "glm4_moe",
        fields=_SIGMOID,
        flags={
            "attention_bias": "blk.0.attn_q.bias",
            "use_qk_norm": "blk.0.attn_q_norm.weight",
        },
        fixed=GATING,
        partial=True,
        modules={"post_attention_norm": "layers.*.mlp_norm"},
        tensors=CHOICE,
    ),
    *_DEEPSEEK,
    Architecture("dots1", "dots1", fields=_SIGMOID, fixed=GATING, tensors=CHOICE),
)
