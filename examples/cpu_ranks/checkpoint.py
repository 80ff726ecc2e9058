"""Save and load as Megatron-LM's ``save_checkpoint`` and ``load_checkpoint`` do (``torch_dist``).

The state dict has the keys of its ``generate_state_dict``; the root gets ``iter_XXXXXXX/`` and
``latest_checkpointed_iteration.txt``.
"""

from __future__ import annotations

import random
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.module import Float16Module

from examples.cpu_ranks.config import GPTConfig
from examples.cpu_ranks.training import Training

TRACKER = "latest_checkpointed_iteration.txt"


def checkpoint_path(root: str | Path, iteration: int) -> Path:
    return Path(root) / f"iter_{iteration:07d}"


def save_checkpoint(
    training: Training, root: str | Path, *, save_optim: bool = True, save_rng: bool = True
) -> Path:
    """Write ``root/iter_XXXXXXX`` and the tracker; all ranks call it. Returns the folder.

    ``save_optim=False`` and ``save_rng=False`` are ``--no-save-optim`` and ``--no-save-rng``.
    """
    folder = checkpoint_path(root, training.iteration)
    if dist.get_rank() == 0:
        folder.mkdir(parents=True)
    args = _args(training, save_optim=save_optim, save_rng=save_rng)
    metadata = _content_metadata(training.config)
    state = _state_dict(training, args, metadata)
    state["num_floating_point_operations_so_far"] = 0.0
    dist.barrier()
    strategy = FullyParallelSaveStrategyWrapper(
        get_default_save_sharded_strategy("torch_dist"),
        parallel_state.get_data_parallel_group(with_context_parallel=True),
    )
    dist_checkpointing.save(
        state,
        str(folder),
        strategy,
        content_metadata={k: v for k, v in metadata.items() if k != "dp_cp_group"},
    )
    dist.barrier()
    if dist.get_rank() == 0:
        (Path(root) / TRACKER).write_text(str(training.iteration))
    dist.barrier()
    return folder


def load_checkpoint(
    training: Training,
    root: str | Path,
    iteration: int | None = None,
    *,
    load_optim: bool = True,
    load_rng: bool = True,
) -> dict[str, Any]:
    """Load ``root/iter_XXXXXXX`` (default: the tracker's) into ``training``; all ranks call it.

    ``load_optim=False`` is ``--no-load-optim``: main params are rebuilt from the model weights
    and the LR schedule starts anew. RNG states are ignored too when TP or PP differ. Returns the
    checkpoint's common state. Raises KeyError 'optimizer' when the checkpoint has no optimizer
    state and ``load_optim`` is left on, as Megatron-LM does.
    """
    if iteration is None:
        iteration = int((Path(root) / TRACKER).read_text())
    folder = str(checkpoint_path(root, iteration))
    common = dist_checkpointing.load_common_state_dict(folder)
    args = _args_to_load(training, common, load_optim, load_rng)
    metadata = dist_checkpointing.load_content_metadata(preloaded_state_dict=common) or {}
    metadata["dp_cp_group"] = parallel_state.get_data_parallel_group(with_context_parallel=True)
    wanted = _state_dict(training, args, metadata, is_loading=True)
    state = dist_checkpointing.load(wanted, folder, strict="assume_ok_unexpected")

    training.model[0].load_state_dict(state["model"])
    training.iteration = state["iteration"]
    if load_optim:
        training.optimizer.load_state_dict(state["optimizer"])
        training.scheduler.load_state_dict(state["opt_param_scheduler"])
    else:
        training.optimizer.reload_model_params()
    if not args.no_save_rng:
        _set_rng_state(state["rng_state"][0])
    dist.barrier()
    return common


def _args(training: Training, *, save_optim: bool, save_rng: bool) -> Namespace:
    """The part of Megatron-LM's argument namespace that readers of a checkpoint look at."""
    config = training.config
    return Namespace(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_experts=config.num_experts,
        seq_length=config.seq_length,
        max_position_embeddings=config.seq_length,
        vocab_size=config.vocab_size,
        padded_vocab_size=config.vocab_size,
        untie_embeddings_and_output_weights=not config.tied_embeddings,
        swiglu=True,
        normalization="RMSNorm",
        norm_epsilon=1e-5,
        position_embedding_type="rope",
        rotary_base=10000,
        tensor_model_parallel_size=config.tensor_parallel,
        pipeline_model_parallel_size=config.pipeline_parallel,
        expert_model_parallel_size=config.expert_parallel,
        context_parallel_size=1,
        data_parallel_size=parallel_state.get_data_parallel_world_size(),
        world_size=dist.get_world_size(),
        rank=0,  # so that the namespace is the same on every rank
        use_distributed_optimizer=config.distributed_optimizer,
        dist_ckpt_optim_fully_reshardable=config.sharding_type == "fully_reshardable",
        ckpt_format="torch_dist",
        micro_batch_size=config.micro_batch_size,
        global_batch_size=config.global_batch_size,
        lr=config.lr,
        min_lr=config.lowest_lr,
        lr_decay_style="WSD" if config.lr_wsd_decay_style else "constant",
        bf16=True,
        fp16=False,
        params_dtype=torch.bfloat16,
        attention_backend=AttnBackend.auto,
        iteration=0,  # stale, as in Megatron-LM: the iteration at which the run started
        consumed_train_samples=training.consumed_samples,
        skipped_train_samples=0,
        consumed_valid_samples=0,
        no_save_optim=None if save_optim else True,
        no_save_rng=None if save_rng else True,
    )


def _args_to_load(
    training: Training, common: dict[str, Any], load_optim: bool, load_rng: bool
) -> Namespace:
    """The flags that decide what is asked of the checkpoint."""
    saved, config = common["args"], training.config
    same_layout = (saved.tensor_model_parallel_size, saved.pipeline_model_parallel_size) == (
        config.tensor_parallel,
        config.pipeline_parallel,
    )
    return _args(
        training,
        save_optim=load_optim and not saved.no_save_optim,
        save_rng=load_rng and same_layout and not saved.no_save_rng,
    )


def _content_metadata(config: GPTConfig) -> dict[str, Any]:
    """``_build_sharded_state_dict_metadata`` of Megatron-LM."""
    metadata: dict[str, Any] = {}
    if config.distributed_optimizer:
        metadata["distrib_optim_sharding_type"] = config.sharding_type
        if config.sharding_type == "fully_reshardable":
            metadata["distrib_optim_fully_reshardable_mem_efficient"] = False
    return metadata | {
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def _state_dict(
    training: Training, args: Namespace, metadata: dict[str, Any], is_loading: bool = False
) -> dict[str, Any]:
    """``generate_state_dict`` of Megatron-LM, for one model chunk."""
    state: dict[str, Any] = {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": training.iteration,
        "model": _unwrap(training.model[0]).sharded_state_dict(metadata=metadata),
    }
    if not args.no_save_optim:
        state["optimizer"] = training.optimizer.sharded_state_dict(
            state, is_loading=is_loading, metadata=metadata
        )
        state["opt_param_scheduler"] = training.scheduler.state_dict()
    if not args.no_save_rng:
        state["rng_state"] = _rng_state()
    return state


def _unwrap(model: Any) -> Any:
    while hasattr(model, "module") or isinstance(model, Float16Module):
        model = model.module
    return model


def _rng_state() -> ShardedObject:
    """``get_rng_state`` of Megatron-LM: a shard for each (PP, TP), and DP too with experts."""
    state = {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": torch.cuda.get_rng_state(),
        "rng_tracker_states": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
    sizes = (
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_data_parallel_world_size(with_context_parallel=True),
    )
    ranks = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_data_parallel_rank(with_context_parallel=True),
    )
    if parallel_state.get_expert_model_parallel_world_size() > 1:
        return ShardedObject("rng_state", [state], sizes, ranks, replica_id=0)
    return ShardedObject("rng_state", [state], sizes[:2], ranks[:2], replica_id=ranks[2])


def _set_rng_state(state: dict[str, Any]) -> None:
    random.setstate(state["random_rng_state"])
    np.random.set_state(state["np_rng_state"])
    torch.set_rng_state(state["torch_rng_state"])
    torch.cuda.set_rng_state(state["cuda_rng_state"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["rng_tracker_states"])
