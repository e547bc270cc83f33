"""Tiny models of every architecture that GGUF files are written for, and their files."""

import math
from pathlib import Path
from typing import Any

import bridged
import tiny
import torch
from family_cases import MOE4, MULTIPLIERS

import purelm
from purelm.convert.bridge import CausalLM
from purelm.convert.tokenizer import Tokenizer
from purelm.nn import lora

SIZES: dict[str, Any] = {
    "vocab_size": 1600,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
}
# Its ramp begins and ends at whole pairs of features, to which llama.cpp rounds.
EXACT_YARN = {
    "rope_type": "yarn",
    "rope_theta": (16 / (2 * math.pi)) ** (8 / 4.999998),
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "truncate": False,
}
SIGMOID = {
    "n_shared_experts": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 3,
}
LATENT_YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "mscale": 0.7,
    "mscale_all_dim": 0.7,
}
# A layer of each kind that the family has.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "mixtral": {},
    "qwen2_moe": {},
    "qwen3_moe": {"head_dim": 16, "norm_topk_prob": True},
    # llama.cpp has as many heads of k as of q there.
    "olmoe": {"num_key_value_heads": 4},
    "gemma": {"head_dim": 16, "tie_word_embeddings": True},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, "tie_word_embeddings": True},
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 16, "num_hidden_layers": 7},
    "gemma4_text": {
        "head_dim": 16,
        "global_head_dim": 32,
        "num_hidden_layers": 5,
        "hidden_size_per_layer_input": 32,
        "vocab_size_per_layer_input": 1600,
        "layer_types": ["sliding_attention", *tiny.MIXED, "full_attention"],
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
        "use_double_wide_mlp": True,
        "final_logit_softcapping": 5.0,
    },
    "granite": {"logits_scaling": 3.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.4},
    "granitemoe": {"logits_scaling": 3.0, "embedding_multiplier": 2.0},
    "exaone4": {"sliding_window": None, "layer_types": ["full_attention"] * 2},
    "olmo2": {},
    "olmo3": {"num_hidden_layers": 4, "layer_types": None},
    "phi3": {},
    "starcoder2": {},
    "cohere": {"tie_word_embeddings": True},
    "cohere2": {"num_hidden_layers": 4, "layer_types": None, "tie_word_embeddings": True},
    "stablelm": {},
    "smollm3": {"num_hidden_layers": 4, "no_rope_layer_interval": 4},
    "arcee": {},
    "seed_oss": {"head_dim": 16},
    "ernie4_5": {"head_dim": 16},
    "glm4": {"head_dim": 16},
    "nemotron": {"head_dim": 16},
    "hunyuan_v1_dense": {"head_dim": 16},
    "gpt_oss": {"head_dim": 16, "swiglu_limit": 7.0, "rope_parameters": EXACT_YARN},
    "glm4_moe": {"head_dim": 16, **SIGMOID, "use_qk_norm": True, "attention_bias": True},
    "deepseek_v2": {"num_hidden_layers": 3},
    "deepseek_v3": {"num_hidden_layers": 3, "rope_parameters": LATENT_YARN},
    # llama.cpp has as many heads of k as of q there.
    "dots1": {**SIGMOID, "num_key_value_heads": 4, "sliding_window": None, "layer_types": None},
    "granitemoeshared": {"logits_scaling": 3.0, "embedding_multiplier": 2.0},
    "falcon_h1": {"head_dim": 16, **MULTIPLIERS},
    "granitemoehybrid": {
        "num_hidden_layers": 3,
        "logits_scaling": 3.0,
        "embedding_multiplier": 2.0,
        "mamba_n_heads": 8,
    },
    # llama.cpp has values as wide as keys there.
    "qwen3_next": {
        "num_hidden_layers": 4,
        "layer_types": None,
        "linear_value_head_dim": 16,
        "rms_norm_eps": 1e-6,
        "norm_topk_prob": True,
    },
    "lfm2": {"num_hidden_layers": 3},
    "lfm2_moe": {"num_hidden_layers": 3},
}

# Other models of a family, whose files hold other tensors.
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("falcon_h1", {"head_dim": 16, "mamba_rms_norm": True, "mamba_norm_before_gate": False}),
    (
        "granitemoehybrid",
        {
            "num_hidden_layers": 3,
            "num_local_experts": 0,
            "position_embedding_type": "rope",
            "mamba_n_heads": 8,
        },
    ),
    (
        "gemma4_text",
        {
            **FAMILIES["gemma4_text"],
            **MOE4,
            "num_kv_shared_layers": 0,
            "use_double_wide_mlp": False,
        },
    ),
]
MODELS = [*FAMILIES.items(), *VARIANTS]


def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(Path(purelm.__file__).parent / "data" / "tiny")


def model_of(folder: Path, family: str, adapt: bool = True, **fields: Any) -> CausalLM:
    """A bridge with adapters that change it."""
    hf = tiny.hf_model(family, **{**SIZES, **fields})
    tiny.save(hf, folder / "source")
    model = bridged.bridge(folder / "source")
    if adapt:
        adapters = lora.init(model.spec, rank=4, generator=torch.Generator().manual_seed(0))
        model.set_adapters(adapters)
        bridged.spread_trained(model)
    return model
