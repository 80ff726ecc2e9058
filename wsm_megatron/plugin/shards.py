"""What one rank owns of a model in training.

Main params, and on request moments, of each optimizer (``optimizers.py``): of what every
data-parallel rank holds whole, each owns a 1/DP slice, and after a merge the slices meet by
all-gather. Persistent floating-point buffers (``expert_bias``) are in no optimizer; each rank owns
its copy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from wsm_megatron.plugin.optimizers import MainParam, Part, parts
from wsm_megatron.plugin.values import Plain, Value

EXPECTED = ("exp_avg", "exp_avg_sq")
"""Moments of an optimizer that has none yet: Adam's, the largest there are."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Shard:
    """The elements ``[start, stop)`` of one live value that this rank owns."""

    name: str
    """Parameter or buffer name, prefixed by its kind: ``main.``, ``exp_avg.``, ``buffer.`` …"""
    value: Value
    """Of this rank, whole."""
    device: torch.device
    numel: int
    start: int
    stop: int
    offset: int = 0
    """Where the value begins inside the rank's parameter (DistributedOptimizer)."""
    group: dist.ProcessGroup | None = None
    """The ranks whose slices make up the live tensor, or None where this rank owns all of it."""
    is_buffer: bool = False

    @property
    def size(self) -> int:
        return self.stop - self.start

    def owned(self) -> torch.Tensor:
        """The owned elements, flat."""
        return self.value.read()[self.start : self.stop]

    def write(self, merged: torch.Tensor) -> bool:
        """Put the owned elements in place; whether no finite one became an infinite weight."""
        return self.value.write(merged, self.start)

    def describe(self) -> list[Any]:
        """What must be equal for kept bytes to fit this shard again."""
        return [self.name, self.numel, self.start, self.stop, self.offset]


def collect(chunks: Sequence[torch.nn.Module], optimizer: Any, *, moments: bool) -> list[Shard]:
    """Every shard that this rank owns, in an order that all ranks of a group share.

    Args:
        chunks: the model chunks of this rank, wrapped in Megatron's DDP or not.
        optimizer: a Megatron optimizer over them.
        moments: own the moments as well; before there are any, those of Adam are expected.

    Raises ``UsageError`` naming an optimizer class or option that is not supported.
    """
    names = _parameter_names(chunks)
    shards: list[Shard] = []
    for part in parts(optimizer):
        for main in part.main_params():
            shards += _shards_of(part, main, names[main.param], chunks, moments)
    return shards + list(_buffers(chunks))


def lacks_state(optimizer: Any) -> bool:
    """Whether moments of some main params are not there yet."""
    mains = (main for part in parts(optimizer) for main in part.main_params())
    return not all(main.has_state for main in mains)


def unlike_weights(chunks: Sequence[torch.nn.Module], optimizer: Any) -> list[str]:
    """Parameters whose main params on this rank are not those of the model weights.

    They are after every step. Main params that differ come of a checkpoint that was saved
    wrongly, and the next step makes them the weights.
    """
    names = _parameter_names(chunks)
    mains = (main for part in parts(optimizer) for main in part.main_params())
    return [names[main.param] for main in mains if main.is_of_other_weights()]


def _shards_of(
    part: Part,
    main: MainParam,
    name: str,
    chunks: Sequence[torch.nn.Module],
    moments: bool,
) -> list[Shard]:
    numel, group = main.stepped.numel(), None
    start, stop = 0, numel
    if part.replicated:
        group = data_parallel_group(main.param, chunks)
        start, stop = slice_bounds(numel, group)
    kinds = {"main": main.value}
    if moments:
        kinds |= main.moments() if main.has_state else {key: main.moment(key) for key in EXPECTED}
    return [
        Shard(
            name=f"{kind}.{name}",
            value=value,
            device=main.stepped.device,
            numel=numel,
            start=start,
            stop=stop,
            offset=main.offset,
            group=group,
        )
        for kind, value in kinds.items()
    ]


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
                    value=Plain(partial(getattr, module, name)),
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
