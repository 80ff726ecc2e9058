"""What the tables of decoders share: rows that differ in nothing but where a family puts them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from wsm_megatron.errors import UsageError
from wsm_megatron.export.model_args import ModelArgs
from wsm_megatron.export.table import Kinds, Row, row
from wsm_megatron.export.transforms import halves, one_head, split_qkv, vocabulary

LAYER = "model.layers.{layer}."
IN = "layers.{layer}."
DENSE, MOE, MTP = "dense", "moe", "mtp"


def untied(args: ModelArgs) -> bool:
    return not args.tied


def qkv_bias(args: ModelArgs) -> bool:
    return bool(args.get("add_qkv_bias"))


def qk_norm(args: ModelArgs) -> bool:
    return bool(args.get("qk_layernorm"))


def shared_experts(args: ModelArgs) -> bool:
    return bool(args.get("moe_shared_expert_intermediate_size"))


def expert_bias(args: ModelArgs) -> bool:
    return bool(args.get("moe_router_enable_expert_bias"))


def model_rows(embedding: str = "model.embed_tokens.weight") -> tuple[Row, ...]:
    """Embedding, last norm and output layer."""
    return (
        row(embedding, "embedding.word_embeddings.weight", how=vocabulary),
        row("model.norm.weight", "decoder.final_layernorm.weight"),
        row("lm_head.weight", "output_layer.weight", how=vocabulary, when=untied),
    )


NORMS = (
    row(
        LAYER + "input_layernorm.weight",
        (IN + "self_attention.linear_qkv.layer_norm_weight", IN + "input_layernorm.weight"),
    ),
    row(
        LAYER + "post_attention_layernorm.weight",
        (IN + "mlp.linear_fc1.layer_norm_weight", IN + "pre_mlp_layernorm.weight"),
    ),
)
"""Transformer Engine's layers keep the norm with the linear layer that it goes before."""

_QKV = IN + "self_attention.linear_qkv."

ATTENTION = (
    row(tuple(LAYER + f"self_attn.{x}_proj.weight" for x in "qkv"), _QKV + "weight", how=split_qkv),
    row(LAYER + "self_attn.o_proj.weight", IN + "self_attention.linear_proj.weight"),
)
QKV_BIAS = (
    row(
        tuple(LAYER + f"self_attn.{x}_proj.bias" for x in "qkv"),
        _QKV + "bias",
        how=split_qkv,
        when=qkv_bias,
    ),
)
QK_NORM = tuple(
    row(
        LAYER + f"self_attn.{x}_norm.weight",
        IN + f"self_attention.{x}_layernorm.weight",
        how=one_head,
        when=qk_norm,
    )
    for x in "qk"
)


def gated_mlp(hf: str, megatron: str, **more: Any) -> tuple[Row, ...]:
    """The three matrices of a gated MLP."""
    gate_up = (hf + "gate_proj.weight", hf + "up_proj.weight")
    return (
        row(gate_up, megatron + "linear_fc1.weight", how=halves, **more),
        row(hf + "down_proj.weight", megatron + "linear_fc2.weight", **more),
    )


DENSE_MLP = gated_mlp(LAYER + "mlp.", IN + "mlp.", kind=DENSE)
EXPERTS = gated_mlp(LAYER + "mlp.experts.{expert}.", IN + "mlp.experts.{expert}.", kind=MOE)
SHARED_EXPERTS = gated_mlp(
    LAYER + "mlp.shared_experts.", IN + "mlp.shared_experts.", kind=MOE, when=shared_experts
)
ROUTER = (row(LAYER + "mlp.gate.weight", IN + "mlp.router.weight", kind=MOE),)


def router_bias(name: str) -> tuple[Row, ...]:
    """The bias by which experts are chosen: float32, as small steps of it matter."""
    bias = row(
        LAYER + f"mlp.gate.{name}",
        IN + "mlp.router.expert_bias",
        kind=MOE,
        when=expert_bias,
        dtype=torch.float32,
    )
    return (bias,)


def mtp_rows(norm: str) -> tuple[Row, ...]:
    """What a layer of multi-token prediction has beside a decoder layer's tensors."""
    same = ("enorm.weight", "hnorm.weight", "eh_proj.weight")
    return (
        *(row(LAYER + name, IN + name, kind=MTP) for name in same),
        row(LAYER + norm, IN + "final_layernorm.weight", kind=MTP),
    )


TAKES: dict[str, Any] = {
    "activation_func_clamp_value": None,
    "apply_layernorm_1p": False,
    "apply_residual_connection_post_layernorm": False,
    "attention_output_gate": False,
    "enable_mhc_connections": False,
    "experimental_attention_variant": None,
    "glu_linear_offset": 0.0,
    "heterogeneous_layers_config_path": None,
    "hybrid_layer_pattern": None,
    "hybrid_override_pattern": None,
    "linear_attention_freq": None,
    "moe_apply_probs_on_input": False,
    "moe_latent_size": None,
    "moe_mlp_glu_interleave_size": None,
    "moe_shared_expert_glu_interleave_size": None,
    "moe_shared_expert_gate": False,
    "mtp_num_layers": (None, 0),
    "mtp_use_repeated_layer": False,
    "multi_latent_attention": False,
    "no_rope_freq": None,
    "normalization": "RMSNorm",
    "num_experts": None,
    "position_embedding_type": "rope",
    "qk_l2_norm": False,
    "quick_geglu": False,
    "rotary_interleaved": False,
    "rotary_percent": 1.0,
    "rotary_seq_len_interpolation_factor": (None, 1),
    "softmax_type": "vanilla",
    "squared_relu": False,
    "swiglu": True,
    "use_mup": False,
    "window_size": None,
}
"""What most families take: a Llama. Tables say where theirs differ."""

SOME, ANYTHING = "something", "anything"
"""In :attr:`.Family.takes`: whatever but None, and whatever."""


def kinds(args: ModelArgs) -> Kinds:
    """Dense layers and layers with experts; MTP's are as the decoder's last."""
    found = [frozenset({MOE if moe else DENSE}) for moe in args.moe_layers()]
    return [*found, *[found[-1] | {MTP}] * args.mtp_layers]


def decoder_config(args: ModelArgs) -> dict[str, Any]:
    """What all decoders have in their ``config.json``."""
    return {
        "attention_bias": bool(args.get("add_qkv_bias")),
        "attention_dropout": 0.0,
        "head_dim": args.head_dim,
        "hidden_act": "silu",
        "hidden_size": args.need("hidden_size"),
        "initializer_range": args.get("init_method_std") or 0.02,
        "intermediate_size": args.need("ffn_hidden_size"),
        "max_position_embeddings": args.need("max_position_embeddings"),
        "num_attention_heads": args.need("num_attention_heads"),
        "num_hidden_layers": args.layers,
        "num_key_value_heads": args.query_groups,
        "rms_norm_eps": args.need("norm_epsilon"),
        "rope_scaling": _llama3_scaling(args),
        "rope_theta": args.need("rotary_base"),
        "tie_word_embeddings": args.tied,
        "use_cache": True,
        "vocab_size": args.vocab_size,
    }


def _llama3_scaling(args: ModelArgs) -> dict[str, Any] | None:
    """``RotaryEmbedding._apply_scaling``, whose other constants are fixed."""
    if not args.get("use_rope_scaling"):
        return None
    return {
        "rope_type": "llama3",
        "factor": args.get("rope_scaling_factor"),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def expert_width(args: ModelArgs) -> int:
    """Of one expert's MLP."""
    return args.get("moe_ffn_hidden_size") or args.need("ffn_hidden_size")


def first_dense_layers(args: ModelArgs) -> int:
    """How many layers come before the first with experts, after which all have some."""
    moe = args.moe_layers()
    dense = moe.index(True) if True in moe else len(moe)
    if not all(moe[dense:]):
        raise UsageError(
            f"{args.where}: moe_layer_freq has dense layers after the first with experts, which "
            "this family cannot express"
        )
    return dense


def sigmoid_router(args: ModelArgs) -> dict[str, Any]:
    """A router that scores by sigmoid and chooses by score and bias."""
    scale = args.get("moe_router_topk_scaling_factor")
    return {
        "first_k_dense_replace": first_dense_layers(args),
        "moe_intermediate_size": expert_width(args),
        "n_group": args.get("moe_router_num_groups") or 1,
        "norm_topk_prob": args.need("moe_router_topk") > 1,
        "num_experts_per_tok": args.need("moe_router_topk"),
        "routed_scaling_factor": 1.0 if scale is None else scale,
        "topk_group": args.get("moe_router_group_topk") or 1,
    }


def number_of_shared_experts(args: ModelArgs) -> int:
    """Shared experts of an expert's width that are together as wide as Megatron's one."""
    shared, width = args.get("moe_shared_expert_intermediate_size") or 0, expert_width(args)
    if shared % width:
        raise UsageError(
            f"{args.where}: the shared expert's width, {shared}, is no multiple of the experts', "
            f"{width}, as this family has it"
        )
    return shared // width


def group_refusals(args: ModelArgs) -> Iterable[str]:
    """Megatron ranks groups by the sum of their topk / group_topk best, others by the best two."""
    groups, kept = args.get("moe_router_num_groups") or 1, args.get("moe_router_group_topk") or 1
    if groups > 1 and args.need("moe_router_topk") // kept != 2:
        yield "moe_router_topk / moe_router_group_topk other than 2, with groups of experts"
