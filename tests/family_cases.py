"""The models of the parity tests: every family, and each switch of its config thrown once."""

from typing import Any

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
LAYERS = ["full_attention", "sliding_attention", "sliding_attention"]
GEMMA3 = {
    "full_attention": {"rope_type": "linear", "rope_theta": 5e3, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 77.0},
}
# Of a head of 12 features: all turned, or half of them.
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.3, 1.7, 2.0, 2.5],
    "long_factor": [1.5, 2.0, 3.0, 5.0, 8.0, 12.0],
}
PARTIAL = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "partial_rotary_factor": 0.5,
    "short_factor": [1.0, 1.1, 1.3],
    "long_factor": [1.5, 2.0, 3.0],
}
OLMO3 = {"full_attention": YARN, "sliding_attention": {"rope_type": "default", "rope_theta": 77.0}}
QUARTER = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}

HALF = {"rope_type": "default", "rope_theta": 77.0, "partial_rotary_factor": 0.5}
NTK_ALPHA = {"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 50.0, "factor": 1.0}

TEMPERED = {**YARN, "mscale_all_dim": 1.0, "mscale": 1.0, "llama_4_scaling_beta": 0.3}

MHA = {"multi_query": False, "num_key_value_heads": 4}

# (family, the switches of its config that this case throws)
CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"num_key_value_heads": 4, "rms_norm_eps": 1e-3}),
    ("llama", {"head_dim": 16, "num_key_value_heads": 1}),
    ("llama", {"hidden_act": "gelu", "rope_parameters": {"rope_theta": 777.0}}),
    ("llama", {"hidden_act": "gelu_pytorch_tanh"}),
    ("llama", {"rope_parameters": LLAMA3}),
    ("llama", {"rope_parameters": YARN}),
    ("llama", {"rope_parameters": {**YARN, "beta_fast": 16.0, "attention_factor": 1.3}}),
    ("llama", {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.4}}),
    ("llama", {"rope_parameters": {**YARN, "truncate": False}}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}}),
    (
        "llama",
        {
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
            "max_position_embeddings": 20,
        },
    ),
    ("mistral", {}),
    ("mistral", {"sliding_window": 7}),
    ("mistral", {"sliding_window": None, "head_dim": 16}),
    ("qwen2", {}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 9, "layer_types": LAYERS}),
    ("qwen2", {"rope_parameters": YARN, "tie_word_embeddings": True}),
    ("qwen3", {}),
    ("qwen3", {"attention_bias": True, "head_dim": 16, "tie_word_embeddings": True}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}),
    ("gemma", {}),
    ("gemma", {"attention_bias": True, "num_key_value_heads": 1}),
    ("gemma", {"tie_word_embeddings": False, "hidden_act": "gelu"}),
    ("gemma2", {}),
    ("gemma2", {"attn_logit_softcapping": None, "query_pre_attn_scalar": 10}),
    ("gemma2", {"final_logit_softcapping": 3.0, "layer_types": LAYERS, "attention_bias": True}),
    ("gemma2", {"final_logit_softcapping": None, "hidden_activation": "silu"}),
    ("gemma3_text", {}),
    ("gemma3_text", {"layer_types": LAYERS, "rope_parameters": GEMMA3, "attention_bias": True}),
    ("gemma3_text", {"sliding_window_pattern": 2, "final_logit_softcapping": 4.0}),
    ("granite", {}),
    (
        "granite",
        {
            "embedding_multiplier": 3.5,
            "logits_scaling": 7.0,
            "residual_multiplier": 0.3,
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    ("smollm3", {}),
    ("smollm3", {"no_rope_layers": [0, 1, 1], "attention_bias": True, "mlp_bias": True}),
    ("smollm3", {"use_sliding_window": True, "sliding_window": 6}),
    ("smollm3", {"use_sliding_window": True, "sliding_window": 6, "layer_types": LAYERS}),
    ("olmo2", {}),
    ("olmo2", {"attention_bias": True, "tie_word_embeddings": True, "num_key_value_heads": 4}),
    ("phi3", {}),
    ("phi3", {"sliding_window": 7, "num_key_value_heads": 4, "tie_word_embeddings": True}),
    ("phi3", {"rope_parameters": LONGROPE}),
    ("phi3", {"rope_parameters": PARTIAL, "original_max_position_embeddings": 16}),
    ("cohere", {}),
    ("cohere", {"use_qk_norm": True, "attention_bias": True, "logit_scale": 0.3}),
    ("cohere", {"tie_word_embeddings": False, "layer_norm_eps": 1e-3}),
    ("cohere2", {}),
    ("cohere2", {"layer_types": None, "logit_scale": 0.9, "attention_bias": True}),
    ("olmo3", {"attention_bias": True}),
    ("olmo3", {"layer_types": None, "rope_parameters": OLMO3}),
    ("exaone4", {}),
    ("exaone4", {"layer_types": None, "sliding_window_pattern": 2, "head_dim": 16}),
    ("exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 3}),
    ("ministral", {}),
    ("ministral", {"layer_types": None, "head_dim": 16}),
    ("ernie4_5", {}),
    ("ernie4_5", {"use_bias": True, "tie_word_embeddings": False}),
    ("helium", {}),
    ("helium", {"attention_bias": True, "mlp_bias": True}),
    ("glm", {}),
    ("glm", {"attention_bias": False, "rope_parameters": QUARTER}),
    ("glm4", {}),
    ("glm4", {"attention_bias": False, "tie_word_embeddings": True}),
    ("stablelm", {}),
    ("stablelm", {"use_parallel_residual": True, "use_qkv_bias": True}),
    ("arcee", {}),
    ("arcee", {"attention_bias": True, "mlp_bias": True, "hidden_act": "silu"}),
    ("nemotron", {}),
    ("nemotron", {"attention_bias": True, "mlp_bias": True}),
    ("starcoder2", {}),
    ("starcoder2", {"use_bias": False, "sliding_window": 7, "hidden_act": "gelu"}),
    ("seed_oss", {}),
    ("seed_oss", {"attention_bias": False, "attention_out_bias": True, "mlp_bias": True}),
    ("olmo", {}),
    ("olmo", {"clip_qkv": 0.7, "attention_bias": True, "tie_word_embeddings": True}),
    ("hunyuan_v1_dense", {}),
    ("hunyuan_v1_dense", {"attention_bias": True, "rope_parameters": NTK_ALPHA}),
    ("gpt_neox", {}),
    ("gpt_neox", {"use_parallel_residual": False, "hidden_act": "gelu_new"}),
    ("gpt_neox", {"attention_bias": False, "rope_parameters": HALF, "layer_norm_eps": 1e-3}),
    ("gpt_neox", {"tie_word_embeddings": True, "hidden_act": "gelu_fast"}),
    ("mixtral", {}),
    ("mixtral", {"num_experts_per_tok": 3, "sliding_window": 7, "hidden_act": "gelu"}),
    ("qwen3_moe", {}),
    ("qwen3_moe", {"norm_topk_prob": True, "decoder_sparse_step": 2, "num_experts_per_tok": 3}),
    ("qwen3_moe", {"mlp_only_layers": [1], "use_sliding_window": True, "sliding_window": 6}),
    ("qwen2_moe", {}),
    ("qwen2_moe", {"norm_topk_prob": True, "mlp_only_layers": [0], "num_experts_per_tok": 2}),
    ("qwen2_moe", {"decoder_sparse_step": 2, "qkv_bias": False}),
    ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}),
    ("phi", {}),
    ("phi", {"qk_layernorm": True, "hidden_act": "gelu", "num_key_value_heads": 4}),
    ("phi", {"rope_parameters": {**HALF, "partial_rotary_factor": 1.0}}),
    ("ministral3", {"rope_parameters": TEMPERED}),
    ("ministral3", {}),
    ("ministral3", {"sliding_window": 7, "rope_parameters": {**TEMPERED, "mscale": 0.7}}),
    ("falcon", {}),
    ("falcon", {**MHA, "parallel_attn": False, "bias": True}),
    ("falcon", {**MHA, "tie_word_embeddings": False}),
    ("falcon", {"new_decoder_architecture": True, "bias": True, "activation": "gelu_new"}),
    ("falcon", {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1}),
    ("apertus", {}),
    ("apertus", {"rope_parameters": LLAMA3, "attention_bias": True, "num_key_value_heads": 4}),
    ("apertus", {"hidden_act": "silu", "tie_word_embeddings": True}),
]
FAMILIES = tuple(dict.fromkeys(family for family, _ in CASES))
