"""The architectures of GGUF files that are read and written: their fields, as data.

A field of a file is `ARCHITECTURE.key`. What llama.cpp takes for given, without a field, is in
`constants`. Names of tensors are in `gguf_names`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..nn.rope import inverse_frequencies
from ..nn.spec import AttentionSpec, MLPSpec, ModelSpec, MoESpec, RopeSpec

RMS_EPS = ("attention.layer_norm_rms_epsilon", "rms_norm_eps")
LAYER_EPS = "attention.layer_norm_epsilon"
WINDOW = "attention.sliding_window"
EXPERTS = "expert_count"


@dataclass(frozen=True)
class Field:
    """The field `key` of a file is `hf` in a config.json; `default` is meant where it is missing.

    None as a default: nothing is said then, and the family's own default holds.
    """

    key: str
    hf: str
    default: float | None = None
    required: bool = False


@dataclass(frozen=True)
class Architecture:
    """The files of `family` (a model_type), which call themselves `name`.

    marker: a field that such files have, of several families of one `name`. fields, constants: see
    `Field` and above. flags: fields of a config.json that are true where the file has a tensor.
    eps: the norms' field and its name in a config.json. permuted: llama.cpp turns neighbouring
    features, so that the halves of each head of q and k are stored interleaved. offset: is added
    to the weights of norms. windows: llama.cpp has the family's windows; if not, the context ends
    with the window. tied: llama.cpp has no head apart from the embedding. partial: a part of each
    head may be rotated. original: config.json has `original_max_position_embeddings` beside the
    rotary fields. divided: `logit_scale` divides. query_scale: queries are scaled by
    the root of their head's width, but by that of the model's over the heads at this depth (the
    27B models). modules: of a layer, which are called
    otherwise, or hold several of ours -> ours, or the name in a checkpoint. tensors: the same of
    tensors of a layer. full: models without windows alone, which their config says by layer.
    by_layer: layers differ, and gguf_layers has what says how.
    """

    name: str
    family: str
    marker: str | None = None
    fields: tuple[Field, ...] = ()
    constants: Mapping[str, Any] = field(default_factory=dict)
    flags: Mapping[str, str] = field(default_factory=dict)
    eps: tuple[str, str] = RMS_EPS
    permuted: bool = False
    offset: float = 0.0
    windows: bool = False
    tied: bool = False
    partial: bool = False
    original: bool = False
    divided: bool = False
    query_scale: int | None = None
    modules: Mapping[str, str] = field(default_factory=dict)
    tensors: Mapping[str, str] = field(default_factory=dict)
    by_layer: bool = False
    full: bool = False


_OUT_BIAS = {"attention_bias": "blk.0.attn_output.bias"}
_LLAMA_BIAS = {**_OUT_BIAS, "mlp_bias": "blk.0.ffn_down.bias"}
_SLIDING = Field(WINDOW, "sliding_window")
_GRANITE = (
    Field("attention.scale", "attention_multiplier", required=True),
    Field("embedding_scale", "embedding_multiplier", 1.0),
    Field("residual_scale", "residual_multiplier", 1.0),
    Field("logit_scale", "logits_scaling", 1.0),
)
_ACTIVE = Field("expert_used_count", "num_experts_per_tok")
_LOCAL_EXPERTS = (Field(EXPERTS, "num_local_experts"), _ACTIVE)
_NUM_EXPERTS = (Field(EXPERTS, "num_experts"), _ACTIVE)
_EXPERT_WIDTH = Field("expert_feed_forward_length", "moe_intermediate_size")
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
            Field("expert_shared_feed_forward_length", "shared_expert_intermediate_size"),
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
        "granite", "granite", fields=_GRANITE, flags=_LLAMA_BIAS, permuted=True, divided=True
    ),
    Architecture(
        "granitemoe",
        "granitemoe",
        fields=(*_GRANITE, *_LOCAL_EXPERTS),
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


def _mixture(spec: ModelSpec) -> MoESpec | None:
    mlp = spec.layers[0].mlp
    return mlp if isinstance(mlp, MoESpec) else None


def _expert_width(spec: ModelSpec) -> int | None:
    mixture = _mixture(spec)
    return None if mixture is None else mixture.expert.dim


def _shared_width(spec: ModelSpec) -> int | None:
    mixture = _mixture(spec)
    return None if mixture is None or mixture.shared is None else mixture.shared.dim


def width(spec: ModelSpec) -> int:
    """Features inside a layer's MLP, which of a mixture are one expert's."""
    mlp = spec.layers[0].mlp
    return mlp.dim if isinstance(mlp, MLPSpec) else mlp.expert.dim


def _first(spec: ModelSpec) -> AttentionSpec:
    return next(spec.attentions())


def _sliding(spec: ModelSpec) -> AttentionSpec | None:
    return next((a for a in spec.attentions() if a.window is not None), None)


def _window(spec: ModelSpec) -> int | None:
    found = _sliding(spec)
    return None if found is None else found.window


def main_rope(spec: ModelSpec) -> RopeSpec | None:
    """The rotation of the layers without a window, or of all others where those have none."""
    full = [a.rope for a in spec.attentions() if a.window is None and a.rope is not None]
    return next(iter([*full, *spec.ropes()]), None)


def divisors(rope: RopeSpec) -> torch.Tensor:
    """What the scaled rotation `rope` divides each plain frequency by, fp32 [dim / 2]."""
    at = torch.zeros(1, 1, dtype=torch.long)
    return inverse_frequencies(replace(rope, kind="default"), at) / inverse_frequencies(rope, at)


def _window_theta(spec: ModelSpec) -> float | None:
    found = _sliding(spec)
    return None if found is None or found.rope is None else found.rope.theta


def _count(spec: ModelSpec) -> int | None:
    mixture = _mixture(spec)
    return None if mixture is None else mixture.experts


def _active(spec: ModelSpec) -> int | None:
    mixture = _mixture(spec)
    return None if mixture is None else mixture.active


# The value of a key that some architectures have; None where a model has no such thing.
VALUES: dict[str, Callable[[ModelSpec], int | float | None]] = {
    "attention.scale": lambda spec: _first(spec).scale,
    "embedding_scale": lambda spec: spec.embed_scale,
    "residual_scale": lambda spec: spec.layers[0].residual_scale,
    "logit_scale": lambda spec: spec.logit_scale,
    "attn_logit_softcapping": lambda spec: _first(spec).softcap,
    "final_logit_softcapping": lambda spec: spec.logit_softcap,
    WINDOW: _window,
    "rope.freq_base_swa": _window_theta,
    EXPERTS: _count,
    "expert_used_count": _active,
    "expert_feed_forward_length": _expert_width,
    "expert_shared_feed_forward_length": _shared_width,
}
INTEGERS = (WINDOW, *(key for key in VALUES if key.startswith("expert_")))
