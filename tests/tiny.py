"""Tiny random models in transformers' own classes, saved as HF folders: the oracle of parity
tests.
"""

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import transformers

SIZES: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
EXPERTS = {"num_experts": 6, "moe_intermediate_size": 64}
DELTA_NET = {
    "pad_token_id": None,
    "head_dim": 16,
    # With a usual one a token whose state says nearly nothing has its rounding blown up.
    "rms_norm_eps": 1e-2,
    "layer_types": ["full_attention", "linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 32,
}
# Family: the name of its classes in transformers, and what its tiny model needs beside SIZES.
_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 12}),
    "gemma": ("Gemma", {"head_dim": 12, "pad_token_id": None}),
    "gemma2": ("Gemma2", {"head_dim": 12, "pad_token_id": None, "sliding_window": 8}),
    "gemma3_text": ("Gemma3", {"head_dim": 12, "pad_token_id": None, "sliding_window": 8}),
    "gemma4_text": (
        "Gemma4",
        {
            "head_dim": 12,
            "global_head_dim": 16,
            "num_hidden_layers": 5,
            "layer_types": [*MIXED[:2], *MIXED[:2], "full_attention"],
            "num_kv_shared_layers": 2,
            "sliding_window": 8,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 99,
            "pad_token_id": None,
        },
    ),
    "granite": ("Granite", {"attention_multiplier": 0.2}),
    "smollm3": ("SmolLM3", {"pad_token_id": None, "no_rope_layer_interval": 2}),
    "olmo2": ("Olmo2", {"pad_token_id": None}),
    "phi3": ("Phi3", {"pad_token_id": None, "original_max_position_embeddings": 64}),
    "cohere": ("Cohere", {"pad_token_id": None}),
    "cohere2": ("Cohere2", {"pad_token_id": None, "sliding_window": 8, "layer_types": MIXED}),
    "olmo3": ("Olmo3", {"pad_token_id": None, "sliding_window": 8, "layer_types": MIXED}),
    "exaone4": ("Exaone4", {"sliding_window": 8, "layer_types": MIXED}),
    "ministral": ("Ministral", {"head_dim": 12, "sliding_window": 8, "layer_types": MIXED}),
    "ernie4_5": ("Ernie4_5", {"pad_token_id": None, "head_dim": 12}),
    "helium": ("Helium", {"pad_token_id": None, "head_dim": 12}),
    "glm": ("Glm", {"pad_token_id": None, "head_dim": 16}),
    "glm4": ("Glm4", {"pad_token_id": None, "head_dim": 16}),
    "arcee": ("Arcee", {}),
    "nemotron": ("Nemotron", {"head_dim": 16}),
    "starcoder2": ("Starcoder2", {"bos_token_id": 1, "eos_token_id": 2}),
    "mixtral": ("Mixtral", {"num_local_experts": 5}),
    "qwen3_moe": (
        "Qwen3Moe",
        {**EXPERTS, "num_experts_per_tok": 2, "head_dim": 12},
    ),
    "qwen2_moe": (
        "Qwen2Moe",
        {**EXPERTS, "shared_expert_intermediate_size": 128},
    ),
    "olmoe": (
        "Olmoe",
        {"num_experts": 6, "num_experts_per_tok": 2, "pad_token_id": None, "eos_token_id": 2},
    ),
    "granitemoe": ("GraniteMoe", {"num_local_experts": 5, "attention_multiplier": 0.2}),
    "glm4_moe": (
        "Glm4Moe",
        {
            "n_routed_experts": 8,
            "moe_intermediate_size": 64,
            "num_experts_per_tok": 3,
            "n_group": 4,
            "topk_group": 2,
            "hidden_size": 64,
        },
    ),
    "deepseek_v3": (
        "DeepseekV3",
        {
            "n_routed_experts": 8,
            "moe_intermediate_size": 64,
            "num_experts_per_tok": 3,
            "n_group": 4,
            "topk_group": 2,
            "first_k_dense_replace": 1,
            "hidden_size": 64,
            **LATENT,
        },
    ),
    "deepseek_v2": (
        "DeepseekV2",
        {
            **LATENT,
            "n_routed_experts": 8,
            "moe_intermediate_size": 64,
            "num_experts_per_tok": 3,
            "first_k_dense_replace": 1,
            "hidden_size": 64,
        },
    ),
    "glm4_moe_lite": (
        "Glm4MoeLite",
        {
            **LATENT,
            "n_routed_experts": 8,
            "moe_intermediate_size": 64,
            "num_experts_per_tok": 3,
            "n_group": 4,
            "topk_group": 2,
            "hidden_size": 64,
        },
    ),
    "dots1": (
        "Dots1",
        {
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "moe_intermediate_size": 64,
            "num_experts_per_tok": 3,
            "hidden_size": 64,
            "head_dim": 16,
            "sliding_window": 8,
            "layer_types": MIXED,
        },
    ),
    "granitemoeshared": (
        "GraniteMoeShared",
        {"num_local_experts": 5, "attention_multiplier": 0.2, "shared_intermediate_size": 64},
    ),
    "bamba": (
        "Bamba",
        {
            "pad_token_id": None,
            "attn_layer_indices": [1],
            "mamba_n_heads": 4,
            "mamba_n_groups": 2,
            "mamba_d_state": 8,
            "mamba_chunk_size": 8,
        },
    ),
    "lfm2_moe": (
        "Lfm2Moe",
        {
            "pad_token_id": None,
            "num_experts": 6,
            "moe_intermediate_size": 64,
            "num_experts_per_tok": 2,
            "num_dense_layers": 1,
            "layer_types": ["conv", "full_attention", "conv"],
        },
    ),
    "llama4_text": (
        "Llama4",
        {
            "pad_token_id": None,
            "head_dim": 12,
            "num_local_experts": 5,
            "intermediate_size_mlp": 64,
            "no_rope_layer_interval": 2,
            "attention_chunk_size": 8,
            "floor_scale": 4,
            "attn_scale": 0.3,
        },
    ),
    "stablelm": ("StableLm", {"hidden_size": 64}),
    "seed_oss": ("SeedOss", {"pad_token_id": None, "head_dim": 12}),
    "olmo": ("Olmo", {"pad_token_id": None, "eos_token_id": 2}),
    "hunyuan_v1_dense": ("HunYuanDenseV1", {"pad_token_id": None, "head_dim": 12}),
    "phi": ("Phi", {"hidden_size": 64}),
    "phimoe": ("Phimoe", {"num_local_experts": 6}),
    "ministral3": ("Ministral3", {"pad_token_id": None, "head_dim": 12}),
    "falcon": ("Falcon", {"hidden_size": 64}),
    "apertus": ("Apertus", {"pad_token_id": None}),
    "gpt2": ("GPT2", {"bos_token_id": 1, "eos_token_id": 2}),
    "falcon_h1": (
        "FalconH1",
        {
            "pad_token_id": None,
            "mamba_d_ssm": 64,
            "mamba_n_heads": 4,
            "mamba_n_groups": 2,
            "mamba_d_state": 8,
            "mamba_chunk_size": 8,
        },
    ),
    "granitemoehybrid": (
        "GraniteMoeHybrid",
        {
            "attention_multiplier": 0.2,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "num_local_experts": 5,
            "shared_intermediate_size": 64,
            "mamba_n_heads": 4,
            "mamba_n_groups": 2,
            "mamba_d_state": 8,
            "mamba_chunk_size": 8,
        },
    ),
    "lfm2": (
        "Lfm2",
        {
            "pad_token_id": None,
            "intermediate_size": 96,
            "block_multiple_of": 64,
            "layer_types": ["conv", "full_attention", "conv"],
        },
    ),
    "qwen3_next": (
        "Qwen3Next",
        {
            **DELTA_NET,
            **EXPERTS,
            "num_experts_per_tok": 2,
            "shared_expert_intermediate_size": 128,
        },
    ),
    "qwen3_5_text": ("Qwen3_5", DELTA_NET),
    "qwen3_5_moe_text": (
        "Qwen3_5Moe",
        {
            **DELTA_NET,
            **EXPERTS,
            "num_experts_per_tok": 2,
            "shared_expert_intermediate_size": 128,
        },
    ),
    "gpt_oss": (
        "GptOss",
        {
            "num_local_experts": 5,
            "num_experts_per_tok": 3,
            "head_dim": 12,
            "sliding_window": 8,
            # Nearly half of what the experts make is cut.
            "swiglu_limit": 1.1,
        },
    ),
    "gpt_neox": ("GPTNeoX", {"hidden_size": 64, "num_key_value_heads": 4}),
}
# Families whose other norms store the difference from 1, where 1 more would quadruple the scores.
_FROM_ONE = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")
# Families whose scores are not scaled by the root of their width.
_UNSCALED = ("gemma4_text",)
# Biases of routers.
_CHOICES = ("correction_bias", "expert_bias")
# Other numbers around 1.
_FACTORS = ("mamba.D", "layer_scalar", "router.scale", "per_expert_scale")
# Families that call a size otherwise, or (None) compute it.
_SIZES: dict[str, dict[str, str | None]] = {
    "deepseek_v3": {"head_dim": None},
    "deepseek_v2": {"head_dim": None},
    "glm4_moe_lite": {"head_dim": None},
    "gpt2": {
        "hidden_size": "n_embd",
        "intermediate_size": "n_inner",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
        "num_key_value_heads": None,
        "head_dim": None,
    },
    "falcon": {
        "intermediate_size": "ffn_hidden_size",
        "num_key_value_heads": "num_kv_heads",
        "head_dim": None,
    },
}


def config(family: str, **fields: Any) -> Any:
    """transformers' config of a family, tiny unless `fields` say otherwise."""
    kind, extra = _KINDS[family]
    suffix = "TextConfig" if family.endswith("_text") else "Config"
    names = _SIZES.get(family, {})
    # Copied: transformers writes into the dicts of a config.
    every = {names.get(n, n): value for n, value in {**SIZES, **extra, **deepcopy(fields)}.items()}
    every.pop(None, None)
    return getattr(transformers, kind + suffix)(**every)


def spread(model: Any, seed: int = 0) -> None:
    """Draw every parameter so that a mistake shows: norms off 1, biases off 0, large logits."""
    generator = torch.Generator().manual_seed(seed)
    family = model.config.get_text_config().model_type
    with torch.no_grad():
        biases = (b for b in model.named_buffers() if b[0].endswith(_CHOICES))
        for name, p in (*model.named_parameters(), *biases, *trained_buffers(model)):
            drawn = torch.randn(p.shape, generator=generator)
            if p.ndim == 1:
                is_norm = "norm" in name or ".ln_" in name or name.endswith(_FACTORS)
                if family in _FROM_ONE:
                    is_norm = name.endswith("linear_attn.norm.weight")
                p.copy_(drawn * 0.3 + (1.0 if is_norm else 0.0))
                if family in _UNSCALED and name.endswith("q_norm.weight"):
                    p.mul_(p.shape[0] ** -0.5)
            else:
                # Behind a convolution products of three of its features follow, which blow up.
                size = 0.5 if "conv" in name else 1.5
                p.copy_(drawn * (size / p.shape[-1] ** 0.5))


def trained_buffers(model: Any) -> list[tuple[str, torch.Tensor]]:
    """Buffers that are weights all the same (Gemma 4's): their names and they."""
    return [b for b in model.named_buffers() if b[0].endswith("layer_scalar")]


def hf_model(family: str, *, seed: int = 0, **fields: Any) -> Any:
    """transformers' model in fp32 with spread weights, eager attention, in eval mode."""
    made = config(family, **fields)
    # transformers adds Falcon's ALiBi twice in eager attention: in the mask, and to the scores.
    made._attn_implementation = "sdpa" if getattr(made, "alibi", False) else "eager"
    end = "LMHeadModel" if family == "gpt2" else "ForCausalLM"
    cls = getattr(transformers, _KINDS[family][0] + end)
    model = cls(made).float().eval()
    spread(model, seed)
    model.tie_weights()
    return model


def save(model: Any, folder: Path, **kwargs: Any) -> Path:
    """Write the model as transformers does."""
    model.save_pretrained(folder, **kwargs)
    return folder
