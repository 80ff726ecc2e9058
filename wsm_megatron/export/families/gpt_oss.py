"""GPT-OSS: attention with sinks and windows, biases everywhere, experts stacked and transposed."""

from __future__ import annotations

from typing import Any

from wsm_megatron.export.families.common import (
    ANYTHING,
    ATTENTION,
    IN,
    LAYER,
    NORMS,
    QKV_BIAS,
    SOME,
    TAKES,
    decoder_config,
    expert_width,
    kinds,
    model_rows,
)
from wsm_megatron.export.model_args import ModelArgs
from wsm_megatron.export.table import Family, row
from wsm_megatron.export.transforms import interleaved_halves, plain, transposed

_EXPERTS = tuple(
    row(LAYER + f"mlp.experts.{name}", IN + f"mlp.experts.{{expert}}.{of}", how=how, joins="stack")
    for name, of, how in (
        ("gate_up_proj", "linear_fc1.weight", interleaved_halves),
        ("gate_up_proj_bias", "linear_fc1.bias", interleaved_halves),
        ("down_proj", "linear_fc2.weight", transposed),
        ("down_proj_bias", "linear_fc2.bias", plain),
    )
)
_OF, _TO = IN + "self_attention.", LAYER + "self_attn."
_OTHERS = (
    row(_TO + "o_proj.bias", _OF + "linear_proj.bias"),
    row(_TO + "sinks", _OF + "core_attention.softmax_offset"),
    row(LAYER + "mlp.router.weight", IN + "mlp.router.weight"),
    row(LAYER + "mlp.router.bias", IN + "mlp.router.bias"),
)


def _config(args: ModelArgs) -> dict[str, Any]:
    window = args.get("window_size")
    own = {
        "intermediate_size": expert_width(args),
        "layer_types": _layer_types(args),
        "num_experts_per_tok": args.need("moe_router_topk"),
        "num_local_experts": args.need("num_experts"),
        "rope_parameters": _rope(args),
        "sliding_window": None if window is None else window[0] + 1,  # Megatron counts those before
        "swiglu_limit": args.need("activation_func_clamp_value"),
    }
    config = decoder_config(args)
    del config["rope_scaling"]
    return config | own


def _layer_types(args: ModelArgs) -> list[str]:
    """``is_layer_window_attention``: every ``window_attn_skip_freq``-th layer sees everything."""
    freq = args.get("window_attn_skip_freq")
    if args.get("window_size") is None:
        windows = [False] * args.layers
    elif freq is None:
        windows = [True] * args.layers
    elif isinstance(freq, int):
        windows = [layer % freq != 0 for layer in range(1, args.layers + 1)]
    else:
        windows = [bool(one) for one in freq]
    return ["sliding_attention" if window else "full_attention" for window in windows]


def _rope(args: ModelArgs) -> dict[str, Any]:
    theta = args.need("rotary_base")
    if args.need("position_embedding_type") == "rope":
        return {"rope_type": "default", "rope_theta": theta}
    return {
        "rope_type": "yarn",
        "rope_theta": theta,
        "factor": args.need("yarn_rotary_scaling_factor"),
        "beta_fast": args.need("yarn_beta_fast"),
        "beta_slow": args.need("yarn_beta_slow"),
        "truncate": args.need("yarn_correction_range_round_to_int"),
        "original_max_position_embeddings": args.need("yarn_original_max_position_embeddings"),
    }


GPT_OSS = Family(
    name="gpt_oss",
    architecture="GptOssForCausalLM",
    table=(*model_rows(), *NORMS, *ATTENTION, *QKV_BIAS, *_EXPERTS, *_OTHERS),
    takes=TAKES
    | {
        "activation_func_clamp_value": SOME,
        "add_bias_linear": True,
        "add_qkv_bias": True,
        "glu_linear_offset": 1.0,
        "moe_layer_freq": (1, [1]),
        "moe_router_enable_expert_bias": False,
        "moe_router_pre_softmax": False,
        "moe_router_score_function": "softmax",
        "moe_router_topk_scaling_factor": (None, 1.0),
        "moe_shared_expert_intermediate_size": (None, 0),
        "num_experts": SOME,
        "position_embedding_type": ("rope", "yarn"),
        "qk_layernorm": False,
        "quick_geglu": True,
        "softmax_type": "learnable",
        "swiglu": False,
        "use_rope_scaling": False,
        "window_size": ANYTHING,
        "yarn_mscale": None,
        "yarn_mscale_all_dim": None,
    },
    config=_config,
    kinds=kinds,
)
