"""Multipliers that llama.cpp does not have (Falcon-H1's), put into the weights."""

import math
import re
from dataclasses import replace

import torch

from ..errors import ConfigError
from ..nn.spec import LayerSpec, Mamba2Spec, MLPSpec, ModelSpec

_LAYER = re.compile(r"blk\.(\d+)\.([a-z_0-9]+)\.weight")


def folded(spec: ModelSpec) -> ModelSpec:
    """The model of the weights with their multipliers in them; ConfigError where one matrix would
    be multiplied in two ways.
    """
    if spec.tied and (spec.embed_scale != 1 or spec.logit_scale != 1):
        raise ConfigError(
            f"embeddings are multiplied with {spec.embed_scale:g} and logits with "
            f"{spec.logit_scale:g}, and both have one matrix, of which a GGUF file cannot say it"
        )
    layers = tuple(map(_folded, spec.layers))
    return replace(spec, layers=layers, embed_scale=1.0, logit_scale=1.0)


def _folded(layer: LayerSpec) -> LayerSpec:
    attention, mixer, mlp = layer.attention, layer.recurrent, layer.mlp
    if attention is not None:
        scale = attention.head_dim**-0.5
        attention = replace(attention, scale=scale, in_scale=1.0, out_scale=1.0)
    if isinstance(mixer, Mamba2Spec):
        first = mixer.norm_first and mixer.norm is not None
        mixer = replace(mixer, scales=(1.0,) * 5, norm_first=first, in_scale=1.0, out_scale=1.0)
    if isinstance(mlp, MLPSpec):
        mlp = replace(mlp, gate_scale=1.0, down_scale=1.0)
    return replace(layer, attention=attention, recurrent=mixer, mlp=mlp)


def factor(name: str, spec: ModelSpec) -> float | torch.Tensor:
    """What ggml's tensor `name` of the model `spec` is multiplied with: a number, or one for each
    row [rows, 1].
    """
    if name == "token_embd.weight":
        return spec.embed_scale
    if name == "output.weight":
        return spec.logit_scale
    found = _LAYER.fullmatch(name)
    if found is None:
        return 1.0
    layer, kind = spec.layers[int(found[1])], found[2]
    attention, mixer, mlp = layer.attention, layer.recurrent, layer.mlp
    if attention is not None and kind in ("attn_q", "attn_k", "attn_v"):
        keys = attention.scale * math.sqrt(attention.head_dim)
        return attention.in_scale * (keys if kind == "attn_k" else 1.0)
    if attention is not None and kind == "attn_output":
        return attention.out_scale
    if isinstance(mixer, Mamba2Spec) and kind == "ssm_in":
        state = mixer.groups * mixer.state
        sizes = (mixer.dim, mixer.dim, state, state, mixer.heads)
        scales = torch.tensor(mixer.scales).repeat_interleave(torch.tensor(sizes))
        return mixer.in_scale * scales[:, None]
    if isinstance(mixer, Mamba2Spec) and kind == "ssm_out":
        return mixer.out_scale
    if isinstance(mlp, MLPSpec) and kind in ("ffn_gate", "ffn_down"):
        return mlp.gate_scale if kind == "ffn_gate" else mlp.down_scale
    return 1.0
