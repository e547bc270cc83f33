"""The architectures of GGUF files of models of which some layers have no attention."""

from dataclasses import replace

from .gguf_architecture import EXPERTS, RMS_EPS, ROTATED, Architecture, Field
from .gguf_mixtures import ACTIVE, CHOICE, EXPERT_WIDTH, GATING, GRANITE, SHARED_WIDTH

_LFM2 = Architecture(
    "lfm2",
    "lfm2",
    fields=(Field("shortconv.l_cache", "conv_L_cache"),),
    constants={"block_auto_adjust_ff_dim": False},
    eps=(RMS_EPS[0], "norm_eps"),
    mixers=("conv", "full_attention"),
    modules={
        "token_embd_norm": "norm",
        "shortconv.in_proj": "layers.*.recurrent.in",
        "shortconv.conv": "layers.*.recurrent.conv",
        "shortconv.out_proj": "layers.*.recurrent.out",
    },
)
_MAMBA2 = {
    "ssm_in": "layers.*.recurrent.in",
    "ssm_conv1d": "layers.*.recurrent.conv",
    "ssm_norm": "layers.*.recurrent.norm",
    "ssm_out": "layers.*.recurrent.out",
}
_DECAYS = {
    "ssm_a": "layers.*.recurrent.A_log",
    "ssm_dt.bias": "layers.*.recurrent.dt_bias",
}
_MAMBA2_TENSORS = {**_DECAYS, "ssm_d": "layers.*.recurrent.D"}
_MAMBA2_SIZES = (
    Field("ssm.conv_kernel", "mamba_d_conv"),
    Field("ssm.state_size", "mamba_d_state"),
    Field("ssm.group_count", "mamba_n_groups"),
    Field("ssm.time_step_rank", "mamba_n_heads"),
)
_CONV_BIAS = {"mamba_conv_bias": "blk.0.ssm_conv1d.bias"}
HYBRIDS = (
    Architecture(
        "falcon-h1",
        "falcon_h1",
        fields=(*_MAMBA2_SIZES, Field("ssm.inner_size", "mamba_d_ssm")),
        constants={"mamba_norm_before_gate": False},
        flags={**_CONV_BIAS, "mamba_rms_norm": "blk.0.ssm_norm.weight"},
        modules=_MAMBA2,
        tensors={**_MAMBA2_TENSORS, "ffn_norm": "layers.*.mlp_norm.weight"},
        folded=True,
    ),
    Architecture(
        "granitehybrid",
        "granitemoehybrid",
        fields=(
            *GRANITE,
            *_MAMBA2_SIZES,
            Field("ssm.inner_size", "mamba_expand", over="hidden_size"),
            Field(EXPERTS, "num_local_experts", 0),
            ACTIVE,
            Field(SHARED_WIDTH, "shared_intermediate_size", "intermediate_size"),
            Field(ROTATED, "position_embedding_type", words={True: "rope", False: None}),
        ),
        flags=_CONV_BIAS,
        permuted=True,
        divided=True,
        mixers=("mamba", "attention"),
        modules=_MAMBA2,
        tensors=_MAMBA2_TENSORS,
    ),
    Architecture(
        "qwen3next",
        "qwen3_next",
        fields=(
            Field("ssm.conv_kernel", "linear_conv_kernel_dim"),
            Field("ssm.state_size", "linear_key_head_dim"),
            Field("ssm.group_count", "linear_num_key_heads"),
            Field("ssm.time_step_rank", "linear_num_value_heads"),
            Field("ssm.inner_size", "linear_value_head_dim", over="linear_num_value_heads"),
            # llama.cpp takes values for as wide as keys.
            Field("ssm.state_size", "linear_value_head_dim"),
            Field("full_attention_interval", "full_attention_interval", 4),
            Field(EXPERTS, "num_experts"),
            ACTIVE,
            Field(EXPERT_WIDTH, "moe_intermediate_size"),
            Field(SHARED_WIDTH, "shared_expert_intermediate_size"),
        ),
        constants={"norm_topk_prob": True},
        # It is llama.cpp's epsilon of the norms of queries and keys too.
        fixed={RMS_EPS[0]: 1e-6},
        offset=1.0,
        partial=True,
        modules={
            **_MAMBA2,
            "post_attention_norm": "layers.*.mlp_norm",
            "ssm_in": "layers.*.recurrent.qkv_gate",
            "ssm_ba": "layers.*.recurrent.beta_decay",
        },
        tensors=_DECAYS,
    ),
    _LFM2,
    replace(
        _LFM2,
        name="lfm2moe",
        family="lfm2_moe",
        fields=(
            *_LFM2.fields,
            Field(EXPERTS, "num_experts"),
            ACTIVE,
            Field(EXPERT_WIDTH, "moe_intermediate_size"),
            Field("leading_dense_block_count", "num_dense_layers", 0, low=0),
        ),
        constants={"norm_topk_prob": True},
        fixed=GATING,
        tensors=CHOICE,
    ),
)
