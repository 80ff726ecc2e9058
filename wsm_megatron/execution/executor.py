"""One rank's share of a merge: read, reduce and write tile by tile, on worker threads.

Each thread takes one task (a chunk) at a time. Its reads, checksums, sums and writes release the
GIL, so that while one thread waits for storage another computes. A tile is small enough that the
bytes of all sources are still in the CPU's cache when they are summed.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from itertools import chain

from wsm_megatron.checkpoint.region import Box
from wsm_megatron.checkpoint.region_reader import Cover, read_together
from wsm_megatron.checkpoint.writer import ChunkWriter
from wsm_megatron.execution.context import Context, finish
from wsm_megatron.execution.copier import Copier
from wsm_megatron.execution.device import Device
from wsm_megatron.execution.memory_budget import Budget
from wsm_megatron.execution.tiles import Outcome, Tile, Workspace
from wsm_megatron.execution.value_checks import check_variance, explain_nonfinite, wrong_main
from wsm_megatron.planning.tasks import Rule, Task, sources_read
from wsm_megatron.process.worker_threads import work_through


class Share:
    """Runs tasks for several merges of the same sources: each source byte is read once."""

    def __init__(self, context: Context, budget: Budget, device: Device):
        self._context = context = context.crew(budget.threads)
        self._phases, self._budget, self._device = context.phases, budget, device
        self._sources = sources_read(context.merges)
        assert self._sources[Rule.SUM] == tuple(range(len(context.readers))), "a source for nothing"
        self._stop = threading.Event()
        self._copier = Copier(context, self._stop)

    def run(self, tasks: Sequence[Task], check: Callable[[], None]) -> None:
        """Run all tasks; the first failure, also of ``check``, stops the others and is raised."""
        local, context = threading.local(), self._context

        def work(task: Task) -> None:
            if not hasattr(local, "workspace"):
                local.workspace = self._device.workspace(len(context.readers), context.merges)
            self._run_task(task, local.workspace)

        work_through(tasks, work, self._budget.threads, self._stop, check)

    def _run_task(self, task: Task, workspace: Workspace) -> None:
        if self._stop.is_set():
            return
        sources = self._sources[task.recipe.rule]
        with self._phases("resuming"):
            finished = all(target.has(task) for target in self._context.targets)
        if finished:
            self._context.leave_out(task, sources)
            cost = task.recipe.cost(len(sources), len(self._context.merges))
            self._context.progress(task.box.numel * cost)
        elif task.recipe.rule is Rule.COPY:
            for j in sources:
                self._copier.copy(task, j, workspace, self._budget.tile_elements(task.recipe))
        else:
            self._sum(task, workspace)

    def _sum(self, task: Task, workspace: Workspace) -> None:
        recipe, context = task.recipe, self._context
        with self._phases("reading"):
            covers = [context.covers(task, j) for j in range(len(context.readers))]
        writers = [target.chunks(task) for target in context.targets]
        started: deque[Tile] = deque()

        def write_oldest() -> None:
            tile = started.popleft()
            with self._phases("reducing"):
                self._check(task, tile, tile.finish())
            with self._phases("writing"):
                _write(writers, tile)

        for part in task.box.split(self._budget.tile_elements(recipe)):
            if self._stop.is_set():
                return
            tile = workspace.tile(recipe, part.numel)
            with self._phases("reading"):
                _read(task, covers, part, tile)
            with self._phases("reducing"):
                tile.start()
            started.append(tile)
            if len(started) == workspace.depth:
                write_oldest()
            context.progress(part.numel * recipe.cost(len(covers), len(writers)))
        while started:
            write_oldest()
        with self._phases("writing"):
            finish(chain.from_iterable(covers), chain.from_iterable(writers))

    def _check(self, task: Task, tile: Tile, outcome: Outcome) -> None:
        if outcome.wrong_main is not None:
            layout = self._context.readers[outcome.wrong_main].layout
            raise wrong_main(task, layout, tile.sources[outcome.wrong_main][0].elements)
        for k, output in outcome.nonfinite if not self._context.allow_nonfinite else ():
            members, readers = self._context.merges[k].members, self._context.readers
            read = [(readers[j].layout, tile.sources[j]) for j in members]
            explain_nonfinite(task, read, task.recipe.outputs[output])
        for outputs in tile.outputs:
            check_variance(task, outputs[0].elements)


def _read(task: Task, covers: list[list[Cover]], part: Box, tile: Tile) -> None:
    boxes = [task.part(key, part) for key in task.recipe.inputs]
    read_together(
        [
            (cover, box, buffer)
            for inputs, buffers in zip(covers, tile.sources, strict=True)
            for cover, box, buffer in zip(inputs, boxes, buffers, strict=True)
        ]
    )


def _write(writers: list[list[ChunkWriter]], tile: Tile) -> None:
    for outputs, buffers in zip(writers, tile.outputs, strict=True):
        for writer, buffer in zip(outputs, buffers, strict=True):
            writer.append(buffer)
