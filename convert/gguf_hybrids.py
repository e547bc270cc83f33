"""The architectures of GGUF files of models of which some layers have no attention."""

from dataclasses import replace

from .gguf_architecture import EXPERTS, RMS_EPS, Architecture, Field
from .gguf_mixtures import ACTIVE, CHOICE, EXPERT_WIDTH, GATING

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
HYBRIDS = (
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
