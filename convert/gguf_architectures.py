"""The architectures of GGUF files that are read and written: their fields, as data.

A field of a file is `ARCHITECTURE.key`. What llama.cpp takes for given, without a field, is in
`constants`. Names of tensors are in `gguf_names`.
"""

from collections.abc import Mapping
from typing import Any

from .gguf_architecture import EXPERTS, LAYER_EPS, WINDOW, Architecture, Field
from .gguf_hybrids import HYBRIDS
from .gguf_mixtures import ACTIVE, EXPERT_WIDTH, GRANITE, MIXTURES, SHARED_WIDTH

_OUT_BIAS = {"attention_bias": "blk.0.attn_output.bias"}
_LLAMA_BIAS = {**_OUT_BIAS, "mlp_bias": "blk.0.ffn_down.bias"}
_SLIDING = Field(WINDOW, "sliding_window")
_LOCAL_EXPERTS = (Field(EXPERTS, "num_local_experts"), ACTIVE)
_NUM_EXPERTS = (Field(EXPERTS, "num_experts"), ACTIVE)
_EXPERT_WIDTH = Field(EXPERT_WIDTH, "moe_intermediate_size")
_GATE_UP = {"ffn_up": "model.layers.*.mlp.gate_up_proj"}
_LAYER_NORM = (LAYER_EPS, "layer_norm_eps")

ARCHITECTURES = (
    Architecture("llama", "llama", flags=_LLAMA_BIAS, permuted=True),
    Architecture("llama", "mixtral", marker=EXPERTS, fields=_LOCAL_EXPERTS, permuted=True),
    Architecture("qwen2", "qwen2"),
    Architecture("qwen3", "qwen3", flags=_OUT_BIAS),
    Architecture(
        "qwen2moe",
        "qwen2_moe",
        fields=(
            *_NUM_EXPERTS,
            _EXPERT_WIDTH,
            Field(SHARED_WIDTH, "shared_expert_intermediate_size"),
        ),
        constants={"norm_topk_prob": False},
    ),
    Architecture(
        "qwen3moe",
        "qwen3_moe",
        fields=(*_NUM_EXPERTS, _EXPERT_WIDTH),
        constants={"norm_topk_prob": True},
    ),
    Architecture("olmoe", "olmoe", fields=_NUM_EXPERTS, constants={"norm_topk_prob": False}),
    Architecture("gemma", "gemma", offset=1.0, tied=True),
    Architecture(
        "gemma2",
        "gemma2",
        fields=(
            _SLIDING,
            Field("attn_logit_softcapping", "attn_logit_softcapping"),
            Field("final_logit_softcapping", "final_logit_softcapping"),
        ),
        offset=1.0,
        windows=True,
        tied=True,
        query_scale=46,
    ),
    Architecture(
        "gemma3",
        "gemma3_text",
        fields=(
            _SLIDING,
            Field("rope.freq_base_swa", "rope_local_base_freq", 10000.0),
            Field("final_logit_softcapping", "final_logit_softcapping"),
        ),
        offset=1.0,
        windows=True,
        query_scale=62,
    ),
    Architecture(
        "gemma4",
        "gemma4_text",
        fields=(
            _SLIDING,
            Field("final_logit_softcapping", "final_logit_softcapping"),
            Field(EXPERTS, "num_experts"),
            Field("expert_used_count", "top_k_experts"),
            _EXPERT_WIDTH,
        ),
        flags={"enable_moe_block": "blk.0.ffn_gate_inp.weight"},
        windows=True,
        modules={
            "inp_gate": "layers.*.inputs.gate",
            "proj": "layers.*.inputs.out",
            "post_norm": "layers.*.inputs.norm",
            "ffn_norm": "layers.*.mlp.shared_norm",
            "post_ffw_norm_1": "layers.*.mlp.shared_post_norm",
            "pre_ffw_norm_2": "layers.*.mlp.norm",
            "post_ffw_norm_2": "layers.*.mlp.post_norm",
            **{f"ffn_{part}": f"layers.*.mlp.shared.{part}" for part in ("gate", "up", "down")},
        },
        tensors={
            "layer_output_scale.weight": "layers.*.scale",
            "ffn_gate_inp.scale": "layers.*.mlp.router.scale",
            "ffn_down_exps.scale": "layers.*.mlp.router.expert_scale",
            "ffn_gate_up_exps.weight": "model.layers.*.experts.gate_up_proj",
        },
        by_layer=True,
    ),
    Architecture(
        "granite", "granite", fields=GRANITE, flags=_LLAMA_BIAS, permuted=True, divided=True
    ),
    Architecture(
        "granitemoe",
        "granitemoe",
        fields=(*GRANITE, *_LOCAL_EXPERTS),
        permuted=True,
        divided=True,
    ),
    Architecture(
        "granitemoe",
        "granitemoeshared",
        marker=SHARED_WIDTH,
        fields=(*GRANITE, *_LOCAL_EXPERTS, Field(SHARED_WIDTH, "shared_intermediate_size")),
        permuted=True,
        divided=True,
    ),
    Architecture("exaone4", "exaone4", full=True),
    Architecture("olmo2", "olmo2"),
    Architecture("olmo2", "olmo3", marker=WINDOW, fields=(_SLIDING,), windows=True),
    Architecture(
        "phi3",
        "phi3",
        fields=(_SLIDING,),
        partial=True,
        original=True,
        modules={"attn_qkv": "model.layers.*.self_attn.qkv_proj", **_GATE_UP},
    ),
    Architecture("starcoder2", "starcoder2", fields=(_SLIDING,), eps=(LAYER_EPS, "norm_epsilon")),
    Architecture(
        "command-r",
        "cohere",
        fields=(Field("logit_scale", "logit_scale", 1.0),),
        flags={"use_qk_norm": "blk.0.attn_q_norm.weight"},
        eps=_LAYER_NORM,
        tied=True,
    ),
    Architecture(
        "cohere2",
        "cohere2",
        fields=(_SLIDING, Field("logit_scale", "logit_scale", 1.0)),
        eps=_LAYER_NORM,
        windows=True,
        tied=True,
    ),
    Architecture(
        "stablelm",
        "stablelm",
        flags={"use_qkv_bias": "blk.0.attn_q.bias"},
        eps=_LAYER_NORM,
        partial=True,
    ),
    Architecture("smollm3", "smollm3", permuted=True),
    Architecture("arcee", "arcee", permuted=True),
    Architecture(
        "seed_oss",
        "seed_oss",
        flags={"attention_bias": "blk.0.attn_q.bias"},
        modules={"post_attention_norm": "layers.*.mlp_norm"},
    ),
    Architecture("ernie4_5", "ernie4_5"),
    Architecture(
        "glm4",
        "glm4",
        flags={"attention_bias": "blk.0.attn_q.bias"},
        partial=True,
        modules=_GATE_UP,
    ),
    Architecture("nemotron", "nemotron", eps=(LAYER_EPS, "norm_eps"), offset=1.0, partial=True),
    Architecture("hunyuan-dense", "hunyuan_v1_dense"),
    *MIXTURES,
    *HYBRIDS,
)
NAMES = tuple(dict.fromkeys(architecture.name for architecture in ARCHITECTURES))
# Whose files are also those of another family.
_SAME = {"mistral": "llama"}


def of_file(name: object, fields: Mapping[str, Any]) -> Architecture | None:
    """The architecture of a file that calls itself `name` and has `fields` of its own."""
    found = [made for made in ARCHITECTURES if made.name == name]
    marked = [made for made in found if made.marker is not None and fields.get(made.marker)]
    return next(iter(marked or found), None)


def of_family(family: str) -> Architecture | None:
    """The architecture that models of `family`, a model_type, are written as."""
    family = _SAME.get(family, family)
    return next((made for made in ARCHITECTURES if made.family == family), None)


def families() -> list[str]:
    """Every model_type that is written."""
    return [*(made.family for made in ARCHITECTURES), *_SAME]
