"""Running the steps of tasks that several ranks do together.

The arithmetic is that of one process, in the same order: a rank adds its sources to the float64
sums that it was sent (1.0 times a sum is that sum) and hands them on; the last one rounds. So the
bits are those of any other merge. A reduce-scatter would add partial sums, with other roundings.

Why nobody waits forever: all ranks take steps in one order, by task and then along the chain, each
thread the next one that is free, and messages between two ranks go in that order too. Consider the
first step of all that is not done. On its rank all steps before it are done, so a thread has it, or
is free to take it; what it waits for was sent, or is sent as soon as it asks; and the step after
it, which takes what it sends, is the first left on its own rank. So it ends.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from isal.isal_zlib import crc32

from wsm_megatron.checkpoint.box import Box
from wsm_megatron.checkpoint.buffer import Buffer
from wsm_megatron.checkpoint.cover import Cover
from wsm_megatron.checkpoint.reader import CheckpointReader
from wsm_megatron.checkpoint.writer import ChunkWriter
from wsm_megatron.engine.budget import LEAST_ELEMENTS, TILE_BYTES
from wsm_megatron.engine.crew import work_through
from wsm_megatron.engine.holders import Held, Step
from wsm_megatron.engine.recipe import Rule, Task
from wsm_megatron.engine.run import (
    Progress,
    Target,
    check_finite,
    explain_nonfinite,
    wrong_main,
)
from wsm_megatron.engine.tile import Merge
from wsm_megatron.engine.turns import Place, arriving, cost, ending, leaving, sources_of, tickets_of
from wsm_megatron.engine.wire import Wire
from wsm_megatron.kernels import weighted_sum


@dataclass
class Digests:
    """CRC-32 of main params, rounded, and of model tensors, by task and source, where one rank
    reads the one and another the other."""

    mains: dict[Place, int] = field(default_factory=dict)
    models: dict[Place, int] = field(default_factory=dict)


class Chain:
    """One rank's steps, for several merges of the same sources.

    Args:
        held: all tasks. steps: this rank's, in the order of all ranks.
        wire: to the other ranks; None where no sums travel.

    Attributes:
        digests: what is to be compared with other ranks'.
    """

    def __init__(
        self,
        held: Sequence[Held],
        steps: Sequence[Step],
        readers: Sequence[CheckpointReader],
        merges: Sequence[Merge],
        targets: Sequence[Target],
        wire: Wire | None,
        *,
        allow_nonfinite: bool = False,
        progress: Progress | None = None,
    ):
        self._held, self._steps, self._readers = held, steps, readers
        self._merges, self._targets, self._wire = merges, targets, wire
        self._allow_nonfinite = allow_nonfinite
        self._progress = progress or (lambda _: None)
        self._stop = threading.Event()
        self._tickets = tickets_of(steps, merges)
        self.digests = Digests()

    def run(self, checks: Sequence[Place], threads: int, check: Callable[[], None]) -> None:
        """Do all steps, then ``checks``: task and source of model tensors to be digested."""
        local = threading.local()

        def work(step: Step) -> None:
            if not hasattr(local, "room"):
                local.room = _Room()
            if self._held[step.number].task.recipe.rule is Rule.COPY:
                self._copy(step, local.room)
            else:
                self._sum(step, local.room)

        work_through(self._steps, work, threads, self._stop, check)
        self._stop.clear()
        work_through(checks, self._digest, threads, self._stop, check)

    def _sum(self, step: Step, room: _Room) -> None:
        task = self._held[step.number].task
        going = sorted({*arriving(step, self._merges), *leaving(step, self._merges)})
        rows = {k: room.take(("row", k), torch.float64, task.box.numel).elements for k in going}
        self._exchange(step, "before", rows)
        if self._stop.is_set():
            return  # that took long enough for files to be closed
        covers = {j: self._covers(step, task, j) for j in sources_of(step, self._merges)}
        writers = {k: self._writers(task, k) for k in ending(step, self._merges)}
        done = 0
        for part in task.box.split(_tile_elements(task, len(covers))):
            if self._stop.is_set():
                return
            read = {j: self._read(step, task, j, covers[j], part, room) for j in covers}
            tile = {k: row[done : done + part.numel] for k, row in rows.items()}
            for k in sorted({*rows, *writers}):
                self._add(step, k, read, tile.get(k), writers.get(k), room)
            done += part.numel
            self._progress(part.numel * cost(task, len(covers), len(writers)))
        for cover in (cover for inputs in covers.values() for _, cover in inputs):
            cover.settle()
        for writer in (writer for outputs in writers.values() for writer in outputs):
            writer.finish()
        self._exchange(step, "after", rows)

    def _exchange(self, step: Step, way: str, rows: dict[int, torch.Tensor]) -> None:
        """Take in the sums of the step before, or hand on those for the one after."""
        ticket = self._tickets.get((step.number, step.first, way))
        if ticket is None:
            return
        assert self._wire is not None
        peer, number = ticket
        if way == "before":
            sums = [rows[k] for k in arriving(step, self._merges)]
            self._wire.receive(peer, number, sums, self._stop)
        else:
            sums = [rows[k] for k in leaving(step, self._merges)]
            self._wire.send(peer, number, sums, self._stop)

    def _add(
        self,
        step: Step,
        k: int,
        read: dict[int, Buffer],
        row: torch.Tensor | None,
        writers: list[ChunkWriter] | None,
        room: _Room,
    ) -> None:
        """Go on with one tile of merge ``k``: into ``row``, or rounded into its chunks."""
        task, merge = self._held[step.number].task, self._merges[k]
        own = [
            (j, c)
            for j, c in zip(merge.members, merge.coefficients, strict=True)
            if step.first <= j <= step.last
        ]
        if not own:
            return  # the sums are handed on as they came
        sums = [row] if row is not None and merge.members[0] < step.first else []
        sources = [*sums, *(read[j].elements for j, _ in own)]
        coefficients = [*(1.0 for _ in sums), *(c for _, c in own)]
        output = task.recipe.outputs[0]
        dtype = torch.float64 if writers is None else output.dtype
        merged = room.take("sum", dtype, sources[0].numel())
        finite = weighted_sum(sources, [coefficients], [merged.elements])
        if not finite and not self._allow_nonfinite:
            blamed = [(self._readers[j], read[j].elements) for j, _ in own]
            explain_nonfinite(task, blamed, output)
        if writers is None:
            assert row is not None
            row.copy_(merged.elements)
            return
        writers[0].append(merged)
        for model, writer in zip(task.recipe.outputs[1:], writers[1:], strict=True):
            rounded = room.take("model", model.dtype, sources[0].numel())
            rounded.elements.copy_(merged.elements)  # as Megatron copies mains to weights
            writer.append(rounded)

    def _covers(self, step: Step, task: Task, j: int) -> list[tuple[str, Cover]]:
        """What is read of a source: the summed tensor, and the model where this rank checks it."""
        keys = task.recipe.inputs[:1]
        checkers = self._held[step.number].checkers
        if checkers and checkers[j] == step.rank:
            keys = task.recipe.inputs
        return [(key, self._readers[j].cover(key, task.part(key, task.box))) for key in keys]

    def _read(
        self,
        step: Step,
        task: Task,
        j: int,
        covers: list[tuple[str, Cover]],
        part: Box,
        room: _Room,
    ) -> Buffer:
        recipe, buffers = task.recipe, []
        for i, (key, cover) in enumerate(covers):
            buffers.append(room.take(("source", j, i), recipe.input_dtypes[i], part.numel))
            cover.read(task.part(key, part), buffers[-1])
        if recipe.rule is Rule.SUM_MAIN:
            rounded = room.take("rounded", recipe.input_dtypes[1], part.numel)
            rounded.elements.copy_(buffers[0].elements)
            if len(buffers) == 1:
                place = step.number, j
                self.digests.mains[place] = crc32(rounded.data, self.digests.mains.get(place, 0))
            elif rounded.data != buffers[1].data:
                raise wrong_main(recipe, self._readers[j].layout)
        return buffers[0]

    def _digest(self, place: Place) -> None:
        """Read a model tensor of which another rank has the main param."""
        number, j = place
        task, crc = self._held[number].task, 0
        key, dtype = task.recipe.inputs[1], task.recipe.input_dtypes[1]
        cover = self._readers[j].cover(key, task.box)
        for part in task.box.split(_tile_elements(task, 1)):
            if self._stop.is_set():
                return
            buffer = Buffer.empty(part.numel, dtype)
            cover.read(part, buffer)
            crc = crc32(buffer.data, crc)
            self._progress(part.numel * dtype.itemsize)
        cover.settle()
        self.digests.models[place] = crc

    def _copy(self, step: Step, room: _Room) -> None:
        task, reader = self._held[step.number].task, self._readers[step.first]
        recipe = task.recipe
        writers = [self._writers(task, k)[0] for k in ending(step, self._merges)]
        if not writers:
            return  # of a merge that is published already
        cover = reader.cover(recipe.key, task.box)
        for part in task.box.split(_tile_elements(task, 1)):
            if self._stop.is_set():
                return
            buffer = room.take("copy", recipe.input_dtypes[0], part.numel)
            cover.read(part, buffer)
            if not self._allow_nonfinite:
                check_finite(task, reader, buffer.elements)
            for writer in writers:
                writer.append(buffer)
            self._progress(part.numel * cost(task, 1, len(writers)))
        cover.settle()
        for writer in writers:
            writer.finish()

    def _writers(self, task: Task, k: int) -> list[ChunkWriter]:
        target = self._targets[k]
        return [target.chunk(out, task.part(out.key, task.box)) for out in task.recipe.outputs]


class _Room:
    """A thread's buffers, kept from tile to tile and from step to step."""

    def __init__(self) -> None:
        self._memory: dict[tuple[object, torch.dtype], torch.Tensor] = {}

    def take(self, slot: object, dtype: torch.dtype, numel: int) -> Buffer:
        memory = self._memory.get((slot, dtype))
        if memory is None or memory.numel() < numel:
            memory = self._memory[slot, dtype] = torch.empty(numel, dtype=dtype)
        return Buffer(memory[:numel])


def _tile_elements(task: Task, sources: int) -> int:
    element = sum(dtype.itemsize for dtype in task.recipe.input_dtypes)
    return max(LEAST_ELEMENTS, TILE_BYTES // (max(1, sources) * element))
