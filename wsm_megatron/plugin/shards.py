"""What one rank owns of a model in training; the only place that knows optimizer classes.

Each trainable element has one fp32 main param somewhere, and one rank that keeps it:

- ``DistributedOptimizer``: the main params already are flat 1/DP shards; the rank owns them whole.
- ``Float16OptimizerWithFloat16Params`` and ``FP32Optimizer``: every data-parallel rank holds them
  whole; each owns a 1/DP slice, and after a merge the slices meet by all-gather.
- ``ChainedOptimizer`` (dense and experts): its parts one by one, experts over their own DP group.

Persistent floating-point buffers (``expert_bias``) are in no optimizer; each rank owns its copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from wsm_megatron.errors import UsageError

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True, eq=False)
class Shard:
    """The elements ``[start, stop)`` of one live tensor that this rank owns."""

    name: str
    """Parameter or buffer name, prefixed by its kind: ``main.``, ``exp_avg.``, ``buffer.`` …"""
    live: Callable[[], torch.Tensor]
    """The live local tensor, looked up when used: a load may replace moments and buffers."""
    device: torch.device
    numel: int
    start: int
    stop: int
    offset: int = 0
    """Where the live tensor begins inside the rank's parameter (DistributedOptimizer)."""
    group: dist.ProcessGroup | None = None
    """The ranks whose slices make up the live tensor, or None where this rank owns all of it."""
    is_buffer: bool = False

    @property
    def size(self) -> int:
        return self.stop - self.start

    def owned(self) -> torch.Tensor:
        """Flat view of the owned elements."""
        return self.live().detach().view(-1)[self.start : self.stop]

    def describe(self) -> list[Any]:
        """What must be equal for kept bytes to fit this shard again."""
        return [self.name, self.numel, self.start, self.stop, self.offset]


def collect(chunks: Sequence[torch.nn.Module], optimizer: Any, *, moments: bool) -> list[Shard]:
    """Every shard that this rank owns, in an order that all ranks of a group share.

    Args:
        chunks: the model chunks of this rank, wrapped in Megatron's DDP or not.
        optimizer: a Megatron optimizer over them.
        moments: own ``exp_avg`` and ``exp_avg_sq`` as well.

    Raises ``UsageError`` naming an optimizer class or option that is not supported.
    """
    names = _parameter_names(chunks)
    shards: list[Shard] = []
    for part in parts(optimizer):
        for param, main in main_params(part):
            shards += _shards_of(part, param, main, names[param], chunks, moments)
    return shards + list(_buffers(chunks))


def parts(optimizer: Any) -> list[Any]:
    """The optimizers that hold main params: a chain's links, without the empty ones."""
    from megatron.core.optimizer.optimizer import ChainedOptimizer

    if type(optimizer) is ChainedOptimizer:
        return [part for link in optimizer.chained_optimizers for part in parts(link)]
    if getattr(optimizer, "is_stub_optimizer", False):
        return []
    _check_supported(optimizer)
    return [optimizer]


def is_distributed(part: Any) -> bool:
    """Whether a part is Megatron's ``DistributedOptimizer``."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    return isinstance(part, DistributedOptimizer)


def main_params(part: Any) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
    """(model param, fp32 main param) pairs of one optimizer; natively fp32 params are their own."""
    if is_distributed(part):
        yield from _pairs(part.model_float16_groups, part.shard_fp32_from_float16_groups)
        yield from _pairs(part.model_fp32_groups, part.shard_fp32_groups)
    elif hasattr(part, "fp32_from_float16_groups"):
        yield from _pairs(part.float16_groups, part.fp32_from_float16_groups)
        yield from _pairs(part.fp32_from_fp32_groups, part.fp32_from_fp32_groups)
    else:
        for group in part.optimizer.param_groups:
            yield from ((p, p) for p in group["params"])


def _pairs(params: Any, mains: Any) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
    for param_group, main_group in zip(params, mains, strict=True):
        yield from zip(param_group, main_group, strict=True)


def unlike_weights(chunks: Sequence[torch.nn.Module], optimizer: Any) -> list[str]:
    """Parameters whose main params on this rank, rounded, are not the model weights.

    They are equal after every step. Main params that differ come of a checkpoint that was saved
    wrongly, and the next step makes them the weights.
    """
    names = _parameter_names(chunks)
    return [
        names[param]
        for part in parts(optimizer)
        for param, main in main_params(part)
        if not torch.equal(
            main.detach().view(-1).to(param.dtype),
            param.detach().view(-1).narrow(0, _offset(part, param), main.numel()),
        )
    ]


def _offset(part: Any, param: torch.nn.Parameter) -> int:
    """Where the part's main param begins in the flat ``param``."""
    return part._get_model_param_range_map(param)["param"].start if is_distributed(part) else 0


def _shards_of(
    part: Any,
    param: torch.nn.Parameter,
    main: torch.Tensor,
    name: str,
    chunks: Sequence[torch.nn.Module],
    moments: bool,
) -> list[Shard]:
    numel, offset, group = main.numel(), _offset(part, param), None
    start, stop = 0, numel
    if not is_distributed(part):
        group = data_parallel_group(param, chunks)
        start, stop = slice_bounds(numel, group)
    kinds: list[tuple[str, Callable[[], torch.Tensor]]] = [("main", lambda: main)]
    if moments:
        kinds += [(key, partial(_moment, part, main, key)) for key in MOMENTS]
    return [
        Shard(
            name=f"{kind}.{name}",
            live=live,
            device=main.device,
            numel=numel,
            start=start,
            stop=stop,
            offset=offset,
            group=group,
        )
        for kind, live in kinds
    ]


def _moment(part: Any, main: torch.Tensor, key: str) -> torch.Tensor:
    return part.optimizer.state[main][key]


def slice_bounds(numel: int, group: dist.ProcessGroup | None) -> tuple[int, int]:
    """The elements of a replicated tensor that this rank of ``group`` owns; equal parts, the last
    ones shorter or empty."""
    part = slice_length(numel, group)
    rank = dist.get_rank(group) if group is not None else 0
    return min(rank * part, numel), min((rank + 1) * part, numel)


def slice_length(numel: int, group: dist.ProcessGroup | None) -> int:
    """``ceil(numel / size of group)``."""
    return -(-numel // (dist.get_world_size(group) if group is not None else 1))


def data_parallel_group(
    param: torch.nn.Parameter, chunks: Sequence[torch.nn.Module]
) -> dist.ProcessGroup | None:
    """The ranks that hold the same copy of ``param`` (DP x CP; experts: their own), or None for one
    rank alone. Megatron marks experts' params with ``allreduce = False``."""
    name = "dp_cp_group" if getattr(param, "allreduce", True) else "expt_dp_group"
    group = getattr(chunks[0], name, None)
    if group is None:
        group = _group_of_parallel_state(name)
    return group if group is not None and dist.get_world_size(group) > 1 else None


def _group_of_parallel_state(name: str) -> dist.ProcessGroup | None:
    from megatron.core import parallel_state

    if not parallel_state.is_initialized():
        return None
    if name == "dp_cp_group":
        return parallel_state.get_data_parallel_group(with_context_parallel=True)
    return parallel_state.get_expert_data_parallel_group()


def _parameter_names(chunks: Sequence[torch.nn.Module]) -> dict[torch.nn.Parameter, str]:
    return {
        param: _prefixed(name, number, chunks)
        for number, chunk in enumerate(chunks)
        for name, param in chunk.named_parameters()
    }


def _buffers(chunks: Sequence[torch.nn.Module]) -> Iterator[Shard]:
    for number, chunk in enumerate(chunks):
        for path, module in chunk.named_modules():
            for name, buffer in module.named_buffers(recurse=False):
                if name in module._non_persistent_buffers_set or not buffer.is_floating_point():
                    continue
                yield Shard(
                    name="buffer." + _prefixed(f"{path}.{name}", number, chunks),
                    live=partial(getattr, module, name),
                    device=buffer.device,
                    numel=buffer.numel(),
                    start=0,
                    stop=buffer.numel(),
                    is_buffer=True,
                )


def _prefixed(name: str, number: int, chunks: Sequence[torch.nn.Module]) -> str:
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name if len(chunks) == 1 else f"model{number}.{name}"


def _check_supported(part: Any) -> None:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer

    if type(part) not in (DistributedOptimizer, Float16OptimizerWithFloat16Params, FP32Optimizer):
        raise UsageError(
            f"cannot merge in training with optimizer {type(part).__name__}: supported are "
            "DistributedOptimizer, Float16OptimizerWithFloat16Params and FP32Optimizer"
        )
    config, ddp = part.config, getattr(part, "ddp_config", None)
    for owner, name, what in (
        (config, "use_precision_aware_optimizer", "precision-aware optimizer"),
        (config, "optimizer_cpu_offload", "optimizer offload to the CPU"),
        (ddp, "use_megatron_fsdp", "Megatron FSDP"),
        (ddp, "fp8_param_gather", "FP8 model weights"),
        (ddp, "fp4_param_gather", "FP4 model weights"),
    ):
        if getattr(owner, name, False):
            raise UsageError(f"cannot merge in training with {what} ({name})")


def layout_of_rank() -> dict[str, int]:
    """Sizes of the parallel layout, and this rank's place in it."""
    from megatron.core import parallel_state as ps

    layout = {"world": 1, "rank": 0}
    if dist.is_initialized():
        layout = {"world": dist.get_world_size(), "rank": dist.get_rank()}
    if ps.is_initialized():
        layout |= {
            "tp": ps.get_tensor_model_parallel_world_size(),
            "pp": ps.get_pipeline_model_parallel_world_size(),
            "ep": ps.get_expert_model_parallel_world_size(),
            "dp": ps.get_data_parallel_world_size(with_context_parallel=True),
            "tp_rank": ps.get_tensor_model_parallel_rank(),
            "pp_rank": ps.get_pipeline_model_parallel_rank(),
            "ep_rank": ps.get_expert_model_parallel_rank(),
            "dp_rank": ps.get_data_parallel_rank(with_context_parallel=True),
        }
    return layout
