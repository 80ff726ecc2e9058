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
from itertools import chain

import torch
from isal.isal_zlib import crc32

from wsm_megatron.access.node_local.assignment import Held, Step
from wsm_megatron.access.node_local.schedule import (
    Place,
    arriving,
    cost,
    ending,
    leaving,
    tickets_of,
)
from wsm_megatron.access.node_local.transport import Wire
from wsm_megatron.checkpoint.region import Box
from wsm_megatron.checkpoint.region_reader import Cover, read_together
from wsm_megatron.checkpoint.writer import ChunkWriter
from wsm_megatron.execution.context import Context, finish
from wsm_megatron.execution.copier import Copier
from wsm_megatron.execution.memory_budget import LEAST_ELEMENTS, TILE_BYTES
from wsm_megatron.execution.tiles import Memory, round_main
from wsm_megatron.execution.value_checks import check_variance, explain_nonfinite, wrong_main
from wsm_megatron.kernels import weighted_sum
from wsm_megatron.planning.tasks import Rule, Task
from wsm_megatron.process.worker_threads import work_through
from wsm_megatron.storage.buffer import Buffer


@dataclass
class Digests:
    """CRC-32 of main params, rounded, and of model tensors, by task and source, where one rank
    reads the one and another the other."""

    mains: dict[Place, int] = field(default_factory=dict)
    models: dict[Place, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Tile:
    """A thread's buffers for one tile of a step.

    Attributes:
        sources: what is read of each. total: sums to be handed on. outputs: those to be written.
        rounded: as the model tensor that a main param is compared with.
    """

    sources: dict[int, list[Buffer]]
    total: Buffer
    outputs: list[Buffer]
    rounded: list[Buffer]


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
        context: Context,
        held: Sequence[Held],
        steps: Sequence[Step],
        wire: Wire | None,
        threads: int,
    ):
        self._context = context = context.crew(threads)
        self._merges, self._phases = context.merges, context.phases
        self._held, self._steps, self._wire, self._threads = held, steps, wire, threads
        self._stop = threading.Event()
        self._copier = Copier(context, self._stop)
        self._tickets = tickets_of(steps, context.merges)
        self.digests = Digests()

    def run(self, checks: Sequence[Place], check: Callable[[], None]) -> None:
        """Do all steps, then ``checks``: task and source of model tensors to be digested."""
        local = threading.local()

        def memory() -> tuple[Memory, Memory]:
            if not hasattr(local, "memory"):
                local.memory = Memory(), Memory()
            return local.memory

        def work(step: Step) -> None:
            task, (sums, tiles) = self._held[step.number].task, memory()
            if task.recipe.rule is Rule.COPY:
                self._copier.copy(task, step.first, tiles, _tile_elements(task, 1))
            else:
                self._sum(step, sums, tiles)

        def digest(place: Place) -> None:
            self._digest(place, memory()[1])

        work_through(self._steps, work, self._threads, self._stop, check)
        self._stop.clear()
        work_through(checks, digest, self._threads, self._stop, check)

    def _sum(self, step: Step, sums: Memory, tiles: Memory) -> None:
        task, context = self._held[step.number].task, self._context
        rows = self._rows(step, sums)
        self._exchange(step, "before", rows)
        if self._stop.is_set():
            return  # that took long enough for files to be closed
        with self._phases("reading"):
            covers = {j: context.covers(task, j, self._inputs(step, j)) for j in step.sources}
        writers = {k: context.targets[k].chunks(task) for k in ending(step, self._merges)}
        self._tile_by_tile(step, rows, covers, writers, tiles)
        if self._stop.is_set():
            return
        with self._phases("writing"):
            finish(chain.from_iterable(covers.values()), chain.from_iterable(writers.values()))
        self._exchange(step, "after", rows)

    def _tile_by_tile(
        self,
        step: Step,
        rows: dict[int, torch.Tensor],
        covers: dict[int, list[Cover]],
        writers: dict[int, list[ChunkWriter]],
        memory: Memory,
    ) -> None:
        held, done = self._held[step.number], 0
        task, nbytes = held.task, cost(step, held, self._merges)
        for part in task.box.split(_tile_elements(task, len(covers))):
            if self._stop.is_set():
                return
            tile = _tile(task, {j: len(some) for j, some in covers.items()}, memory, part.numel)
            with self._phases("reading"):
                _read(task, covers, part, tile)
            with self._phases("reducing"):
                self._check_mains(step, tile)
            for k in sorted({*rows, *writers}):
                row = rows[k][done : done + part.numel] if k in rows else None
                with self._phases("reducing"):
                    self._add(step, k, row, tile)
                with self._phases("writing"):
                    _write(writers.get(k, []), tile)
            done += part.numel
            self._context.progress(part.numel * nbytes)

    def _inputs(self, step: Step, j: int) -> int:
        return self._held[step.number].inputs(step.rank, j)

    def _rows(self, step: Step, sums: Memory) -> dict[int, torch.Tensor]:
        """Room for the sums of a whole task that come or go, by merge."""
        going = sorted({*arriving(step, self._merges), *leaving(step, self._merges)})
        numel = self._held[step.number].task.box.numel
        (rows,) = sums.buffers([[torch.float64] * len(going)], numel)
        return {k: row.elements for k, row in zip(going, rows, strict=True)}

    def _exchange(self, step: Step, way: str, rows: dict[int, torch.Tensor]) -> None:
        """Take in the sums of the step before, or hand on those for the one after."""
        ticket = self._tickets.get((step.number, step.first, way))
        if ticket is None:
            return
        assert self._wire is not None
        peer, number = ticket
        with self._phases("waiting"):
            if way == "before":
                sums = [rows[k] for k in arriving(step, self._merges)]
                self._wire.receive(peer, number, sums, self._stop)
            else:
                sums = [rows[k] for k in leaving(step, self._merges)]
                self._wire.send(peer, number, sums, self._stop)

    def _check_mains(self, step: Step, tile: _Tile) -> None:
        """Compare main params with the model tensors that were read; digest the others."""
        for j, (main, *models) in tile.sources.items():
            for rounded in tile.rounded:
                rounded.elements.copy_(main.elements)
                if not models:
                    place = step.number, j
                    self.digests.mains[place] = crc32(
                        rounded.data, self.digests.mains.get(place, 0)
                    )
                elif rounded.data != models[0].data:
                    task, layout = self._held[step.number].task, self._context.readers[j].layout
                    raise wrong_main(task, layout, main.elements)

    def _add(self, step: Step, k: int, row: torch.Tensor | None, tile: _Tile) -> None:
        """Go on with one tile of merge ``k``: into ``row``, or rounded into the tile's outputs."""
        task, merge = self._held[step.number].task, self._merges[k]
        pairs = zip(merge.members, merge.coefficients, strict=True)
        own = [(j, c) for j, c in pairs if j in step.sources]
        if not own:
            return  # the sums are handed on as they came
        sums = [row] if row is not None and merge.members[0] < step.first else []
        sources = [*sums, *(tile.sources[j][0].elements for j, _ in own)]
        coefficients = [*(1.0 for _ in sums), *(c for _, c in own)]
        ends = merge.newest in step.sources
        merged = tile.outputs[0] if ends else tile.total
        finite = [weighted_sum(sources, [coefficients], [merged.elements])]
        if ends:
            check_variance(task, merged.elements)
            models = tile.outputs[1:]
            finite += [bool(round_main(merged.elements, model.elements)) for model in models]
        else:
            assert row is not None
            row.copy_(merged.elements)
        if not all(finite) and not self._context.allow_nonfinite:
            readers = self._context.readers
            blamed = [(readers[j].layout, tile.sources[j]) for j, _ in own]
            explain_nonfinite(task, blamed, task.recipe.outputs[finite.index(False)])

    def _digest(self, place: Place, memory: Memory) -> None:
        """Read a model tensor of which another rank has the main param."""
        number, j = place
        task, crc = self._held[number].task, 0
        key, dtype = task.recipe.inputs[1], task.recipe.input_dtypes[1]
        with self._phases("reading"):
            cover = self._context.readers[j].cover(key, task.box)
        for part in task.box.split(_tile_elements(task, 1)):
            if self._stop.is_set():
                return
            ((buffer,),) = memory.buffers([[dtype]], part.numel)
            with self._phases("reading"):
                cover.read(part, buffer)
            with self._phases("reducing"):
                crc = crc32(buffer.data, crc)
            self._context.progress(part.numel * dtype.itemsize)
        cover.settle()
        self.digests.models[place] = crc


def _tile(task: Task, inputs: dict[int, int], memory: Memory, numel: int) -> _Tile:
    """Buffers for ``inputs`` of each source, and for what becomes of them."""
    dtypes, outputs = task.recipe.input_dtypes, task.recipe.outputs
    *sources, (total,), merged, rounded = memory.buffers(
        [
            *(dtypes[:count] for count in inputs.values()),
            (torch.float64,),
            [output.dtype for output in outputs],
            dtypes[1:],
        ],
        numel,
    )
    return _Tile(dict(zip(inputs, sources, strict=True)), total, merged, rounded)


def _read(task: Task, covers: dict[int, list[Cover]], part: Box, tile: _Tile) -> None:
    boxes = [task.part(key, part) for key in task.recipe.inputs]
    read_together(
        [
            (cover, box, buffer)
            for j, inputs in covers.items()
            for cover, box, buffer in zip(inputs, boxes, tile.sources[j], strict=False)
        ]
    )


def _write(writers: list[ChunkWriter], tile: _Tile) -> None:
    for writer, buffer in zip(writers, tile.outputs, strict=False):
        writer.append(buffer)


def _tile_elements(task: Task, sources: int) -> int:
    return max(LEAST_ELEMENTS, TILE_BYTES // max(1, task.recipe.cost(sources, 0)))
