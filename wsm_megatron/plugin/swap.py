"""Merged weights in place of the trained ones, and the trained ones back bit for bit."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist

from wsm_megatron.errors import MergeError
from wsm_megatron.kernels import weighted_sum
from wsm_megatron.plugin.collectives import raise_together, together
from wsm_megatron.plugin.optimizers import update_weights
from wsm_megatron.plugin.shards import Shard, slice_length
from wsm_megatron.plugin.stash import Stash
from wsm_megatron.process.cores import usable_cores
from wsm_megatron.schedule.coefficients import MergeCoefficients

logger = logging.getLogger(__name__)

_TILE = 1 << 20  # elements that one thread sums at a time


class Sources(Protocol):
    """What is merged."""

    def source(self, iteration: int, index: int) -> torch.Tensor:
        """Of shard number ``index``: flat fp32, on the CPU, not to be changed."""


@contextmanager
def swapped(
    chunks: Sequence[torch.nn.Module],
    optimizer: Any,
    shards: Sequence[Shard],
    sources: Sources,
    merge: MergeCoefficients,
) -> Iterator[None]:
    """Put a merge into main params, buffers and model weights; undo it on exit.

    Every rank enters and leaves together. The sums go into the main params, Megatron's own copy and
    param all-gather bring them into the model weights; where the optimizer keeps the main params,
    this rank's share of the weights is written with them. What is overwritten is first copied to
    the host, and put back from there without any communication, also after an exception.

    Raises ``MergeError`` on every rank where one rank failed to merge, or left the block with an
    exception; the rank itself raises its own exception. Collective over all ranks.
    """
    drain_param_sync(chunks)
    stash = Stash()
    error: BaseException | None = None
    try:
        with together("the merge"):
            _merge_owned(stash, chunks, shards, sources, merge)
        with together("spreading the merged weights"):
            _spread(chunks, optimizer, shards)
        yield
    except BaseException as caught:
        error = caught
    stash.put_back()
    forget_cached_weights(chunks)
    raise_together(error, "work on the merged weights")


def swap_nbytes(chunks: Sequence[torch.nn.Module], shards: Sequence[Shard]) -> int:
    """Bytes of host memory that :func:`swapped` takes on this rank, beside the snapshots:
    a copy of all that it overwrites, and one merged shard."""
    weights = (p.numel() * p.element_size() for chunk in chunks for p in chunk.parameters())
    largest = max((shard.size for shard in shards), default=0)
    return sum(weights) + 4 * (sum(shard.numel for shard in shards) + largest)


def _merge_owned(
    stash: Stash,
    chunks: Sequence[torch.nn.Module],
    shards: Sequence[Shard],
    held: Sources,
    merge: MergeCoefficients,
) -> None:
    """Stash everything, then write this rank's sums into its own shards. No communication."""
    stash.fill(chunks, shards)
    with ThreadPoolExecutor(max_workers=_threads()) as threads:
        for index, shard in enumerate(shards):
            sources = [held.source(iteration, index) for iteration in merge.iterations]
            merged = torch.empty(shard.size, dtype=shard.value.dtype)
            if not _sum_tiles(threads, sources, merge.coefficients, merged):
                raise MergeError(f"the merge of {shard.name} overflows {merged.dtype}")
            if not shard.write(merged):
                raise MergeError(f"the merge of {shard.name} overflows the model's dtype")


def _sum_tiles(
    threads: ThreadPoolExecutor,
    sources: Sequence[torch.Tensor],
    coefficients: Sequence[float],
    merged: torch.Tensor,
) -> bool:
    """The exact weighted sum, tile by tile; whether all of it is finite."""

    def tile(start: int) -> bool:
        span = slice(start, start + _TILE)
        return weighted_sum([s[span] for s in sources], [list(coefficients)], [merged[span]])

    return all(threads.map(tile, range(0, merged.numel(), _TILE)))


def sum_seconds(nbytes: int, number: int) -> float:
    """How long this rank takes to sum ``number`` float32 sources of ``nbytes`` each, measured."""
    source = torch.ones(nbytes // 4)
    merged = torch.empty_like(source)
    with ThreadPoolExecutor(max_workers=_threads()) as threads:
        began = time.perf_counter()
        _sum_tiles(threads, [source] * number, [1 / number] * number, merged)
        return time.perf_counter() - began


def _threads() -> int:
    """This rank's part of the host's cores."""
    return max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _spread(chunks: Sequence[torch.nn.Module], optimizer: Any, shards: Sequence[Shard]) -> None:
    """Bring every rank's sums to all main params and model weights."""
    for shard in shards:
        if shard.group is not None:
            _gather(shard, shard.group)
    update_weights(chunks, optimizer)
    forget_cached_weights(chunks)


def _gather(shard: Shard, group: dist.ProcessGroup) -> None:
    """Replace a live tensor by the slices that the ranks of ``group`` own."""
    live = shard.value.read()
    part = slice_length(shard.numel, group)
    own = live.new_zeros(part)
    own[: shard.size] = shard.owned()
    whole = live.new_empty(part * dist.get_world_size(group))
    dist.all_gather_into_tensor(whole, own, group=group)
    live.copy_(whole[: shard.numel])


def drain_param_sync(chunks: Sequence[torch.nn.Module]) -> None:
    """Complete a param all-gather that overlaps with training, so that model weights are current.

    Megatron does the same before it evaluates or saves. Collective over the data-parallel groups.
    """
    for chunk in chunks:
        config = getattr(chunk, "ddp_config", None)
        if getattr(config, "overlap_param_gather", False):
            chunk.start_param_sync(force_sync=True)  # type: ignore[operator]


def forget_cached_weights(chunks: Sequence[torch.nn.Module]) -> None:
    """Make Transformer Engine quantise the weights anew: it caches FP8 weights for a step."""
    for chunk in chunks:
        for module in chunk.modules():
            if hasattr(module, "is_first_microbatch"):
                module.is_first_microbatch = True  # type: ignore[assignment]
