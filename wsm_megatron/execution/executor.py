"""One rank's stages: read, reduce and write tile by tile, on worker threads.

Each thread takes one stage (a chunk) at a time. Its reads, checksums, sums and writes release the
GIL, so that while one thread waits for storage another computes. A tile is small enough that the
bytes of all sources are still in the CPU's cache when they are summed.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Protocol

import torch

from wsm_megatron.checkpoint.region import Region
from wsm_megatron.checkpoint.region_reader import RegionReader, read_together
from wsm_megatron.execution.context import Context, finish
from wsm_megatron.execution.copier import Copier
from wsm_megatron.execution.device import Device
from wsm_megatron.execution.memory_budget import Budget
from wsm_megatron.execution.targets import ChunkSink
from wsm_megatron.execution.tiles import Memory, Tile, TileResult, Workspace
from wsm_megatron.execution.value_checks import check_variance, explain_nonfinite, wrong_main
from wsm_megatron.planning.tasks import Rule, Scope, Stage, Task
from wsm_megatron.process.worker_threads import run_workers

Sums = dict[int, torch.Tensor]
"""Float64 sums of a whole task, by merge."""


class Peers(Protocol):
    """The other ranks of stages that no rank does alone. Safe to share between threads."""

    def receive(self, stage: Stage, sums: Sequence[torch.Tensor], stop: threading.Event) -> None:
        """Fill the sums of the merges that arrive."""

    def send(self, stage: Stage, sums: Sequence[torch.Tensor], stop: threading.Event) -> None:
        """Hand on the sums of the merges that leave; returns when they may be changed again."""

    def digest(self, stage: Stage, j: int, main: torch.Tensor) -> None:
        """Take note of main params of source ``j``, which another rank compares with their model.

        Called in the order of a task's elements."""


class Executor:
    """Runs stages for several merges of the same sources: each source byte is read once.

    Args:
        peers: needed where a stage is not a rank's alone.
    """

    def __init__(
        self, context: Context, budget: Budget, device: Device, peers: Peers | None = None
    ):
        self._context = context = context.for_workers(budget.threads)
        self._phases, self._budget, self._device = context.phases, budget, device
        self._peers, self._stop = peers, threading.Event()
        self._copier = Copier(context, self._stop)

    def run(self, stages: Sequence[Stage], check: Callable[[], None]) -> None:
        """Run all stages; the first failure, also of ``check``, stops the others and is raised.

        What an earlier merge has finished of a stage that is this rank's alone is left out.
        """
        local, context = threading.local(), self._context

        def work(stage: Stage) -> None:
            if not hasattr(local, "workspace"):
                local.workspace, local.sums = self._device.workspace(context.merges), Memory()
            self._run(stage, local.workspace, local.sums)

        run_workers(stages, work, self._budget.threads, self._stop, check)

    def _run(self, stage: Stage, workspace: Workspace, sums: Memory) -> None:
        if self._stop.is_set():
            return
        task, scope = stage.task, stage.scope
        if task.recipe.rule is Rule.COPY:
            elements = self._budget.tile_elements(task.recipe, scope)
            for j in scope.sources:
                self._copier.copy(task, j, workspace, elements)
        elif scope.alone and self._is_finished(stage):
            self._context.pass_over(stage)
        else:
            self._exchange_and_sum(stage, workspace, _rows(stage, sums))

    def _is_finished(self, stage: Stage) -> bool:
        targets = self._context.targets
        with self._phases("resuming"):
            ending = stage.scope.ending
            return bool(ending) and all(targets[k].has(stage.task) for k in ending)

    def _exchange_and_sum(self, stage: Stage, workspace: Workspace, sums: Sums) -> None:
        scope = stage.scope
        if scope.arriving:
            assert self._peers is not None
            with self._phases("waiting"):
                self._peers.receive(stage, [sums[k] for k in scope.arriving], self._stop)
        if not self._stop.is_set():  # that took long enough for files to be closed
            self._sum(stage, workspace, sums)
        if scope.leaving and not self._stop.is_set():
            assert self._peers is not None
            with self._phases("waiting"):
                self._peers.send(stage, [sums[k] for k in scope.leaving], self._stop)

    def _sum(self, stage: Stage, workspace: Workspace, sums: Sums) -> None:
        task, scope, context = stage.task, stage.scope, self._context
        recipe = task.recipe
        with self._phases("reading"):
            region_readers = [
                context.region_readers(task, j, scope.inputs(recipe, j)) for j in scope.sources
            ]
        writers = [context.targets[k].chunks(task) for k in scope.ending]
        cost = scope.bytes_read(recipe) + scope.bytes_written(recipe)
        started: deque[tuple[Tile, Region, slice]] = deque()

        def write_oldest() -> None:
            tile, region, part = started.popleft()
            with self._phases("reducing"):
                self._check(stage, tile, tile.finish())
                if context.observer is not None:
                    context.observer.take(stage, tile, region)
            with self._phases("writing"):
                _write(writers, tile, region)
            for k, buffer in zip(scope.leaving, tile.leaving, strict=True):
                sums[k][part].copy_(buffer.elements)

        done = 0
        for region in task.region.split(self._budget.tile_elements(recipe, scope)):
            if self._stop.is_set():
                return
            tile, part = (
                workspace.tile(recipe, scope, region.numel),
                slice(done, done + region.numel),
            )
            with self._phases("reading"):
                _read(task, region_readers, region, tile)
            with self._phases("reducing"):
                for k, buffer in zip(scope.arriving, tile.arrived, strict=True):
                    buffer.elements.copy_(sums[k][part])
                tile.start()
            started.append((tile, region, part))
            if len(started) == workspace.depth:
                write_oldest()
            done += region.numel
            context.progress(region.numel * cost)
        while started:
            write_oldest()
        with self._phases("writing"):
            finish(chain.from_iterable(region_readers), chain.from_iterable(writers))

    def _check(self, stage: Stage, tile: Tile, outcome: TileResult) -> None:
        task, scope = stage.task, stage.scope
        if (i := outcome.wrong_main) is not None:
            layout = self._context.readers[scope.sources[i]].layout
            raise wrong_main(task, layout, tile.sources[i][0].elements)
        for j, (main, *_) in zip(scope.sources, tile.sources, strict=True):
            if j in scope.unchecked:
                assert self._peers is not None
                self._peers.digest(stage, j, main.elements)
        for k, output in outcome.nonfinite if not self._context.allow_nonfinite else ():
            source_indices, readers = self._context.merges[k].source_indices, self._context.readers
            pairs = zip(scope.sources, tile.sources, strict=True)
            read = [(readers[j].layout, buffers) for j, buffers in pairs if j in source_indices]
            explain_nonfinite(task, read, task.recipe.outputs[output])
        for outputs in tile.outputs:
            check_variance(task, outputs[0].elements)


def _rows(stage: Stage, memory: Memory) -> Sums:
    """Room for the sums of a whole task that come or go."""
    scope: Scope = stage.scope
    moving = sorted({*scope.arriving, *scope.leaving})
    if not moving:
        return {}
    (rows,) = memory.buffers([[torch.float64] * len(moving)], stage.task.region.numel)
    return {k: row.elements for k, row in zip(moving, rows, strict=True)}


def _read(task: Task, region_readers: list[list[RegionReader]], region: Region, tile: Tile) -> None:
    regions = [task.part(key, region) for key in task.recipe.inputs]
    read_together(
        [
            (region_reader, part, buffer)
            for inputs, buffers in zip(region_readers, tile.sources, strict=True)
            for region_reader, part, buffer in zip(inputs, regions, buffers, strict=False)
        ]
    )


def _write(writers: Sequence[Sequence[ChunkSink]], tile: Tile, region: Region) -> None:
    for outputs, buffers in zip(writers, tile.outputs, strict=True):
        for writer, buffer in zip(outputs, buffers, strict=True):
            writer.append(buffer, region)
