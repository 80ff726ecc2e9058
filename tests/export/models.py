"""A tiny model of each family, as Megatron-LM's ``args`` describe it."""

from __future__ import annotations

from typing import Any

VOCABULARY, PADDED = 100, 128

BASE: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 4,
    "group_query_attention": True,
    "num_query_groups": 2,
    "kv_channels": 8,
    "max_position_embeddings": 64,
    "seq_length": 16,
    "position_embedding_type": "rope",
    "rotary_base": 5000,
    "rotary_percent": 1.0,
    "normalization": "RMSNorm",
    "norm_epsilon": 1e-6,
    "apply_layernorm_1p": False,
    "swiglu": True,
    "add_bias_linear": False,
    "untie_embeddings_and_output_weights": True,
    "tokenizer_type": "HuggingFaceTokenizer",
    "vocab_size": VOCABULARY,
    "padded_vocab_size": PADDED,
    "num_experts": None,
}
"""``num_query_groups`` other than the heads, ``kv_channels`` other than their share of the hidden
size in some: what an export could get wrong."""

_EXPERTS = BASE | {
    "num_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 24,
    "moe_router_load_balancing_type": "none",
    "moe_token_dispatcher_type": "allgather",
}
_SIGMOID = _EXPERTS | {
    "num_layers": 3,
    "moe_layer_freq": [0, 1, 1],
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_topk_scaling_factor": 2.5,
    "moe_shared_expert_intermediate_size": 24,
}

_GPT_OSS = _EXPERTS | {
    "swiglu": False,
    "quick_geglu": True,
    "glu_linear_offset": 1.0,
    "activation_func_clamp_value": 1.5,
    "add_bias_linear": True,
    "add_qkv_bias": True,
    "softmax_type": "learnable",
    "window_size": (3, 0),
    "window_attn_skip_freq": 2,
}

_HYBRID = BASE | {
    "is_hybrid_model": True,
    "position_embedding_type": "none",
    "squared_relu": True,
    "swiglu": False,
    "norm_epsilon": 1e-5,
    "mamba_state_dim": 10,
    "mamba_head_dim": 8,
    "mamba_num_groups": 2,
    "mamba_num_heads": 8,
}

MODELS: dict[str, dict[str, Any]] = {
    "llama": BASE | {"use_rope_scaling": True, "rope_scaling_factor": 4.0},
    "qwen2": BASE | {"add_qkv_bias": True, "untie_embeddings_and_output_weights": False},
    "qwen3": BASE | {"qk_layernorm": True, "kv_channels": 16},
    "qwen3_moe": _EXPERTS | {"qk_layernorm": True, "moe_layer_freq": [1, 0], "kv_channels": 16},
    "qwen3_moe-pre_softmax": _EXPERTS
    | {"qk_layernorm": True, "moe_router_pre_softmax": True, "kv_channels": 16},
    "mixtral": _EXPERTS,
    "glm4_moe": _SIGMOID | {"add_qkv_bias": True, "rotary_percent": 0.5, "mtp_num_layers": 1},
    "glm4_moe-qk_norm": _SIGMOID | {"qk_layernorm": True, "rotary_percent": 0.5},
    "bailing_moe_v2": _SIGMOID
    | {
        "qk_layernorm": True,
        "rotary_percent": 0.5,
        "num_experts": 8,
        "moe_router_topk": 4,
        "moe_router_num_groups": 4,
        "moe_router_group_topk": 2,
        "mtp_num_layers": 1,
    },
    "gpt_oss": _GPT_OSS,
    "gpt_oss-yarn": _GPT_OSS
    | {
        "position_embedding_type": "yarn",
        "yarn_rotary_scaling_factor": 4.0,
        "yarn_original_max_position_embeddings": 16,
        "yarn_beta_fast": 32.0,
        "yarn_beta_slow": 1.0,
        "yarn_correction_range_round_to_int": False,
        "yarn_mscale": None,
        "yarn_mscale_all_dim": None,
    },
    "nemotron_h": _HYBRID | {"num_layers": 4, "hybrid_override_pattern": "M*-M"},
    "nemotron_h-experts": _HYBRID
    | {
        "num_layers": 4,
        "hybrid_override_pattern": "ME*E",
        "num_experts": 4,
        "moe_router_topk": 2,
        "moe_ffn_hidden_size": 24,
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "allgather",
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_topk_scaling_factor": 2.5,
        "moe_shared_expert_intermediate_size": 20,
    },
    "deepseek_v3": _SIGMOID
    | {
        "multi_latent_attention": True,
        "group_query_attention": False,
        "qk_layernorm": True,
        "q_lora_rank": 16,
        "kv_lora_rank": 12,
        "qk_head_dim": 8,
        "qk_pos_emb_head_dim": 4,
        "v_head_dim": 6,
        "rope_type": "yarn",
        "rotary_scaling_factor": 4.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "num_experts": 8,
        "moe_router_topk": 4,
        "moe_router_num_groups": 4,
        "moe_router_group_topk": 2,
        "mtp_num_layers": 1,
    },
    "deepseek_v3-rope": _SIGMOID
    | {
        "multi_latent_attention": True,
        "group_query_attention": False,
        "qk_layernorm": True,
        "q_lora_rank": 16,
        "kv_lora_rank": 12,
        "qk_head_dim": 4,
        "qk_pos_emb_head_dim": 8,
        "v_head_dim": 8,
        "rope_type": "rope",
        "rotary_scaling_factor": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 0.0,
    },
    "deepseek_v3-whole_queries": _SIGMOID
    | {
        "multi_latent_attention": True,
        "group_query_attention": False,
        "qk_layernorm": True,
        "q_lora_rank": None,
        "kv_lora_rank": 12,
        "qk_head_dim": 8,
        "qk_pos_emb_head_dim": 4,
        "v_head_dim": 8,
        "rope_type": "yarn",
        "rotary_scaling_factor": 4.0,
        "mscale": 1.0,
        "mscale_all_dim": 0.0,
    },
}


def family(name: str) -> str:
    return name.partition("/")[0].partition("-")[0]
