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
MAGNIFIED = {
    **LONGROPE,
    "original_max_position_embeddings": 48,
    "short_mscale": 1.2,
    "long_mscale": 1.4,
}
OLMO3 = {"full_attention": YARN, "sliding_attention": {"rope_type": "default", "rope_theta": 77.0}}
QUARTER = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}

HALF = {"rope_type": "default", "rope_theta": 77.0, "partial_rotary_factor": 0.5}
NTK_ALPHA = {"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 50.0, "factor": 1.0}

TEMPERED = {**YARN, "mscale_all_dim": 1.0, "mscale": 1.0, "llama_4_scaling_beta": 0.3}

PROPORTIONAL = {
    "full_attention": {
        "rope_type": "proportional",
        "rope_theta": 5e3,
        "factor": 2.0,
        "partial_rotary_factor": 0.5,
    },
    "sliding_attention": {"rope_type": "default", "rope_theta": 77.0},
}
MOE4 = {
    "enable_moe_block": True,
    "num_experts": 6,
    "top_k_experts": 2,
    "moe_intermediate_size": 64,
    "attention_k_eq_v": True,
    "num_global_key_value_heads": 1,
    "hidden_size_per_layer_input": 0,
}
LINEAR = ["linear_attention", "full_attention", "linear_attention"]

MHA = {"multi_query": False, "num_key_value_heads": 4}

# With a small epsilon a token whose state says nearly nothing has its rounding blown up.
GATED = {"mamba_rms_norm": True, "rms_norm_eps": 1e-3}
MULTIPLIERS = {
    "embedding_multiplier": 3.5,
    "lm_head_multiplier": 0.3,
    "mlp_multipliers": [0.7, 1.3],
    "key_multiplier": 0.6,
    "attention_in_multiplier": 1.2,
    "attention_out_multiplier": 0.8,
    "ssm_in_multiplier": 1.1,
    "ssm_multipliers": [0.9, 1.2, 0.7, 1.4, 0.6],
    "ssm_out_multiplier": 0.5,
}

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
    ("gemma4_text", {}),
    ("gemma4_text", {"num_kv_shared_layers": 0, **MOE4}),
    ("gemma4_text", {"use_double_wide_mlp": True, "attention_k_eq_v": True}),
    ("gemma4_text", {"num_kv_shared_layers": 0, "attention_bias": True, "rope_parameters": OLMO3}),
    (
        "gemma4_text",
        {
            "final_logit_softcapping": 3.0,
            "layer_types": None,
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 0,
        },
    ),
    (
        "gemma4_text",
        {
            "per_layer_config": {2: {"head_dim": 24, "num_key_value_heads": 4}},
            "layer_types": [*LAYERS[1:], "full_attention"],
            "num_hidden_layers": 3,
            "num_kv_shared_layers": 0,
            "hidden_activation": "silu",
            "tie_word_embeddings": False,
            "use_bidirectional_attention": "vision",
        },
    ),
    (
        "gemma4_text",
        {
            "rope_parameters": PROPORTIONAL,
            "head_dim": 16,
            "rms_norm_eps": 1e-3,
            "num_key_value_heads": 1,
            "vocab_size_per_layer_input": 120,
            "hidden_size_per_layer_input": 16,
        },
    ),
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
    ("olmoe", {}),
    ("olmoe", {"norm_topk_prob": True, "attention_bias": True, "num_key_value_heads": 4}),
    ("granitemoe", {}),
    (
        "granitemoe",
        {"residual_multiplier": 0.3, "embedding_multiplier": 3.5, "logits_scaling": 7.0},
    ),
    ("granitemoe", {"num_experts_per_tok": 3, "attention_bias": True, "hidden_act": "gelu"}),
    ("glm4_moe", {}),
    ("glm4_moe", {"use_qk_norm": True, "attention_bias": True, "norm_topk_prob": False}),
    ("glm4_moe", {"n_group": 1, "topk_group": 1, "n_shared_experts": 2}),
    ("glm4_moe", {"first_k_dense_replace": 2, "routed_scaling_factor": 2.5}),
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
    ("phi", {"tie_word_embeddings": True}),
    ("deepseek_v3", {}),
    (
        "deepseek_v3",
        {"q_lora_rank": None, "attention_bias": True, "rope_interleave": False, "v_head_dim": 24},
    ),
    (
        "deepseek_v3",
        {
            "rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.4},
            "n_shared_experts": 2,
            "first_k_dense_replace": 2,
            "attention_bias": True,
        },
    ),
    (
        "deepseek_v3",
        {
            "norm_topk_prob": False,
            "routed_scaling_factor": 1.5,
            "n_group": 1,
            "topk_group": 1,
            "hidden_act": "gelu",
            "tie_word_embeddings": True,
        },
    ),
    ("deepseek_v2", {}),
    (
        "deepseek_v2",
        {
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 1.5,
            "q_lora_rank": None,
            "attention_bias": True,
            "rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.4},
        },
    ),
    (
        "deepseek_v2",
        {
            "n_shared_experts": 1,
            "first_k_dense_replace": 2,
            "hidden_act": "gelu",
            "rms_norm_eps": 1e-3,
            "tie_word_embeddings": True,
        },
    ),
    ("glm4_moe_lite", {}),
    (
        "glm4_moe_lite",
        {
            "mlp_layer_types": ["sparse", "dense", "sparse"],
            "q_lora_rank": None,
            "attention_bias": True,
            "rope_interleave": False,
            "n_shared_experts": 2,
            "norm_topk_prob": False,
        },
    ),
    (
        "glm4_moe_lite",
        {
            "n_group": 1,
            "topk_group": 1,
            "routed_scaling_factor": 1.5,
            "hidden_act": "gelu",
            "rms_norm_eps": 1e-3,
            "tie_word_embeddings": True,
            "rope_parameters": YARN,
        },
    ),
    ("dots1", {}),
    (
        "dots1",
        {
            "n_group": 4,
            "topk_group": 2,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "first_k_dense_replace": 1,
            "attention_bias": True,
            "n_shared_experts": 2,
        },
    ),
    (
        "dots1",
        {
            "layer_types": None,
            "max_window_layers": 1,
            "hidden_act": "gelu",
            "rms_norm_eps": 1e-3,
            "rope_parameters": YARN,
            "tie_word_embeddings": True,
        },
    ),
    ("granitemoeshared", {}),
    (
        "granitemoeshared",
        {
            "shared_intermediate_size": 0,
            "num_experts_per_tok": 3,
            "attention_bias": True,
            "hidden_act": "gelu",
            "tie_word_embeddings": True,
        },
    ),
    (
        "granitemoeshared",
        {
            "embedding_multiplier": 3.5,
            "logits_scaling": 2.5,
            "residual_multiplier": 0.4,
            "rms_norm_eps": 1e-3,
            "rope_parameters": YARN,
            "head_dim": 16,
        },
    ),
    ("bamba", {"rms_norm_eps": 1e-3}),
    (
        "bamba",
        {
            "attn_layer_indices": [0, 2],
            "attention_bias": True,
            "mlp_bias": True,
            "mamba_proj_bias": True,
            "mamba_conv_bias": False,
            "mamba_d_conv": 3,
            "time_step_limit": [0.1, 0.5],
            "hidden_act": "gelu",
            "rms_norm_eps": 1e-3,
        },
    ),
    (
        "bamba",
        {
            "head_dim": 16,
            "tie_word_embeddings": True,
            "rope_parameters": HALF,
            "rms_norm_eps": 1e-2,
        },
    ),
    ("lfm2_moe", {}),
    (
        "lfm2_moe",
        {
            "use_expert_bias": False,
            "norm_topk_prob": False,
            "num_dense_layers": 0,
            "conv_bias": True,
            "tie_word_embeddings": False,
        },
    ),
    (
        "lfm2_moe",
        {
            "routed_scaling_factor": 1.5,
            "conv_L_cache": 4,
            "norm_eps": 1e-3,
            "head_dim": 16,
            "rope_parameters": YARN,
        },
    ),
    ("llama4_text", {}),
    (
        "llama4_text",
        {
            "num_experts_per_tok": 3,
            "moe_layers": [1],
            "use_qk_norm": False,
            "attention_bias": True,
            "rope_parameters": LLAMA3,
            "attn_temperature_tuning": False,
        },
    ),
    (
        "llama4_text",
        {
            "interleave_moe_layer_step": 2,
            "no_rope_layers": [0, 1, 1],
            "layer_types": ["chunked_attention", "full_attention", "chunked_attention"],
            "hidden_act": "gelu",
            "intermediate_size_mlp": 72,
            "tie_word_embeddings": True,
        },
    ),
    ("phimoe", {}),
    ("phimoe", {"rope_parameters": MAGNIFIED, "lm_head_bias": True, "attention_bias": True}),
    ("phimoe", {"router_jitter_noise": 0.3, "sliding_window": 7, "tie_word_embeddings": True}),
    ("ministral3", {"rope_parameters": TEMPERED}),
    ("ministral3", {}),
    ("ministral3", {"sliding_window": 7, "rope_parameters": {**TEMPERED, "mscale": 0.7}}),
    ("falcon", {}),
    ("falcon", {**MHA, "parallel_attn": False, "bias": True}),
    ("falcon", {**MHA, "tie_word_embeddings": False}),
    ("falcon", {**MHA, "multi_query": False, "parallel_attn": False, "bias": True, "alibi": True}),
    ("falcon", {"num_attention_heads": 3, "hidden_size": 48, "alibi": True}),
    ("falcon", {"new_decoder_architecture": True, "bias": True, "activation": "gelu_new"}),
    ("falcon", {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1}),
    ("gpt2", {}),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True, "activation_function": "gelu"}),
    ("gpt2", {"scale_attn_weights": False, "tie_word_embeddings": False}),
    ("falcon_h1", {}),
    ("falcon_h1", MULTIPLIERS),
    ("falcon_h1", {**GATED, "mamba_norm_before_gate": False, "mamba_d_conv": 3}),
    ("falcon_h1", {**GATED, "mamba_norm_before_gate": True, "mlp_bias": True}),
    ("falcon_h1", {"mamba_proj_bias": True, "projectors_bias": True, "attention_bias": True}),
    ("falcon_h1", {"mamba_conv_bias": False, "time_step_limit": [0.5, 0.9], "mamba_d_ssm": None}),
    ("falcon_h1", {"mamba_n_groups": 1, "mamba_n_heads": 8, "hidden_act": "gelu"}),
    ("granitemoehybrid", {}),
    ("granitemoehybrid", {"num_local_experts": 0, "position_embedding_type": "rope"}),
    ("granitemoehybrid", {"mamba_proj_bias": True, "mamba_conv_bias": False, "mamba_n_groups": 1}),
    ("granitemoehybrid", {"time_step_limit": [0.5, 0.9], "attention_bias": True}),
    ("granitemoehybrid", {"layer_types": None, "mamba_d_conv": 2, "use_cache": False}),
    (
        "granitemoehybrid",
        {"residual_multiplier": 0.3, "embedding_multiplier": 3.5, "logits_scaling": 7.0},
    ),
    ("lfm2", {}),
    ("lfm2", {"conv_bias": True, "conv_L_cache": 4, "block_auto_adjust_ff_dim": False}),
    ("lfm2", {"layer_types": None, "full_attn_idxs": [0, 2], "tie_word_embeddings": False}),
    ("lfm2", {"block_multiple_of": 24, "block_ffn_dim_multiplier": 1.3}),
    ("qwen3_next", {}),
    ("qwen3_next", {"attention_bias": True, "norm_topk_prob": False, "linear_num_key_heads": 4}),
    ("qwen3_next", {"decoder_sparse_step": 2, "linear_conv_kernel_dim": 3, "hidden_act": "gelu"}),
    ("qwen3_next", {"mlp_only_layers": [0], "num_experts_per_tok": 3, "num_key_value_heads": 4}),
    ("qwen3_next", {"rope_parameters": HALF, "tie_word_embeddings": True}),
    ("qwen3_next", {"layer_types": LINEAR, "linear_num_value_heads": 2, "use_cache": False}),
    ("qwen3_5_text", {}),
    ("qwen3_5_text", {"attention_bias": True, "linear_num_key_heads": 4, "hidden_act": "gelu"}),
    ("qwen3_5_text", {"rope_parameters": HALF, "linear_conv_kernel_dim": 2, "head_dim": 24}),
    ("qwen3_5_text", {"layer_types": LINEAR, "tie_word_embeddings": True}),
    ("qwen3_5_moe_text", {}),
    ("qwen3_5_moe_text", {"attention_bias": True, "num_experts_per_tok": 3, "head_dim": 24}),
    (
        "qwen3_5_moe_text",
        {"rope_parameters": HALF, "tie_word_embeddings": True, "hidden_act": "gelu"},
    ),
    ("qwen3_5_moe_text", {"linear_key_head_dim": 8, "linear_conv_kernel_dim": 3}),
    ("qwen3_5_moe_text", {"num_key_value_heads": 4, "linear_num_key_heads": 4}),
    ("apertus", {}),
    ("gpt_oss", {}),
    ("gpt_oss", {"swiglu_alpha": 0.9, "layer_types": LAYERS, "num_experts_per_tok": 2}),
    ("gpt_oss", {"rope_parameters": YARN, "attention_bias": False, "num_key_value_heads": 4}),
    ("apertus", {"rope_parameters": LLAMA3, "attention_bias": True, "num_key_value_heads": 4}),
    ("apertus", {"hidden_act": "silu", "tie_word_embeddings": True}),
]
THETA = {"rope_type": "default", "rope_theta": 777.0}
# What the cases above leave as it is.
CASES += [
    (
        "mistral",
        {
            "hidden_act": "gelu",
            "rms_norm_eps": 1e-3,
            "rope_parameters": THETA,
            "tie_word_embeddings": True,
        },
    ),
    ("qwen2", {"head_dim": 16, "hidden_act": "gelu", "rms_norm_eps": 1e-3}),
    ("qwen3", {"hidden_act": "gelu", "rms_norm_eps": 1e-3, "rope_parameters": THETA}),
    (
        "gemma",
        {
            "hidden_activation": "gelu",
            "rms_norm_eps": 1e-3,
            "rope_parameters": THETA,
        },
    ),
    ("gemma2", {"rms_norm_eps": 1e-3, "rope_parameters": THETA, "tie_word_embeddings": False}),
    (
        "gemma3_text",
        {
            "hidden_activation": "gelu",
            "query_pre_attn_scalar": 20,
            "rms_norm_eps": 1e-3,
            "tie_word_embeddings": False,
        },
    ),
    (
        "granite",
        {
            "head_dim": 16,
            "hidden_act": "gelu",
            "rms_norm_eps": 1e-3,
            "rope_parameters": THETA,
            "tie_word_embeddings": True,
        },
    ),
    (
        "smollm3",
        {
            "head_dim": 16,
            "hidden_act": "gelu",
            "rms_norm_eps": 1e-3,
            "rope_parameters": THETA,
            "tie_word_embeddings": False,
        },
    ),
    (
        "olmo2",
        {"head_dim": 16, "hidden_act": "gelu", "rms_norm_eps": 1e-3, "rope_parameters": THETA},
    ),
    ("phi3", {"head_dim": 16, "hidden_act": "gelu", "rms_norm_eps": 1e-3}),
    ("cohere", {"head_dim": 16, "hidden_act": "gelu", "rope_parameters": THETA}),
    (
        "cohere2",
        {
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-3,
            "rope_parameters": THETA,
            "tie_word_embeddings": False,
        },
    ),
    (
        "olmo3",
        {"head_dim": 16, "hidden_act": "gelu", "rms_norm_eps": 1e-3, "tie_word_embeddings": True},
    ),
    (
        "exaone4",
        {
            "hidden_act": "gelu",
            "rms_norm_eps": 1e-3,
            "rope_parameters": THETA,
            "tie_word_embeddings": True,
        },
    ),
    (
        "ministral",
        {
            "hidden_act": "gelu",
            "rms_norm_eps": 1e-3,
            "rope_parameters": THETA,
            "tie_word_embeddings": True,
        },
    ),
    (
        "ernie4_5",
        {
            "hidden_act": "gelu",
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-3,
            "rope_parameters": THETA,
        },
    ),
    (
        "helium",
        {
            "hidden_act": "gelu",
            "rms_norm_eps": 1e-3,
            "rope_parameters": THETA,
            "tie_word_embeddings": True,
        },
    ),
    (
        "glm",
        {
            "hidden_act": "gelu",
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-3,
            "tie_word_embeddings": True,
        },
    ),
    (
        "glm4",
        {
            "hidden_act": "gelu",
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-3,
            "rope_parameters": THETA,
        },
    ),
    (
        "stablelm",
        {
            "head_dim": 16,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-3,
            "rope_parameters": THETA,
            "tie_word_embeddings": True,
        },
    ),
    ("arcee", {"rms_norm_eps": 1e-3, "rope_parameters": THETA, "tie_word_embeddings": True}),
    (
        "nemotron",
        {
            "hidden_act": "gelu",
            "norm_eps": 1e-3,
            "rope_parameters": THETA,
            "tie_word_embeddings": True,
        },
    ),
    (
        "starcoder2",
        {
            "head_dim": 16,
            "norm_epsilon": 1e-3,
            "num_key_value_heads": 4,
            "rope_parameters": THETA,
            "tie_word_embeddings": False,
        },
    ),
    (
        "seed_oss",
        {
            "hidden_act": "gelu",
            "rms_norm_eps": 1e-3,
            "rope_parameters": THETA,
            "tie_word_embeddings": True,
        },
    ),
    ("olmo", {"head_dim": 16, "hidden_act": "gelu", "rope_parameters": THETA}),
    (
        "hunyuan_v1_dense",
        {"hidden_act": "gelu", "rms_norm_eps": 1e-3, "tie_word_embeddings": True},
    ),
    ("gpt_neox", {"head_dim": 16}),
    (
        "olmoe",
        {
            "hidden_act": "gelu",
            "rms_norm_eps": 1e-3,
            "rope_parameters": THETA,
            "tie_word_embeddings": True,
        },
    ),
    (
        "granitemoe",
        {
            "head_dim": 16,
            "mlp_bias": True,
            "rms_norm_eps": 1e-3,
            "rope_parameters": THETA,
            "tie_word_embeddings": True,
        },
    ),
    (
        "glm4_moe",
        {
            "head_dim": 16,
            "hidden_act": "gelu",
            "rms_norm_eps": 1e-3,
            "rope_parameters": THETA,
            "tie_word_embeddings": True,
        },
    ),
    (
        "mixtral",
        {
            "head_dim": 16,
            "rms_norm_eps": 1e-3,
            "rope_parameters": THETA,
            "tie_word_embeddings": True,
        },
    ),
    (
        "qwen3_moe",
        {
            "attention_bias": True,
            "hidden_act": "gelu",
            "rms_norm_eps": 1e-3,
            "rope_parameters": THETA,
            "tie_word_embeddings": True,
        },
    ),
    (
        "qwen2_moe",
        {
            "head_dim": 16,
            "hidden_act": "gelu",
            "rms_norm_eps": 1e-3,
            "rope_parameters": THETA,
            "tie_word_embeddings": True,
        },
    ),
    ("phi", {"head_dim": 16, "layer_norm_eps": 1e-3}),
    ("deepseek_v3", {"rms_norm_eps": 1e-3}),
    ("llama4_text", {"rms_norm_eps": 1e-3}),
    ("phimoe", {"head_dim": 16, "hidden_act": "gelu", "rms_norm_eps": 1e-3}),
    ("ministral3", {"hidden_act": "gelu", "rms_norm_eps": 1e-3, "tie_word_embeddings": True}),
    ("falcon", {"layer_norm_epsilon": 1e-3, "rope_parameters": THETA}),
    ("gpt2", {"layer_norm_epsilon": 1e-3}),
    (
        "lfm2",
        {"head_dim": 16, "norm_eps": 1e-3, "rope_parameters": THETA, "tie_word_embeddings": False},
    ),
    (
        "falcon_h1",
        {"head_dim": 16, "rope_parameters": THETA, "tie_word_embeddings": True},
    ),
    ("falcon_h1", {"mamba_rms_norm": True}),
    ("falcon_h1", {"mamba_rms_norm": True, "mamba_norm_before_gate": True}),
    ("granitemoehybrid", {"num_experts_per_tok": 3}),
    ("granitemoehybrid", {"tie_word_embeddings": True, "head_dim": 16}),
    ("granitemoehybrid", {"tie_word_embeddings": True}),
    ("granitemoehybrid", {"head_dim": 16}),
    ("granitemoehybrid", {"hidden_act": "gelu"}),
    ("granitemoehybrid", {"hidden_act": "gelu_pytorch_tanh"}),
    ("granitemoehybrid", {"rms_norm_eps": 1e-3}),
    ("granitemoehybrid", {"position_embedding_type": "rope", "rope_parameters": THETA}),
    ("apertus", {"head_dim": 16}),
    ("apertus", {"rms_norm_eps": 1e-3}),
    ("apertus", {"head_dim": 16, "rms_norm_eps": 1e-3}),
    # As published; the other cases of these families have a larger one (tiny.DELTA_NET).
    ("qwen3_next", {"rms_norm_eps": 1e-6}),
    ("qwen3_5_text", {"rms_norm_eps": 1e-6}),
    ("qwen3_5_moe_text", {"rms_norm_eps": 1e-3}),
    ("gpt_oss", {"rms_norm_eps": 1e-3, "rope_parameters": THETA, "tie_word_embeddings": True}),
]
# Other models of a family, which have tensors that its first case has not.
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("gemma4_text", {"num_kv_shared_layers": 0, **MOE4}),
]
FAMILIES = tuple(dict.fromkeys(family for family, _ in CASES))


def name_of(case: tuple[str, dict[str, Any]]) -> str:
    """Of a case: its family, its switches and its kind of rotary embedding."""
    family, switches = case
    rope = switches.get("rope_parameters", {}).get("rope_type", "")
    return "-".join([family, *switches, rope]).rstrip("-")
