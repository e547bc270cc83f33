"""What a GGUF file says about its model, in Hugging Face's words: config fields, tensor names."""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from ..errors import CheckpointError, ConfigError
from ..nn.rope import inverse_frequencies
from ..nn.spec import RopeSpec
from .gguf_file import GGUF, GGUFTensor, read_tensor
from .shards import Checkpoint

ARCHITECTURES = ("llama", "qwen2", "qwen3")
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_FREQS = "rope_freqs.weight"
_INTEGERS = {
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "context_length": "max_position_embeddings",
}
_KNOWN = {
    *_INTEGERS,
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "attention.value_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.factor",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "rope.scaling.type",
    "vocab_size",
}


def config_fields(gguf: GGUF) -> dict[str, Any]:
    """The fields of the config.json that the file stands for.

    Raises ConfigError for an architecture or a field that would change the math and is not known.
    """
    architecture = gguf.fields.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ConfigError(
            f"the GGUF architecture {architecture!r:.60} is not read; known are "
            f"{', '.join(ARCHITECTURES)}",
            file=gguf.file,
        )
    prefix = f"{architecture}."
    own = {n.removeprefix(prefix): v for n, v in gguf.fields.items() if n.startswith(prefix)}
    unknown = {n: v for n, v in own.items() if n not in _KNOWN and v not in (0, None)}
    if unknown:
        shown = ", ".join(f"{name:.60}={value!r:.40}" for name, value in unknown.items())
        raise ConfigError(f"no part of the model covers the fields {shown:.500}", file=gguf.file)
    fields: dict[str, Any] = {
        "architectures": [f"{architecture.capitalize()}ForCausalLM"],
        "model_type": architecture,
    }
    for name, hf in _INTEGERS.items():
        fields[hf] = _integer(own, name, gguf)
    heads = fields["num_attention_heads"]
    fields["num_key_value_heads"] = _integer(own, "attention.head_count_kv", gguf, heads)
    width = _integer(own, "attention.key_length", gguf, fields["hidden_size"] // heads)
    fields["head_dim"] = width
    for name in ("attention.value_length", "rope.dimension_count"):
        if _integer(own, name, gguf, width) != width:
            raise ConfigError(f"{name} differs from the head width {width}", file=gguf.file)
    fields["rms_norm_eps"] = _number(own, "attention.layer_norm_rms_epsilon", gguf)
    fields["rope_theta"] = _number(own, "rope.freq_base", gguf, 10000.0)
    scaling = _scaling(own, gguf) or _llama3(gguf, fields)
    if scaling:
        fields["rope_scaling"] = scaling
    embed = gguf.tensors.get("token_embd.weight")
    if embed is None:
        raise CheckpointError("the tensor is missing", tensor="token_embd.weight", file=gguf.file)
    fields["vocab_size"] = embed.shape[0]
    fields["tie_word_embeddings"] = "output.weight" not in gguf.tensors
    if architecture != "qwen2":
        fields["attention_bias"] = "blk.0.attn_output.bias" in gguf.tensors
    if architecture == "llama":
        fields["mlp_bias"] = "blk.0.ffn_down.bias" in gguf.tensors
    for name, hf in (("bos", "bos"), ("eos", "eos"), ("padding", "pad")):
        value = gguf.fields.get(f"tokenizer.ggml.{name}_token_id")
        if value is not None:
            fields[f"{hf}_token_id"] = value
    return fields


def checkpoint(gguf: GGUF) -> Checkpoint:
    """The file's tensors under the names of a Hugging Face checkpoint.

    Raises CheckpointError for names that no such model has.
    """
    architecture = gguf.fields["general.architecture"]
    tensors: dict[str, GGUFTensor] = {}
    for name, info in gguf.tensors.items():
        if name == ROPE_FREQS:
            continue
        heads = 0
        if architecture == "llama" and ".attn_q." in name:
            heads = gguf.fields["llama.attention.head_count"]
        elif architecture == "llama" and ".attn_k." in name:
            key = "llama.attention.head_count"
            heads = gguf.fields.get(f"{key}_kv", gguf.fields[key])
        if heads and info.shape[0] % (2 * heads):
            raise CheckpointError(
                f"{info.shape[0]} rows are not those of {heads} heads", tensor=name, file=info.file
            )
        tensors[_hf_name(name, gguf)] = replace(info, heads=heads)
    made = {hf: replace(info, name=hf) for hf, info in tensors.items()}
    return Checkpoint(gguf.file.parent, (gguf.file,), MappingProxyType(made), MappingProxyType({}))


def ggml_name(name: str) -> str | None:
    """The name there of a tensor that Hugging Face calls `name`; None for one that has none."""
    module, _, leaf = name.rpartition(".")
    found = {hf: ours for ours, hf in _TOP.items()}.get(module)
    if found is None and module.startswith("model.layers."):
        number, _, part = module.removeprefix("model.layers.").partition(".")
        inner = {hf: ours for ours, hf in _LAYER.items()}.get(part)
        found = f"blk.{number}.{inner}" if inner else None
    return f"{found}.{leaf}" if found else None


def _hf_name(name: str, gguf: GGUF) -> str:
    module, _, leaf = name.rpartition(".")
    if leaf in ("weight", "bias"):
        if module in _TOP:
            return f"{_TOP[module]}.{leaf}"
        begin, _, rest = module.partition(".")
        number, _, part = rest.partition(".")
        if begin == "blk" and number.isdecimal() and number == str(int(number)) and part in _LAYER:
            return f"model.layers.{number}.{_LAYER[part]}.{leaf}"
    raise CheckpointError("no part of the model has this tensor", tensor=name[:200], file=gguf.file)


def _integer(own: Mapping[str, Any], name: str, gguf: GGUF, default: int | None = None) -> int:
    value = own.get(name, default)
    if type(value) is not int or not 0 < value < 2**31:
        raise ConfigError(f"{name} is {value!r:.60}, expected a positive integer", file=gguf.file)
    return value


def _number(own: Mapping[str, Any], name: str, gguf: GGUF, default: float | None = None) -> float:
    value = own.get(name, default)
    if not isinstance(value, float) or not 0 < value < 1e30:
        raise ConfigError(f"{name} is {value!r:.60}, expected a positive number", file=gguf.file)
    # Stored in fp32; the shortest decimal that is the same fp32 is what was meant.
    return float(str(np.float32(value)))


def _scaling(own: Mapping[str, Any], gguf: GGUF) -> dict[str, Any] | None:
    kind = own.get("rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise ConfigError(f"rope.scaling.type {kind!r:.60} is not known", file=gguf.file)
    made = {"rope_type": kind, "factor": _number(own, "rope.scaling.factor", gguf)}
    if kind == "yarn":
        name = "rope.scaling.original_context_length"
        made["original_max_position_embeddings"] = _integer(own, name, gguf)
    return made


def _llama3(gguf: GGUF, fields: Mapping[str, Any]) -> dict[str, Any] | None:
    """Llama 3.1's scaling, which a file holds as a divisor per frequency."""
    info = gguf.tensors.get(ROPE_FREQS)
    if info is None:
        return None
    found = read_tensor(info).float().flatten()
    scaling: dict[str, Any] = {
        "factor": float(found.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }
    width = fields["head_dim"]
    plain = RopeSpec(dim=width, theta=fields["rope_theta"])
    scaled = replace(plain, kind="llama3", original_positions=8192, **scaling)
    positions = torch.zeros(1, 1, dtype=torch.long)
    want = inverse_frequencies(plain, positions) / inverse_frequencies(scaled, positions)
    if found.shape != want.shape or not torch.allclose(found, want, rtol=1e-4, atol=0.0):
        raise ConfigError("the rope's divisors are not those of Llama 3.1", file=gguf.file)
    return {"rope_type": "llama3", "original_max_position_embeddings": 8192, **scaling}
