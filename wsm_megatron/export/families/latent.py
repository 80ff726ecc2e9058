"""DeepSeek-V3, and what has its shape: multi-head latent attention, experts, MTP."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from wsm_megatron.export.families.common import (
    DENSE_MLP,
    EXPERTS,
    IN,
    LAYER,
    ROUTER,
    SHARED_EXPERTS,
    SOME,
    TAKES,
    decoder_config,
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


def _low_rank_queries(args: ModelArgs) -> bool:
    return bool(args.get("q_lora_rank"))


def _whole_queries(args: ModelArgs) -> bool:
    return not _low_rank_queries(args)


_OF, _TO = IN + "self_attention.", LAYER + "self_attn."
_ATTENTION = (
    row(
        LAYER + "input_layernorm.weight",
        (IN + "input_layernorm.weight", _OF + "linear_q_down_proj.layer_norm_weight"),
    ),
    row(
        LAYER + "post_attention_layernorm.weight",
        (IN + "mlp.linear_fc1.layer_norm_weight", IN + "pre_mlp_layernorm.weight"),
    ),
    row(_TO + "q_proj.weight", _OF + "linear_q_proj.weight", when=_whole_queries),
    row(_TO + "q_a_proj.weight", _OF + "linear_q_down_proj.weight", when=_low_rank_queries),
    row(
        _TO + "q_a_layernorm.weight",
        (_OF + "linear_q_up_proj.layer_norm_weight", _OF + "q_layernorm.weight"),
        when=_low_rank_queries,
    ),
    row(_TO + "q_b_proj.weight", _OF + "linear_q_up_proj.weight", when=_low_rank_queries),
    row(_TO + "kv_a_proj_with_mqa.weight", _OF + "linear_kv_down_proj.weight"),
    row(
        _TO + "kv_a_layernorm.weight",
        (_OF + "linear_kv_up_proj.layer_norm_weight", _OF + "kv_layernorm.weight"),
    ),
    row(_TO + "kv_b_proj.weight", _OF + "linear_kv_up_proj.weight"),
    row(_TO + "o_proj.weight", _OF + "linear_proj.weight"),
)


def _config(args: ModelArgs) -> dict[str, Any]:
    rope, nope = args.need("qk_pos_emb_head_dim"), args.need("qk_head_dim")
    own = {
        "head_dim": rope,
        "kv_lora_rank": args.need("kv_lora_rank"),
        "moe_layer_freq": 1,
        "n_routed_experts": args.need("num_experts"),
        "n_shared_experts": number_of_shared_experts(args),
        "num_key_value_heads": args.need("num_attention_heads"),
        "num_nextn_predict_layers": args.mtp_layers,
        "q_lora_rank": args.get("q_lora_rank"),
        "qk_head_dim": rope + nope,
        "qk_nope_head_dim": nope,
        "qk_rope_head_dim": rope,
        "rope_interleave": True,
        "rope_scaling": _yarn(args),
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "v_head_dim": args.need("v_head_dim"),
    }
    return decoder_config(args) | sigmoid_router(args) | own


def _yarn(args: ModelArgs) -> dict[str, Any] | None:
    if args.need("rope_type") == "rope" or args.need("rotary_scaling_factor") == 1:
        return None
    return {
        "type": "yarn",
        "rope_type": "yarn",
        "factor": args.need("rotary_scaling_factor"),
        "original_max_position_embeddings": args.need("original_max_position_embeddings"),
        "beta_fast": args.need("beta_fast"),
        "beta_slow": args.need("beta_slow"),
        "mscale": args.need("mscale"),
        "mscale_all_dim": args.need("mscale_all_dim"),
    }


def _refuses(args: ModelArgs) -> Iterable[str]:
    yield from group_refusals(args)
    if _yarn(args) is not None and not args.need("mscale_all_dim") and args.need("mscale") != 1:
        yield "mscale other than 1 with mscale_all_dim 0"


DEEPSEEK_V3 = Family(
    name="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    table=(
        *model_rows(),
        *_ATTENTION,
        *DENSE_MLP,
        *EXPERTS,
        *SHARED_EXPERTS,
        *ROUTER,
        *router_bias("e_score_correction_bias"),
        *mtp_rows("shared_head.norm.weight"),
    ),
    takes=TAKES
    | {
        "multi_latent_attention": True,
        "qk_layernorm": True,
        "num_experts": SOME,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "mtp_num_layers": (None, 0, 1, 2, 3, 4),
        "position_embedding_type": ("rope", "yarn"),
        "untie_embeddings_and_output_weights": True,
        "add_qkv_bias": False,
    },
    config=_config,
    kinds=kinds,
    refuses=_refuses,
    copies={
        "model.embed_tokens.weight": LAYER + "embed_tokens.weight",
        "lm_head.weight": LAYER + "shared_head.head.weight",
    },
)
