"""One rank's share of a merge: read, reduce and write tile by tile, on worker threads.

Each thread takes one task (a chunk) at a time. Its reads, checksums, sums and writes release the
GIL, so that while one thread waits for storage another computes. A tile is small enough that the
bytes of all sources are still in the CPU's cache when they are summed.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from wsm_megatron.checkpoint.box import Box
from wsm_megatron.checkpoint.cover import Cover, read_together
from wsm_megatron.checkpoint.layout import Layout
from wsm_megatron.checkpoint.reader import CheckpointReader
from wsm_megatron.checkpoint.roles import may_be_padding
from wsm_megatron.checkpoint.writer import CheckpointFile, ChunkWriter, Placed
from wsm_megatron.engine.budget import Budget
from wsm_megatron.engine.crew import work_through
from wsm_megatron.engine.device import Device
from wsm_megatron.engine.phases import Phases
from wsm_megatron.engine.recipe import Output, Recipe, Rule, Task
from wsm_megatron.engine.tile import Merge, Outcome, Tile, Workspace
from wsm_megatron.errors import MergeError

logger = logging.getLogger(__name__)

Progress = Callable[[int], None]
"""Called from worker threads with the bytes read and written since the last call."""


@dataclass(frozen=True)
class Target:
    """Where one merge's share goes: this rank's file, and the place of every chunk in it."""

    file: CheckpointFile
    places: dict[tuple[str, Box], Placed]

    def chunk(self, output: Output, box: Box) -> ChunkWriter:
        return self.file.chunk(self.places[output.key, box])

    def has(self, task: Task) -> bool:
        """Whether an earlier merge, which died, has written all that a task writes here."""
        return all(
            self.file.has(self.places[output.key, task.part(output.key, task.box)])
            for output in task.recipe.outputs
        )


class Share:
    """Runs tasks for several merges of the same sources: each source byte is read once."""

    def __init__(
        self,
        readers: Sequence[CheckpointReader],
        merges: Sequence[Merge],
        targets: Sequence[Target],
        budget: Budget,
        device: Device,
        *,
        allow_nonfinite: bool = False,
        progress: Progress | None = None,
        phases: Phases | None = None,
    ):
        self._readers, self._merges, self._targets = readers, merges, targets
        self._budget, self._device = budget, device
        self._allow_nonfinite = allow_nonfinite
        self._progress = progress or (lambda _: None)
        self._phases = phases or Phases()
        self._stop = threading.Event()

    def run(self, tasks: Sequence[Task], check: Callable[[], None] | None = None) -> None:
        """Run all tasks; the first failure, also of ``check``, stops the others and is raised."""
        local = threading.local()

        def work(task: Task) -> None:
            if not hasattr(local, "workspace"):
                local.workspace = self._device.workspace(len(self._readers), self._merges)
            self._run_task(task, local.workspace)

        work_through(tasks, work, self._budget.threads, self._stop, check or (lambda: None))

    def _run_task(self, task: Task, workspace: Workspace) -> None:
        if self._stop.is_set():
            return
        with self._phases("resuming"):
            finished = all(target.has(task) for target in self._targets)
        if finished:
            self._leave_out(task)
        elif task.recipe.rule is Rule.COPY:
            self._copy(task, workspace)
        else:
            self._sum(task, workspace)

    def _leave_out(self, task: Task) -> None:
        copied = task.recipe.rule is Rule.COPY
        newest = {merge.members[-1] for merge in self._merges}
        for j in newest if copied else range(len(self._readers)):
            leave_out(task, self._readers[j])
        self._progress(task.box.numel * task.recipe.cost(len(self._readers), len(self._targets)))

    def _sum(self, task: Task, workspace: Workspace) -> None:
        recipe, box = task.recipe, task.box
        with self._phases("reading"):
            covers = [
                [r.cover(key, task.part(key, box)) for key in recipe.inputs] for r in self._readers
            ]
        writers = [
            [t.chunk(output, task.part(output.key, box)) for output in recipe.outputs]
            for t in self._targets
        ]
        started: deque[Tile] = deque()

        def write_oldest() -> None:
            tile = started.popleft()
            with self._phases("reducing"):
                self._check(task, tile, tile.finish())
            with self._phases("writing"):
                _write(writers, tile)

        for part in box.split(self._budget.tile_elements(recipe)):
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
            self._progress(part.numel * recipe.cost(len(covers), len(writers)))
        while started:
            write_oldest()
        with self._phases("writing"):
            _finish(covers, writers)

    def _copy(self, task: Task, workspace: Workspace) -> None:
        recipe, box = task.recipe, task.box
        for merge, target in zip(self._merges, self._targets, strict=True):
            reader = self._readers[merge.members[-1]]
            cover = reader.cover(recipe.key, box)
            writer = target.chunk(recipe.outputs[0], box)
            for part in box.split(self._budget.tile_elements(recipe)):
                if self._stop.is_set():
                    return
                buffer = workspace.buffer(recipe.input_dtypes[0], part.numel)
                with self._phases("reading"):
                    cover.read(part, buffer)
                if not self._allow_nonfinite:
                    check_finite(task, reader, buffer.elements)
                with self._phases("writing"):
                    writer.append(buffer)
                self._progress(part.numel * recipe.cost(1, 1))
            with self._phases("writing"):
                _finish([[cover]], [[writer]])

    def _check(self, task: Task, tile: Tile, outcome: Outcome) -> None:
        if outcome.wrong_main is not None:
            raise wrong_main(task.recipe, self._readers[outcome.wrong_main].layout)
        for k in outcome.nonfinite if not self._allow_nonfinite else ():
            self._explain_nonfinite(task, tile, self._merges[k].members)

    def _explain_nonfinite(self, task: Task, tile: Tile, members: Sequence[int]) -> None:
        """A sum is not finite: name the source that is to blame, or the overflow."""
        read = [(self._readers[j], tile.sources[j][0].elements) for j in members]
        explain_nonfinite(task, read, task.recipe.outputs[0])


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


def _finish(covers: list[list[Cover]], writers: list[list[ChunkWriter]]) -> None:
    for inputs in covers:
        for cover in inputs:
            cover.settle()
    for outputs in writers:
        for writer in outputs:
            writer.finish()


def leave_out(task: Task, reader: CheckpointReader) -> None:
    """Do not read what an earlier merge has read of a source for a finished task."""
    for key in task.recipe.inputs:
        part = task.part(key, task.box)
        reader.cover(key, part).leave_out(part)


def wrong_main(recipe: Recipe, layout: Layout) -> MergeError:
    """A source's main param is of other weights than its model tensor."""
    main, model = recipe.inputs
    return MergeError(
        f"{layout.path}: the main param {main} does not belong to the model tensor "
        f"{model}: rounded to {recipe.input_dtypes[1]} it differs. Megatron-LM through "
        "core_r0.19 can save such mains with fully_reshardable optimizer state and several DDP "
        "buckets; the model tensors are right. Merge with --mains-from-model (but for flat "
        "buckets), or --optimizer-state drop"
    )


def check_finite(task: Task, reader: CheckpointReader, data: torch.Tensor) -> None:
    """Raise ``MergeError`` where copied values are not finite, padding apart."""
    key = task.recipe.key
    if not data.is_floating_point() or torch.isfinite(data).all():
        return
    if _is_padding(key, task.box):
        return
    raise MergeError(_nonfinite_message(reader, key, data))


def explain_nonfinite(
    task: Task, read: Iterable[tuple[CheckpointReader, torch.Tensor]], output: Output
) -> None:
    """A sum of what was read is not finite: name the source that is to blame, or the overflow.

    Raises:
        MergeError: unless it is padding.
    """
    key = task.recipe.inputs[0]
    if _is_padding(key, task.part(key, task.box)):
        return
    for reader, elements in read:
        if not torch.isfinite(elements).all():
            raise MergeError(_nonfinite_message(reader, key, elements))
    raise MergeError(
        f"{key}: the merged values overflow {output.dtype} although every source is finite; "
        "choose another --dtype"
    )


def _is_padding(key: str, box: Box) -> bool:
    return len(box.offsets) == 1 and may_be_padding(key, box.offsets[0], box.sizes[0])


def _nonfinite_message(reader: CheckpointReader, key: str, data: torch.Tensor) -> str:
    count = int((~torch.isfinite(data)).sum())
    return (
        f"{reader.layout.path}: {key} holds NaN or Inf ({count} of the {data.numel()} values "
        "looked at); leave this checkpoint out, or pass --allow-nonfinite"
    )
