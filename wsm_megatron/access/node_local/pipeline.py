"""Tasks that several ranks do together: sums that travel, and main params whose model is elsewhere.

The arithmetic is that of one process, in the same order: a rank adds its sources to the float64
sums that it was sent (1.0 times a sum is that sum) and hands them on; the last one rounds. So the
bits are those of any other merge. A reduce-scatter would add partial sums, with other roundings.

Why nobody waits forever: all ranks take steps in one order, by task and then along the pipeline,
each thread the next one that is free, and messages between two ranks go in that order too. Consider
the first step of all that is not done. On its rank all steps before it are done, so a thread has
it, or is free to take it; what it waits for was sent, or is sent as soon as it asks; and the step
after it, which takes what it sends, is the first left on its own rank. So it ends.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from isal.isal_zlib import crc32

from wsm_megatron.access.node_local.assignment import TRAVEL_ELEMENTS, PeerStage, TaskAssignment
from wsm_megatron.access.node_local.schedule import Place, ending, scope_of, tickets_of
from wsm_megatron.access.node_local.transport import Transport
from wsm_megatron.execution.rank import RankWork
from wsm_megatron.execution.tiles import Memory
from wsm_megatron.planning.tasks import Merge, Stage
from wsm_megatron.process.worker_threads import run_workers
from wsm_megatron.storage.buffer import Buffer

STAGE_BYTES = 16 * TRAVEL_ELEMENTS
"""Memory of a thread that runs steps: sums of 8 bytes, and as much for tiles."""
_DIGEST_ELEMENTS = 2**20


@dataclass
class Digests:
    """CRC-32 of main params, rounded, and of model tensors, by task and source, where one rank
    reads the one and another the other."""

    mains: dict[Place, int] = field(default_factory=dict)
    models: dict[Place, int] = field(default_factory=dict)


class Pipeline:
    """One rank's steps as the executor sees them: :class:`~.executor.Peers`.

    Args:
        held: all tasks. steps: this rank's, in the order of all ranks.
        transport: to the other ranks; None where no sums travel.

    Attributes:
        stages: of the steps, in their order.
        digests: what is to be compared with other ranks'.
    """

    def __init__(
        self,
        held: Sequence[TaskAssignment],
        steps: Sequence[PeerStage],
        merges: Sequence[Merge],
        transport: Transport | None,
    ):
        self._transport = transport
        self._tickets = tickets_of(steps, merges)
        self.stages = [_stage(step, held, merges) for step in steps]
        self._steps = dict(zip(self.stages, steps, strict=True))
        self.digests = Digests()

    def receive(self, stage: Stage, sums: Sequence[torch.Tensor], stop: threading.Event) -> None:
        peer, ticket = self._ticket(stage, "before")
        assert self._transport is not None
        self._transport.receive(peer, ticket, sums, stop)

    def send(self, stage: Stage, sums: Sequence[torch.Tensor], stop: threading.Event) -> None:
        peer, ticket = self._ticket(stage, "after")
        assert self._transport is not None
        self._transport.send(peer, ticket, sums, stop)

    def digest(self, stage: Stage, j: int, main: torch.Tensor) -> None:
        place = self._steps[stage].number, j
        rounded = Buffer(main.to(stage.task.recipe.input_dtypes[1]))
        self.digests.mains[place] = crc32(rounded.data, self.digests.mains.get(place, 0))

    def _ticket(self, stage: Stage, way: str) -> tuple[int, int]:
        step = self._steps[stage]
        return self._tickets[step.number, step.first, way]


def run_pipeline(
    work: RankWork,
    held: Sequence[TaskAssignment],
    steps: Sequence[PeerStage],
    checks: Sequence[Place],
    transport: Transport | None,
) -> Digests:
    """Do a rank's steps, but those of tasks that an earlier merge finished; then read the model
    tensors that it checks for others. Collective.

    Args:
        checks: task and source of those model tensors.

    Raises:
        MergeError: as for :class:`.Executor`, and where a rank is lost.
    """
    context, merges = work.context, work.context.merges
    written = _written_before(work, held, steps)
    left = []
    for step in steps:
        stage = _stage(step, held, merges)
        if not stage.scope.alone and _is_finished(held[step.number], step.number, merges, written):
            context.pass_over(stage)
        else:
            left.append(step)
    pipeline = Pipeline(held, left, merges, transport)
    work.execute_with(pipeline, pipeline.stages, STAGE_BYTES)
    _digest_models(work, held, checks, pipeline.digests)
    return pipeline.digests


def _stage(step: PeerStage, held: Sequence[TaskAssignment], merges: Sequence[Merge]) -> Stage:
    one = held[step.number]
    return Stage(one.task, scope_of(step, one, merges))


def _written_before(
    work: RankWork, held: Sequence[TaskAssignment], steps: Sequence[PeerStage]
) -> set[Place]:
    """Task and merge of what an earlier merge has finished, of all ranks. Collective."""
    context, mine = work.context.for_workers(work.budget.threads), set[Place]()

    def look(step: PeerStage) -> None:
        task = held[step.number].task
        with context.phases("resuming"):
            for k in ending(step, context.merges):
                if context.targets[k].has(task):
                    mine.add((step.number, k))

    run_workers(steps, look, work.budget.threads, threading.Event(), work.ranks.check)
    with context.phases("waiting"):
        return set[Place]().union(*work.ranks.all_gather(mine))


def _is_finished(
    held: TaskAssignment, number: int, merges: Sequence[Merge], written: set[Place]
) -> bool:
    """Every rank has written its part of the task. Not so while digests are to be compared."""
    return not held.checked_apart and all((number, k) in written for k in range(len(merges)))


def _digest_models(
    work: RankWork, held: Sequence[TaskAssignment], checks: Sequence[Place], digests: Digests
) -> None:
    """Read model tensors of which other ranks have the main params."""
    local, stop = threading.local(), threading.Event()
    context = work.context.for_workers(work.budget.threads)

    def digest(place: Place) -> None:
        number, j = place
        task, crc = held[number].task, 0
        key, dtype = task.recipe.inputs[1], task.recipe.input_dtypes[1]
        if not hasattr(local, "memory"):
            local.memory = Memory()
        with context.phases("reading"):
            region_reader = context.readers[j].region_reader(key, task.region)
        for region in task.region.split(_DIGEST_ELEMENTS):
            if stop.is_set():
                return
            ((buffer,),) = local.memory.buffers([[dtype]], region.numel)
            with context.phases("reading"):
                region_reader.read(region, buffer)
            with context.phases("reducing"):
                crc = crc32(buffer.data, crc)
            context.progress(region.numel * dtype.itemsize)
        region_reader.finish()
        digests.models[place] = crc

    run_workers(checks, digest, work.budget.threads, stop, work.ranks.check)
