"""One rank's share of a merge: read, reduce and write tile by tile, on worker threads.

Each thread takes one task (a chunk) at a time. Its reads, checksums, sums and writes release the
GIL, so that while one thread waits for storage another computes. A tile is small enough that the
bytes of all sources are still in the CPU's cache when they are summed.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from wsm_megatron.checkpoint.box import Box
from wsm_megatron.checkpoint.reader import CheckpointReader, Cover
from wsm_megatron.checkpoint.roles import may_be_padding
from wsm_megatron.checkpoint.writer import CheckpointFile, ChunkWriter, Placed
from wsm_megatron.engine.crew import work_through
from wsm_megatron.engine.plan import Output, Recipe, Rule, Task
from wsm_megatron.errors import MergeError
from wsm_megatron.kernels import weighted_sum

logger = logging.getLogger(__name__)

TILE_BYTES = 2 * 2**20
"""Bytes of all sources together in one tile: about a core's share of cache."""
_TILE_ELEMENTS = (2**14, 2**18)

Progress = Callable[[int], None]
"""Called from worker threads with the bytes read and written since the last call."""


@dataclass(frozen=True)
class Merge:
    """Coefficients of one merged checkpoint, for some of the sources, oldest first."""

    members: tuple[int, ...]
    coefficients: tuple[float, ...]


@dataclass(frozen=True)
class Target:
    """Where one merge's share goes: this rank's file, and the place of every chunk in it."""

    file: CheckpointFile
    places: dict[tuple[str, Box], Placed]

    def chunk(self, output: Output, box: Box) -> ChunkWriter:
        return self.file.chunk(self.places[output.key, box])


class Share:
    """Runs tasks for several merges of the same sources: each source byte is read once."""

    def __init__(
        self,
        readers: Sequence[CheckpointReader],
        merges: Sequence[Merge],
        targets: Sequence[Target],
        *,
        allow_nonfinite: bool = False,
        progress: Progress | None = None,
    ):
        self._readers, self._merges, self._targets = readers, merges, targets
        self._allow_nonfinite = allow_nonfinite
        self._progress = progress or (lambda _: None)
        self._stop = threading.Event()
        self._groups = _same_members(merges)

    def run(
        self, tasks: Sequence[Task], threads: int, check: Callable[[], None] | None = None
    ) -> None:
        """Run all tasks; the first failure, also of ``check``, stops the others and is raised."""
        scratch = threading.local()
        work_through(
            tasks,
            lambda task: self._run_task(task, scratch),
            threads,
            self._stop,
            check or (lambda: None),
        )

    def _run_task(self, task: Task, scratch: threading.local) -> None:
        if self._stop.is_set():
            return
        if self._is_finished(task):
            self._leave_out(task)
            return
        if task.recipe.rule is Rule.COPY:
            self._copy(task, _Scratch.of(scratch))
        else:
            self._sum(task, _Scratch.of(scratch))

    def _is_finished(self, task: Task) -> bool:
        """Whether an earlier merge, which died, has written all that the task writes."""
        return all(
            target.file.has(target.places[output.key, task.part(output.key, task.box)])
            for target in self._targets
            for output in task.recipe.outputs
        )

    def _leave_out(self, task: Task) -> None:
        recipe, copied = task.recipe, (task.recipe.key,)
        for reader in self._readers:
            for key in copied if recipe.rule is Rule.COPY else recipe.inputs:
                part = task.part(key, task.box)
                reader.cover(key, part).leave_out(part)
        self._progress(task.box.numel * recipe.cost(len(self._readers), len(self._targets)))

    def _sum(self, task: Task, scratch: _Scratch) -> None:
        recipe, box = task.recipe, task.box
        covers = [
            [r.cover(key, task.part(key, box)) for key in recipe.inputs] for r in self._readers
        ]
        writers = [
            [t.chunk(output, task.part(output.key, box)) for output in recipe.outputs]
            for t in self._targets
        ]
        for tile in box.split(_tile_elements(recipe, len(covers))):
            if self._stop.is_set():
                return
            sources = _read(task, covers, tile, scratch)
            if recipe.rule is Rule.SUM_MAIN:
                self._check_mains(recipe, sources)
            for group in self._groups:
                self._reduce(task, tile, sources, group, writers, scratch)
            self._progress(tile.numel * recipe.cost(len(covers), len(writers)))
        _finish(covers, writers)

    def _reduce(
        self,
        task: Task,
        tile: Box,
        sources: list[list[torch.Tensor]],
        group: Sequence[int],
        writers: list[list[ChunkWriter]],
        scratch: _Scratch,
    ) -> None:
        """Sum one tile for the merges ``group``, which have their sources in common."""
        members = self._merges[group[0]].members
        outputs = task.recipe.outputs
        sums = [scratch.take(("sum", k), outputs[0].dtype, tile.numel) for k in group]
        coefficients = [self._merges[k].coefficients for k in group]
        finite = weighted_sum([sources[j][0] for j in members], coefficients, sums)
        if not finite and not self._allow_nonfinite:
            self._explain_nonfinite(task, sources, members, outputs[0])
        for k, merged in zip(group, sums, strict=True):
            writers[k][0].append(merged)
            if len(outputs) == 2:  # the model tensor is the main param rounded, as in Megatron
                model = scratch.take("model", outputs[1].dtype, tile.numel)
                writers[k][1].append(model.copy_(merged))

    def _copy(self, task: Task, scratch: _Scratch) -> None:
        recipe, box = task.recipe, task.box
        for merge, target in zip(self._merges, self._targets, strict=True):
            reader = self._readers[merge.members[-1]]
            covers = [[reader.cover(recipe.key, box)]]
            writers = [[target.chunk(recipe.outputs[0], box)]]
            for tile in box.split(_tile_elements(recipe, 1)):
                if self._stop.is_set():
                    return
                ((data,),) = _read(task, covers, tile, scratch)
                if data.is_floating_point() and not self._allow_nonfinite:
                    self._check_finite(task, reader, data)
                writers[0][0].append(data)
                self._progress(tile.numel * recipe.cost(1, 1))
            _finish(covers, writers)

    def _check_mains(self, recipe: Recipe, sources: list[list[torch.Tensor]]) -> None:
        for reader, (main, model) in zip(self._readers, sources, strict=True):
            if not _same_bits(main.to(model.dtype), model):
                raise MergeError(
                    f"{reader.layout.path}: the main param {recipe.inputs[0]} does not belong to "
                    f"the model tensor {recipe.inputs[1]}: rounded to {model.dtype} it differs. "
                    "Megatron-LM through core_r0.19 can save such mains with fully_reshardable "
                    "optimizer state and several DDP buckets; the model tensors are right. Merge "
                    "with --mains-from-model (but for flat buckets), or --optimizer-state drop"
                )

    def _check_finite(self, task: Task, reader: CheckpointReader, data: torch.Tensor) -> None:
        key = task.recipe.key
        if torch.isfinite(data).all() or _is_padding(key, task.box):
            return
        raise MergeError(_nonfinite_message(reader, key, data))

    def _explain_nonfinite(
        self,
        task: Task,
        sources: list[list[torch.Tensor]],
        members: Sequence[int],
        output: Output,
    ) -> None:
        """A sum is not finite: name the source that is to blame, or the overflow."""
        key = task.recipe.inputs[0]
        if _is_padding(key, task.part(key, task.box)):
            return
        for j in members:
            if not torch.isfinite(sources[j][0]).all():
                raise MergeError(_nonfinite_message(self._readers[j], key, sources[j][0]))
        raise MergeError(
            f"{key}: the merged values overflow {output.dtype} although every source is finite; "
            "choose another --dtype"
        )


class _Scratch:
    """A thread's buffers, kept from tile to tile."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[object, torch.dtype], torch.Tensor] = {}

    @staticmethod
    def of(local: threading.local) -> _Scratch:
        if not hasattr(local, "scratch"):
            local.scratch = _Scratch()
        return local.scratch

    def take(self, slot: object, dtype: torch.dtype, numel: int) -> torch.Tensor:
        buffer = self._buffers.get((slot, dtype))
        if buffer is None or buffer.numel() < numel:
            buffer = self._buffers[slot, dtype] = torch.empty(numel, dtype=dtype)
        return buffer[:numel]


def _read(
    task: Task, covers: list[list[Cover]], tile: Box, scratch: _Scratch
) -> list[list[torch.Tensor]]:
    sources = []
    recipe = task.recipe
    boxes = [task.part(key, tile) for key in recipe.inputs]
    for j, inputs in enumerate(covers):
        buffers = []
        for i, (cover, dtype) in enumerate(zip(inputs, recipe.input_dtypes, strict=True)):
            buffer = scratch.take(("source", j, i), dtype, tile.numel)
            cover.read(boxes[i], buffer)
            buffers.append(buffer)
        sources.append(buffers)
    return sources


def _finish(covers: list[list[Cover]], writers: list[list[ChunkWriter]]) -> None:
    for inputs in covers:
        for cover in inputs:
            cover.settle()
    for outputs in writers:
        for writer in outputs:
            writer.finish()


def _same_members(merges: Sequence[Merge]) -> list[list[int]]:
    groups: dict[tuple[int, ...], list[int]] = {}
    for k, merge in enumerate(merges):
        groups.setdefault(merge.members, []).append(k)
    return list(groups.values())


def _tile_elements(recipe: Recipe, sources: int) -> int:
    low, high = _TILE_ELEMENTS
    wanted = TILE_BYTES // (sources * sum(dtype.itemsize for dtype in recipe.input_dtypes))
    return min(max(wanted, low), high)


def _same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return torch.equal(left.view(torch.uint8), right.view(torch.uint8))


def _is_padding(key: str, box: Box) -> bool:
    return len(box.offsets) == 1 and may_be_padding(key, box.offsets[0], box.sizes[0])


def _nonfinite_message(reader: CheckpointReader, key: str, data: torch.Tensor) -> str:
    count = int((~torch.isfinite(data)).sum())
    return (
        f"{reader.layout.path}: {key} holds NaN or Inf ({count} of the {data.numel()} values "
        "looked at); leave this checkpoint out, or pass --allow-nonfinite"
    )
