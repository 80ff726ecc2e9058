"""What tests use inside rank processes; imports megatron-core."""

from __future__ import annotations

from typing import Any

import torch

from examples.cpu_ranks.checkpoint import checkpoint_path, load_checkpoint, save_checkpoint
from examples.cpu_ranks.training import Training, build, evaluate, mock_data, train

__all__ = [
    "Training",
    "build",
    "checkpoint_path",
    "differences",
    "evaluate",
    "load_checkpoint",
    "main_params",
    "mock_data",
    "model_state",
    "save_checkpoint",
    "snapshot",
    "sub_optimizers",
    "train",
]


def sub_optimizers(training: Training) -> list[Any]:
    """The optimizers inside a ChainedOptimizer (dense, experts), or the one there is."""
    return list(getattr(training.optimizer, "chained_optimizers", [training.optimizer]))


def model_state(training: Training) -> dict[str, torch.Tensor]:
    """This rank's shard of every model parameter and buffer, copied."""
    module = training.model[0].module
    named = [*module.named_parameters(), *module.named_buffers()]
    return {name.removeprefix("module."): tensor.detach().clone() for name, tensor in named}


def main_params(training: Training) -> list[torch.Tensor]:
    """This rank's fp32 main params (1/DP shards with the distributed optimizer), not copied."""
    groups = [group for sub in sub_optimizers(training) for group in sub.optimizer.param_groups]
    return [param for group in groups for param in group["params"]]


def snapshot(training: Training) -> dict[str, Any]:
    """Everything of this rank that training changes, copied: compare with ``differences``."""
    state: dict[str, Any] = {f"model.{k}": v for k, v in model_state(training).items()}
    for i, sub in enumerate(sub_optimizers(training)):
        for j, group in enumerate(sub.optimizer.param_groups):
            hyper = {key: value for key, value in group.items() if key != "params"}
            state[f"optimizer.{i}.{j}"] = hyper
            for k, param in enumerate(group["params"]):
                prefix = f"optimizer.{i}.{j}.{k}"
                state[f"{prefix}.main"] = param.detach().clone()
                moments = sub.optimizer.state[param].items()
                state |= {f"{prefix}.{name}": tensor.clone() for name, tensor in moments}
    state["scheduler"] = training.scheduler.state_dict()
    state["iteration"] = training.iteration
    return state


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names whose values are not the same to the last bit."""
    return [
        name
        for name in sorted(one.keys() | other.keys())
        if name not in one or name not in other or not _same(one[name], other[name])
    ]


def _same(one: Any, other: Any) -> bool:
    if not isinstance(one, torch.Tensor):
        return bool(one == other)
    same_kind = one.dtype == other.dtype and one.shape == other.shape
    return same_kind and torch.equal(_bits(one), _bits(other))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """So that NaN equals itself and -0.0 differs from 0.0."""
    return tensor.contiguous().view(-1).view(torch.uint8)
