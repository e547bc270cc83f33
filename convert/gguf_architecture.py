"""What a kind of GGUF file is to llama.cpp: the fields and tensors that it has, as data."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

RMS_EPS = ("attention.layer_norm_rms_epsilon", "rms_norm_eps")
LAYER_EPS = "attention.layer_norm_epsilon"
WINDOW = "attention.sliding_window"
ROTATED = "rope.scaling.finetuned"
KV_HEADS = "attention.head_count_kv"
EXPERTS = "expert_count"


@dataclass(frozen=True)
class Field:
    """The field `key` of a file is `hf` in a config.json; `default` is meant where it is missing.

    None as a default: nothing is said then, and the family's own default holds. low: the least that
    a whole number may be. A text as a default: what that name has in the config.json. over: the
    config.json has how often the file's value contains what `over` has there. words: a value of
    the file -> the config.json's.
    """

    key: str
    hf: str
    default: float | str | None = None
    required: bool = False
    low: int = 1
    over: str | None = None
    words: Mapping[Any, Any] | None = None


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
    by_layer: layers differ, and gguf_layers has what says how. fixed: fields of a file that always
    have these values. yarn: what a config.json says besides of YaRN. mixers: what a config.json
    calls layers that have no attention, and those that do, of which there are some of each.
    folded: multipliers are put into the weights. latent: attention is latent, see gguf_latent.
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
    fixed: Mapping[str, Any] = field(default_factory=dict)
    yarn: Mapping[str, Any] = field(default_factory=dict)
    mixers: tuple[str, str] | None = None
    folded: bool = False
    latent: bool = False
