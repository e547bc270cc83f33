"""The architectures of GGUF files of mixtures that are routed in other ways than Mixtral's."""

from .gguf_architecture import EXPERTS, WINDOW, Architecture, Field

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
    Architecture("dots1", "dots1", fields=_SIGMOID, fixed=GATING, tensors=CHOICE),
)
