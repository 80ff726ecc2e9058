"""What rank processes do: build a model of megatron-core in float32, save it, run it."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.activations import squared_relu
from megatron.core.fusions.fused_bias_geglu import quick_gelu
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_mtp_block_spec,
)
from megatron.core.transformer import TransformerConfig, multi_latent_attention
from megatron.core.transformer.transformer_config import MLATransformerConfig

import examples.cpu_ranks.training  # noqa: F401  what 0.16 lacks without Transformer Engine
from tests.export import hybrid


class _NotInstalled:
    """No module is one of Transformer Engine's, which 0.16 asks of a None."""


for _name in ("TELinear", "TEColumnParallelLinear"):
    if not isinstance(getattr(multi_latent_attention, _name), type):
        setattr(multi_latent_attention, _name, _NotInstalled)


def save_all(root: Path, models: dict[str, dict[str, Any]], tokens: torch.Tensor) -> dict[str, Any]:
    """Save every model with random weights; its logits, (batch, length, padded vocabulary)."""
    logits = {}
    for name, args in models.items():
        model = build(args)
        randomize(model)
        save(model, args, root / name / "iter_0000001")
        logits[name] = forward(model, tokens)
    return logits


def reshard_all(root: Path, again: Path, models: dict[str, dict[str, Any]]) -> None:
    """Load what :func:`save_all` saved into ranks that share models out, and save it from there."""
    for name, args in models.items():
        model = build(args)
        source = str(root / name.partition("/")[0] / "iter_0000001")
        wanted = {"model": sharded(model)}
        state = dist_checkpointing.load(wanted, source)
        model.load_state_dict(state["model"])
        save(model, args, again / name / "iter_0000001")


METADATA = {"singleton_local_shards": False}


def build(args: dict[str, Any]) -> GPTModel:
    """As Megatron-LM's ``gpt_builder`` builds a model of these args, of local layers."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=args.get("tensor_model_parallel_size", 1),
        pipeline_model_parallel_size=args.get("pipeline_model_parallel_size", 1),
        expert_model_parallel_size=args.get("expert_model_parallel_size", 1),
    )
    torch.manual_seed(7)
    tensor_parallel.model_parallel_cuda_manual_seed(7)
    config = transformer_config(args)
    if args.get("is_hybrid_model"):
        return hybrid.build(config, args)
    for name, value in args.items():
        if name.startswith("yarn_"):
            setattr(config, name, value)  # GPTModel looks for them there
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm")
    if config.multi_latent_attention:
        for layer in spec.layer_specs:
            layer.submodules.self_attention.submodules.core_attention = LatentAttention
    mtp = None
    if config.mtp_num_layers:
        mtp = get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False)
    return GPTModel(
        config,
        spec,
        vocab_size=args["padded_vocab_size"],
        max_sequence_length=args["max_position_embeddings"],
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        parallel_output=False,
        share_embeddings_and_output_weights=not args["untie_embeddings_and_output_weights"],
        position_embedding_type=args["position_embedding_type"],
        rotary_percent=args["rotary_percent"],
        rotary_base=args["rotary_base"],
        rope_scaling=args.get("use_rope_scaling", False),
        rope_scaling_factor=args.get("rope_scaling_factor", 8.0),
        mtp_block_spec=mtp,
    ).eval()


class LatentAttention(torch.nn.Module):
    """Stands in for Transformer Engine's attention: megatron-core's own takes no values that are
    narrower than queries and keys. It has no weights."""

    def __init__(self, *args: Any, softmax_scale: float, **kwargs: Any):
        super().__init__()
        self.scale = softmax_scale

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.scale
        )
        return out.permute(2, 0, 1, 3).flatten(2)


def transformer_config(args: dict[str, Any]) -> TransformerConfig:
    """As Megatron-LM's ``core_transformer_config_from_args``."""
    kind = MLATransformerConfig if args.get("multi_latent_attention") else TransformerConfig
    known = {field.name for field in fields(kind)}
    values = {name: value for name, value in args.items() if name in known}
    return kind(
        **values
        | {
            "layernorm_epsilon": args["norm_epsilon"],
            "num_moe_experts": args["num_experts"],
            "num_query_groups": args["num_query_groups"] if args["group_query_attention"] else None,
            "gated_linear_unit": not args.get("squared_relu"),
            "activation_func": _activation(args),
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            "use_cpu_initialization": True,
            "masked_softmax_fusion": False,
            "persist_layer_norm": False,
            "gradient_accumulation_fusion": False,
            "bias_activation_fusion": False,
            "params_dtype": torch.float32,
            "pipeline_dtype": torch.float32,
            **(
                {"rotary_percent": args["rotary_percent"], "rotary_base": args["rotary_base"]}
                if kind is MLATransformerConfig
                else {}
            ),
        }
    )


def _activation(args: dict[str, Any]) -> Any:
    if args.get("squared_relu"):
        return squared_relu
    return torch.nn.functional.silu if args["swiglu"] else quick_gelu


def randomize(model: GPTModel) -> None:
    """Give every parameter, norms and biases too, values that none shares with another."""
    generator = torch.Generator().manual_seed(11)
    buffers = [(n, b) for n, b in model.named_buffers() if n.endswith("expert_bias")]
    for name, tensor in (*model.named_parameters(), *buffers):
        with torch.no_grad():
            noise = torch.randn(tensor.shape, generator=generator)
            norm = "norm" in name and name.endswith("weight")
            tensor.copy_(1 + 0.2 * noise if norm else 0.3 * noise)


def save(model: GPTModel, args: dict[str, Any], folder: Path) -> None:
    """A ``torch_dist`` checkpoint of the weights alone."""
    if dist.get_rank() == 0:
        folder.mkdir(parents=True)
    dist.barrier()
    state = {
        "args": Namespace(**args),
        "iteration": 1,
        "checkpoint_version": 3.0,
        "model": sharded(model),
    }
    dist_checkpointing.save(state, str(folder), content_metadata=METADATA)
    dist.barrier()


def sharded(model: GPTModel) -> dict[str, Any]:
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return model.sharded_state_dict(metadata=METADATA | {"dp_cp_group": group})


def forward(model: GPTModel, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of the next token, (batch, length, padded vocabulary), in float32."""
    length = tokens.shape[1]
    future = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
    positions = torch.arange(length).expand_as(tokens)
    model.mtp_process, model.config.mtp_num_layers = False, None  # it would ask for labels
    with torch.no_grad():
        return model(tokens, positions, attention_mask=future).float().clone()
