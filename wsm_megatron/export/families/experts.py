"""Decoders with experts: Qwen3-MoE, Mixtral, GLM-4 MoE and Ling 2.0."""

from __future__ import annotations

from typing import Any

from wsm_megatron.export.families.common import (
    ATTENTION,
    DENSE_MLP,
    EXPERTS,
    IN,
    LAYER,
    MOE,
    NORMS,
    QK_NORM,
    QKV_BIAS,
    ROUTER,
    SHARED_EXPERTS,
    SOME,
    TAKES,
    decoder_config,
    expert_width,
    group_refusals,
    kinds,
    model_rows,
    mtp_rows,
    number_of_shared_experts,
    router_bias,
    sigmoid_router,
)
from wsm_megatron.export.model_args import ModelArgs
from wsm_megatron.export.table import Family, row
from wsm_megatron.export.transforms import fused_qkv, halves, one_head

_SOFTMAX = TAKES | {
    "num_experts": SOME,
    "moe_router_score_function": "softmax",
    "moe_router_enable_expert_bias": False,
    "moe_router_topk_scaling_factor": (None, 1.0),
    "moe_router_num_groups": None,
    "moe_shared_expert_intermediate_size": (None, 0),
    "add_qkv_bias": False,
}
_SIGMOID = TAKES | {
    "num_experts": SOME,
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "mtp_num_layers": (None, 0, 1, 2, 3, 4),
    "rotary_percent": SOME,
}


def _qwen3_moe(args: ModelArgs) -> dict[str, Any]:
    return decoder_config(args) | {
        "decoder_sparse_step": 1,
        "mlp_only_layers": [n for n, moe in enumerate(args.moe_layers()) if not moe],
        "moe_intermediate_size": expert_width(args),
        # The softmax of those that are chosen is that of all, normalised.
        "norm_topk_prob": not args.get("moe_router_pre_softmax"),
        "num_experts": args.need("num_experts"),
        "num_experts_per_tok": args.need("moe_router_topk"),
        "sliding_window": None,
        "use_sliding_window": False,
    }


QWEN3_MOE = Family(
    name="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    table=(*model_rows(), *NORMS, *ATTENTION, *QK_NORM, *DENSE_MLP, *EXPERTS, *ROUTER),
    takes=_SOFTMAX | {"qk_layernorm": True},
    config=_qwen3_moe,
    kinds=kinds,
)

_BLOCK = LAYER + "block_sparse_moe."
_MIXTRAL_EXPERTS = (
    row(
        tuple(_BLOCK + f"experts.{{expert}}.{name}.weight" for name in ("w1", "w3")),
        IN + "mlp.experts.{expert}.linear_fc1.weight",
        how=halves,
        kind=MOE,
    ),
    row(
        _BLOCK + "experts.{expert}.w2.weight",
        IN + "mlp.experts.{expert}.linear_fc2.weight",
        kind=MOE,
    ),
    row(_BLOCK + "gate.weight", IN + "mlp.router.weight", kind=MOE),
)


def _mixtral(args: ModelArgs) -> dict[str, Any]:
    return decoder_config(args) | {
        "intermediate_size": expert_width(args),
        "num_experts_per_tok": args.need("moe_router_topk"),
        "num_local_experts": args.need("num_experts"),
        "sliding_window": None,
    }


MIXTRAL = Family(
    name="mixtral",
    architecture="MixtralForCausalLM",
    table=(*model_rows(), *NORMS, *ATTENTION, *_MIXTRAL_EXPERTS),
    takes=_SOFTMAX
    | {"qk_layernorm": False, "moe_router_pre_softmax": False, "moe_layer_freq": (1, [1])},
    config=_mixtral,
    kinds=kinds,
)


def _glm4_moe(args: ModelArgs) -> dict[str, Any]:
    return (
        decoder_config(args)
        | sigmoid_router(args)
        | {
            "n_routed_experts": args.need("num_experts"),
            "n_shared_experts": number_of_shared_experts(args),
            "num_nextn_predict_layers": args.mtp_layers,
            "partial_rotary_factor": args.get("rotary_percent"),
            "use_qk_norm": bool(args.get("qk_layernorm")),
        }
    )


GLM4_MOE = Family(
    name="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    table=(
        *model_rows(),
        *NORMS,
        *ATTENTION,
        *QKV_BIAS,
        *QK_NORM,
        *DENSE_MLP,
        *EXPERTS,
        *SHARED_EXPERTS,
        *ROUTER,
        *router_bias("e_score_correction_bias"),
        *mtp_rows("shared_head.norm.weight"),
    ),
    takes=_SIGMOID | {"untie_embeddings_and_output_weights": True},
    config=_glm4_moe,
    kinds=kinds,
    refuses=group_refusals,
    copies={
        "model.embed_tokens.weight": LAYER + "embed_tokens.weight",
        "lm_head.weight": LAYER + "shared_head.head.weight",
    },
)

_LING_ATTENTION = (
    row(
        LAYER + "attention.query_key_value.weight",
        IN + "self_attention.linear_qkv.weight",
        how=fused_qkv,
    ),
    row(LAYER + "attention.dense.weight", IN + "self_attention.linear_proj.weight"),
    row(
        LAYER + "attention.query_layernorm.weight",
        IN + "self_attention.q_layernorm.weight",
        how=one_head,
    ),
    row(
        LAYER + "attention.key_layernorm.weight",
        IN + "self_attention.k_layernorm.weight",
        how=one_head,
    ),
)


def _ling(args: ModelArgs) -> dict[str, Any]:
    """Its own code comes with the tokenizer's folder (``trust_remote_code``)."""
    code, model = "configuration_bailing_moe_v2", "modeling_bailing_moe_v2"
    own = {
        "auto_map": {
            "AutoConfig": f"{code}.BailingMoeV2Config",
            "AutoModel": f"{model}.BailingMoeV2Model",
            "AutoModelForCausalLM": f"{model}.BailingMoeV2ForCausalLM",
        },
        "embedding_dropout": 0.0,
        "moe_router_enable_expert_bias": True,
        "moe_shared_expert_intermediate_size": args.get("moe_shared_expert_intermediate_size"),
        "num_experts": args.need("num_experts"),
        "num_nextn_predict_layers": args.mtp_layers,
        "num_shared_experts": number_of_shared_experts(args),
        "output_dropout": 0.0,
        "partial_rotary_factor": args.get("rotary_percent"),
        "rotary_dim": int(args.head_dim * args.get("rotary_percent")),
        "router_dtype": args.get("moe_router_dtype") or "fp32",
        "score_function": "sigmoid",
        "use_bias": False,
        "use_qk_norm": True,
        "use_qkv_bias": False,
        "use_rmsnorm": True,
    }
    return decoder_config(args) | sigmoid_router(args) | own


BAILING_MOE_V2 = Family(
    name="bailing_moe_v2",
    architecture="BailingMoeV2ForCausalLM",
    table=(
        *model_rows("model.word_embeddings.weight"),
        *NORMS,
        *_LING_ATTENTION,
        *DENSE_MLP,
        *EXPERTS,
        *SHARED_EXPERTS,
        *ROUTER,
        *router_bias("expert_bias"),
        *mtp_rows("final_layernorm.weight"),
    ),
    takes=_SIGMOID | {"qk_layernorm": True, "add_qkv_bias": False},
    config=_ling,
    kinds=kinds,
    refuses=group_refusals,
)
