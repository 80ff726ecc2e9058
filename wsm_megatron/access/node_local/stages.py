"""A rank's part in the tasks that several ranks do together, and the checks afterwards.

What a rank reads is checked where it was read: no other may see it.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Sequence
from pathlib import Path

from wsm_megatron.access.node_local.assignment import TRAVEL_ELEMENTS, Held, Step
from wsm_megatron.access.node_local.pipeline import Chain, Digests
from wsm_megatron.access.node_local.schedule import Place, cost, ending
from wsm_megatron.access.node_local.transport import Wire, open_wire
from wsm_megatron.checkpoint.reader import CheckpointReader, Ledger
from wsm_megatron.checkpoint.side_files import Files
from wsm_megatron.comm.communicator import Ranks
from wsm_megatron.comm.launcher import local_rank
from wsm_megatron.execution.context import Context
from wsm_megatron.execution.device import choose_device
from wsm_megatron.execution.value_checks import wrong_main
from wsm_megatron.planning.job import Job
from wsm_megatron.process.worker_threads import work_through
from wsm_megatron.storage.visibility import wait_for_directory, wait_for_files

STEP_BYTES = 16 * TRAVEL_ELEMENTS
"""Memory of a thread that runs steps: sums of 8 bytes, and as much for tiles."""


def check_shared(directory: Path, ranks: Ranks) -> None:
    """All ranks see the directory that rank 0 has made. Collective.

    Raises:
        StorageError: one does not.
    """
    name = ranks.from_first(lambda: _probe(directory), "preparing the target")
    with ranks.together("preparing the target"):
        wait_for_directory(directory, ranks.check)
        wait_for_files(directory, {name: 0}, ranks.check)
    if ranks.rank == 0:
        (directory / name).unlink()


def _probe(directory: Path) -> str:
    probe = directory / f"seen-{uuid.uuid4().hex}"
    probe.touch()
    return probe.name


def connect(job: Job, ranks: Ranks) -> Wire | None:
    """Connect the ranks where sums go from one to another. Collective.

    Keep the wire until all ranks are done: closing it breaks their connections.
    """
    assert job.spread is not None
    if not any(held.travels for held in job.spread.held):
        return None
    if job.execution.device != "cuda":  # a GPU that only some ranks have or take connects no others
        return open_wire(ranks)
    device = choose_device("cuda", 0, 0, 0, 0, local_rank())
    return open_wire(ranks, device.torch_device)


def run_steps(job: Job, ranks: Ranks, wire: Wire | None, context: Context, threads: int) -> Digests:
    """Do this rank's steps; those of tasks that an earlier merge finished are left out. Collective.

    Raises:
        MergeError: as for :class:`.executor.Share`, and where a rank is lost.
    """
    assert job.spread is not None
    held, steps = job.spread.held, job.spread.steps(ranks.rank)
    written = _written_before(steps, held, ranks, context.crew(threads), threads)
    finished = {step.number for step in steps if _is_finished(step, held, context, written)}
    for step in steps:
        if step.number in finished:
            one = held[step.number]
            context.leave_out(one.task, step.sources)
            context.progress(one.task.box.numel * cost(step, one, context.merges))
    left = [step for step in steps if step.number not in finished]
    chain = Chain(context, held, left, wire, threads)
    chain.run(job.spread.checks(ranks.rank), ranks.check)
    return chain.digests


def _written_before(
    steps: Sequence[Step], held: Sequence[Held], ranks: Ranks, context: Context, threads: int
) -> set[Place]:
    """Task and merge of what an earlier merge has finished, of all ranks. Collective."""
    mine: set[Place] = set()

    def look(step: Step) -> None:
        task = held[step.number].task
        with context.phases("resuming"):
            for k in ending(step, context.merges):
                if context.targets[k].has(task):
                    mine.add((step.number, k))

    work_through(steps, look, threads, threading.Event(), ranks.check)
    with context.phases("waiting"):
        return set[Place]().union(*ranks.gather(mine))


def _is_finished(step: Step, held: Sequence[Held], context: Context, written: set[Place]) -> bool:
    """Every rank has written its part of the task. Not so while digests are to be compared."""
    apart, merges = held[step.number].checked_apart, len(context.merges)
    return not apart and all((step.number, k) in written for k in range(merges))


def copy_beside(job: Job, rank: int, directories: Sequence[Path]) -> list[Files]:
    """Copy what lies beside the newest sources' tensors, where this rank does it.

    Returns:
        the copies, for every product.
    """
    if job.spread is None:  # rank 0 does, when it publishes
        return [{} for _ in directories]
    reporters = job.spread.reporters
    return [
        job.copy_beside(product, directory) if reporters[product.newest] == rank else {}
        for product, directory in zip(job.products, directories, strict=True)
    ]


def check_sources(
    job: Job, rank: int, ledgers: Sequence[Sequence[Ledger]], digests: Sequence[Digests]
) -> None:
    """Compare what this rank answers for: records read in parts, files that may have changed.

    Args:
        ledgers: ``[rank][source]``. digests: of all ranks.

    Raises:
        MergeError: a record is damaged, a checkpoint changed meanwhile, or main params are of
            other weights than their model.
    """
    for j, source in enumerate(job.sources):
        reader = CheckpointReader(source.layout)
        try:
            reader.verify([_own_records([by_source[j] for by_source in ledgers], rank)])
        finally:
            reader.close()
        if source.fingerprint:
            source.check_unchanged()
    _compare(job, digests)


def _own_records(ledgers: Sequence[Ledger], rank: int) -> Ledger:
    """Records of which this rank is the first that has read any, with the parts that all read."""
    own: Ledger = {}
    for location in ledgers[rank]:
        if not any(location in ledger for ledger in ledgers[:rank]):
            own[location] = [part for ledger in ledgers for part in ledger.get(location, ())]
    return own


def _compare(job: Job, digests: Sequence[Digests]) -> None:
    assert job.spread is not None
    models = {place: crc for one in digests for place, crc in one.models.items()}
    for one in digests:
        for (number, j), crc in one.mains.items():
            if models[number, j] != crc:
                raise wrong_main(job.spread.held[number].task, job.sources[j].layout)
