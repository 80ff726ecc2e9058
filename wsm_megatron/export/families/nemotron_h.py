"""Nemotron-H: Mamba-2, attention without positions, MLPs and experts, one of them a layer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from wsm_megatron.errors import UsageError
from wsm_megatron.export.families.common import (
    ANYTHING,
    IN,
    TAKES,
    expert_width,
    group_refusals,
    shared_experts,
    untied,
)
from wsm_megatron.export.model_args import ModelArgs
from wsm_megatron.export.table import Family, Kinds, Row, row
from wsm_megatron.export.transforms import split_qkv, vocabulary

MAMBA, ATTENTION, MLP, MOE = "M", "*", "-", "E"
"""As ``hybrid_override_pattern`` has them."""

_TO = "backbone.layers.{layer}."
_MIXER = IN + "mixer."


def _latent(args: ModelArgs) -> bool:
    return bool(args.get("moe_latent_size"))


def _moe(hf: str, megatron: str, **more: Any) -> Row:
    return row(_TO + "mixer." + hf, IN + "mlp." + megatron, kind=MOE, **more)


_TABLE = (
    row("backbone.embeddings.weight", "embedding.word_embeddings.weight", how=vocabulary),
    row("backbone.norm_f.weight", ("decoder.final_norm.weight", "decoder.final_layernorm.weight")),
    row("lm_head.weight", "output_layer.weight", how=vocabulary, when=untied),
    row(
        _TO + "norm.weight",
        (
            _MIXER + "in_proj.layer_norm_weight",
            IN + "self_attention.linear_qkv.layer_norm_weight",
            IN + "mlp.linear_fc1.layer_norm_weight",
            IN + "norm.weight",
            IN + "input_layernorm.weight",
            IN + "pre_mlp_layernorm.weight",
        ),
    ),
    row(
        _TO + "mixer.in_proj.weight",
        tuple(_MIXER + f"in_proj.weight.{part}" for part in ("z", "x", "B", "C", "dt")),
        joins="concatenate",
        kind=MAMBA,
    ),
    *(
        row(
            _TO + f"mixer.conv1d.{name}",
            tuple(_MIXER + f"conv1d.{name}.{part}" for part in ("x", "B", "C")),
            joins="concatenate",
            kind=MAMBA,
        )
        for name in ("weight", "bias")
    ),
    *(
        row(_TO + f"mixer.{name}", _MIXER + name, kind=MAMBA)
        for name in ("A_log", "D", "dt_bias", "norm.weight", "out_proj.weight")
    ),
    row(
        tuple(_TO + f"mixer.{x}_proj.weight" for x in "qkv"),
        IN + "self_attention.linear_qkv.weight",
        how=split_qkv,
        kind=ATTENTION,
    ),
    row(_TO + "mixer.o_proj.weight", IN + "self_attention.linear_proj.weight", kind=ATTENTION),
    row(_TO + "mixer.up_proj.weight", IN + "mlp.linear_fc1.weight", kind=MLP),
    row(_TO + "mixer.down_proj.weight", IN + "mlp.linear_fc2.weight", kind=MLP),
    _moe("gate.weight", "router.weight"),
    _moe("gate.e_score_correction_bias", "router.expert_bias", dtype=torch.float32),
    _moe("fc1_latent_proj.weight", "fc1_latent_proj.weight", when=_latent),
    _moe("fc2_latent_proj.weight", "fc2_latent_proj.weight", when=_latent),
    _moe("shared_experts.up_proj.weight", "shared_experts.linear_fc1.weight", when=shared_experts),
    _moe(
        "shared_experts.down_proj.weight", "shared_experts.linear_fc2.weight", when=shared_experts
    ),
    _moe("experts.{expert}.up_proj.weight", "experts.{expert}.linear_fc1.weight"),
    _moe("experts.{expert}.down_proj.weight", "experts.{expert}.linear_fc2.weight"),
)


def _pattern(args: ModelArgs) -> str:
    """A letter for each layer. Later versions mark pipeline stages and MTP in it."""
    pattern = args.get("hybrid_layer_pattern") or args.need("hybrid_override_pattern")
    main, *mtp = pattern.replace("|", "").split("/")
    if mtp or set(main) - {MAMBA, ATTENTION, MLP, MOE}:
        raise UsageError(f"{args.where}: layers {pattern!r} are not all of M, *, - and E")
    return main


def _kinds(args: ModelArgs) -> Kinds:
    return [frozenset({letter}) for letter in _pattern(args)]


def _refuses(args: ModelArgs) -> Iterable[str]:
    if MAMBA in _pattern(args) and args.need("norm_epsilon") != 1e-5:
        yield "norm_epsilon other than 1e-5, which MambaMixer's own norm has"
    if MOE not in _pattern(args):
        return
    yield from group_refusals(args)
    if args.get("moe_router_score_function") != "sigmoid":
        yield f"moe_router_score_function is {args.get('moe_router_score_function')}, not sigmoid"
    if not args.get("moe_router_enable_expert_bias"):
        yield "moe_router_enable_expert_bias is False, not True"
    if not shared_experts(args):
        yield "moe_shared_expert_intermediate_size is not set"


def _config(args: ModelArgs) -> dict[str, Any]:
    heads, dim = args.get("mamba_num_heads"), args.need("mamba_head_dim")
    if heads is None:
        heads = 2 * args.need("hidden_size") // dim  # MambaMixer's expand
    return {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "chunk_size": 128,
        "conv_kernel": 4,
        "expand": 2,
        "head_dim": args.head_dim,
        "hidden_size": args.need("hidden_size"),
        "hybrid_override_pattern": _pattern(args),
        "initializer_range": args.get("init_method_std") or 0.02,
        "intermediate_size": args.need("ffn_hidden_size"),
        "layer_norm_epsilon": args.need("norm_epsilon"),
        "mamba_head_dim": dim,
        "mamba_hidden_act": "silu",
        "mamba_num_heads": heads,
        "mamba_proj_bias": False,
        "max_position_embeddings": args.need("max_position_embeddings"),
        "mlp_bias": False,
        "mlp_hidden_act": "relu2",
        "n_groups": args.need("mamba_num_groups"),
        "num_attention_heads": args.need("num_attention_heads"),
        "num_hidden_layers": len(_pattern(args)),
        "num_key_value_heads": args.query_groups,
        "ssm_state_size": args.need("mamba_state_dim"),
        "tie_word_embeddings": args.tied,
        "time_step_limit": [0.0, float("inf")],
        "time_step_min": 1e-9,  # transformers raises steps to it, which Megatron does not
        "use_bias": False,
        "use_cache": True,
        "use_conv_bias": True,
        "vocab_size": args.vocab_size,
        **(_experts(args) if MOE in _pattern(args) else {}),
    }


def _experts(args: ModelArgs) -> dict[str, Any]:
    scale = args.get("moe_router_topk_scaling_factor")
    return {
        "moe_intermediate_size": expert_width(args),
        "moe_latent_size": args.get("moe_latent_size"),
        "moe_shared_expert_intermediate_size": args.need("moe_shared_expert_intermediate_size"),
        "n_group": args.get("moe_router_num_groups") or 1,
        "n_routed_experts": args.need("num_experts"),
        "n_shared_experts": 1,
        "norm_topk_prob": args.need("moe_router_topk") > 1,
        "num_experts_per_tok": args.need("moe_router_topk"),
        "routed_scaling_factor": 1.0 if scale is None else scale,
        "topk_group": args.get("moe_router_group_topk") or 1,
    }


NEMOTRON_H = Family(
    name="nemotron_h",
    architecture="NemotronHForCausalLM",
    table=_TABLE,
    takes=TAKES
    | {
        "add_qkv_bias": False,
        "hybrid_layer_pattern": ANYTHING,
        "hybrid_override_pattern": ANYTHING,
        "is_hybrid_model": True,
        "moe_latent_size": ANYTHING,
        "num_experts": ANYTHING,
        "position_embedding_type": "none",
        "qk_layernorm": False,
        "rotary_percent": ANYTHING,
        "squared_relu": True,
        "swiglu": False,
    },
    config=_config,
    kinds=_kinds,
    refuses=_refuses,
)
