"""The mean of the main params and buffers over the steps between two snapshots."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from wsm_megatron.plugin.collectives import is_first_rank
from wsm_megatron.plugin.config import WSMConfig
from wsm_megatron.plugin.copying import ShardCopier
from wsm_megatron.plugin.shards import Shard
from wsm_megatron.schedule.block_means import Block

logger = logging.getLogger(__name__)

_TILE = 1 << 20  # elements that are float64 at a time, besides the sums


def is_averaged(shard: Shard) -> bool:
    """Whether a merge takes a shard's mean over its block. Main params and buffers, such as
    ``expert_bias``: what a checkpoint of every step would have given the merge. Moments are of one
    step, whatever is done with them."""
    return shard.name.startswith(("main.", "buffer."))


class BlockSum:
    """The sum over a block so far, in float64. Its callers take turns; see :class:`BlockMean`.

    A sum of n float32 values is off by at most (n - 1) 2^-53 of the sum of their magnitudes, and
    the mean is rounded to float32 once, after the division.

    Args:
        every: K, steps between two points.
        numel: of all averaged shards of this rank, end to end.
    """

    def __init__(self, every: int, numel: int) -> None:
        self._every = every
        self._sum = torch.zeros(numel, dtype=torch.float64)
        self.clear()

    def clear(self) -> None:
        """Begin a block."""
        self._first: int | None = None
        self._newest: int | None = None
        self._points = 0
        self._error: Exception | None = None

    def fail(self, error: Exception) -> None:
        """A point is missing: the block has no mean."""
        self._error = self._error or error

    def add(self, iteration: int, parts: Sequence[torch.Tensor]) -> None:
        """Take in a point: flat float32 tensors, which end to end are the averaged shards."""
        start = 0
        for part in parts:
            into = self._sum[start : start + part.numel()]
            into.copy_(part) if self._first is None else into.add_(part)
            start += part.numel()
        self._first = iteration if self._first is None else self._first
        self._newest = iteration
        self._points += 1

    def finish(self, iteration: int, parts: Sequence[torch.Tensor], mean: torch.Tensor) -> Block:
        """Take in the last point, if it is not there yet, and write the mean of the block, float32;
        the next one begins.

        Raises the error of a point that is missing.
        """
        try:
            if self._error is not None:
                raise self._error
            if self._newest != iteration:
                self.add(iteration, parts)
            for start in range(0, mean.numel(), _TILE):
                tile = slice(start, start + _TILE)
                mean[tile].copy_(self._sum[tile] / self._points)
            assert self._first is not None
            return Block(every=self._every, first=self._first, last=iteration, points=self._points)
        finally:
            self.clear()


class BlockMean:
    """Copies live shards after every K-th step to the host, and adds them up in the worker thread.

    One copy is under way at a time: a step whose predecessor is not added yet waits for it.

    Args:
        every: K.
        shards: the averaged ones.
        worker: one thread, the same that finishes the snapshots.

    Attributes:
        sum: for the worker thread alone.
    """

    def __init__(self, every: int, shards: Sequence[Shard], worker: ThreadPoolExecutor) -> None:
        self._numel = sum(shard.size for shard in shards)
        self.sum = BlockSum(every, self._numel)
        self._copier, self._worker = ShardCopier(shards), worker
        self._newest = -1
        self._flat: torch.Tensor | None = None
        self._adding: Future[None] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of host memory: the sum in float64, and a copy under way."""
        return (8 + 4) * self._numel

    def guard(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Let the steps of these optimizers wait, on the device, for a copy under way."""
        self._copier.guard(optimizers)

    def ends_at(self, iteration: int) -> None:
        """A snapshot takes this iteration's shards in."""
        self._newest = max(self._newest, iteration)

    def add_step(self, iteration: int) -> None:
        """Start taking in the live shards, if they are newer than what was taken in."""
        if iteration <= self._newest:
            return
        self._newest = iteration
        self.wait()
        try:
            if self._flat is None:
                self._flat = self._copier.allocate(self._numel)
            copied = self._copier.start(self._flat)
        except Exception as error:  # raised by the snapshot that ends the block
            self._worker.submit(self.sum.fail, error)
            return
        self._adding = self._worker.submit(self._add, iteration, self._flat, copied)

    def _add(self, iteration: int, flat: torch.Tensor, copied: Any) -> None:
        try:
            copied.synchronize()
            self.sum.add(iteration, [flat])
        except Exception as error:  # raised by the snapshot that ends the block
            self.sum.fail(error)

    def wait(self) -> None:
        """Until no copy is under way."""
        if self._adding is not None:
            self._adding.result()
            self._adding = None

    def close(self) -> None:
        self._copier.close()


def warn_of_lost_points(
    kept: Sequence[int], blocks: Sequence[Block | None], start: int, config: WSMConfig
) -> None:
    """After a restart at iteration ``start``: the first rank names the blocks of which points are
    lost.

    Args:
        kept: iterations in the window. blocks: what the mean of each is over, if it has one.
    """
    if not is_first_rank():
        return
    first = max(config.start_iter, config.points_every or 0)  # the first point of the run
    single = [
        iteration
        for iteration, block in zip(kept, blocks, strict=True)
        if iteration > first and (block is None or block.points == 1)
    ]
    if single:
        logger.warning(
            "wsm: of iterations %s the snapshots are merged, and not the means of their blocks: "
            "those ended with the job that had them, as ordinary checkpoints hold none "
            "(--wsm-merge-store disk keeps them for a restart in the same layout)",
            single,
        )
    if start > first and start not in kept:
        logger.warning(
            "wsm: this run was started from iteration %d, of which the window has no snapshot: the "
            "first block mean is over the steps from there on",
            start,
        )
