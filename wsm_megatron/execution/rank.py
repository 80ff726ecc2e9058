"""One rank's part of a merge: its files opened, its share run, its files made durable."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from wsm_megatron.access.node_local.pipeline import Digests
from wsm_megatron.access.node_local.stages import STEP_BYTES, copy_beside, run_steps
from wsm_megatron.access.node_local.transport import Wire
from wsm_megatron.checkpoint.reader import CheckpointReader, Ledger
from wsm_megatron.checkpoint.side_files import Files
from wsm_megatron.checkpoint.staging_dir import journals
from wsm_megatron.checkpoint.writer import CheckpointFile, file_name
from wsm_megatron.comm.communicator import Ranks
from wsm_megatron.comm.launcher import local_rank
from wsm_megatron.errors import StorageError
from wsm_megatron.execution.byte_entries import copy_objects, write_common
from wsm_megatron.execution.context import Context, Progress, Target
from wsm_megatron.execution.device import Device, choose_device
from wsm_megatron.execution.executor import Share
from wsm_megatron.execution.memory_budget import Budget, default_memory, make_budget
from wsm_megatron.execution.timing import Phases, RankReport
from wsm_megatron.planning.job import Job, Part, places
from wsm_megatron.planning.tasks import Rule, Task, bytes_read
from wsm_megatron.process.worker_threads import work_through
from wsm_megatron.storage.descriptors import check_room
from wsm_megatron.storage.journal import SUFFIX as JOURNAL_SUFFIX
from wsm_megatron.storage.retry import check_storage
from wsm_megatron.storage.visibility import wait_for_directory

logger = logging.getLogger(__name__)

MAX_THREADS = 16

ProgressFactory = Callable[[int, int], AbstractContextManager[Progress]]
"""Called on every rank with its number and the bytes it will read and write."""


@dataclass(frozen=True)
class RankResult:
    """What a rank hands to rank 0: its file for each product, and its unfinished checksums."""

    files: list[Files]
    ledgers: list[Ledger]
    digests: Digests
    report: RankReport


@dataclass(frozen=True)
class _Means:
    """Where a rank sums, with how much memory and how many threads.

    Attributes:
        step_threads: how many do what it does with other ranks.
    """

    device: Device
    budget: Budget
    step_threads: int


def run_share(
    job: Job,
    ranks: Ranks,
    part: Part,
    directories: list[Path],
    wire: Wire | None,
    progress: ProgressFactory | None,
    phases: Phases,
) -> RankResult:
    """Do this rank's part for every product; its files are on disk when it returns.

    Args:
        directories: of the products, not yet published.
        wire: to other ranks, where sums go from one to another.
        progress: as for :func:`.merge`.
    """
    check_room(2 * len(directories))  # a file and its journal for each
    started = time.perf_counter()
    means = _means(job, part.tasks)
    with ExitStack() as stack:
        readers = _open_readers(job, means.budget, stack)
        moved = stack.enter_context(_counting(job, ranks, part, progress))
        targets = _open_targets(job, ranks, part, directories, phases)
        files = [target.file for target in targets]
        config = job.config
        context = Context(readers, job.merges, targets, config.allow_nonfinite, moved, phases)
        try:
            digests = _work(job, ranks, part, wire, context, means)
            beside = copy_beside(job, ranks.rank, directories)
        except BaseException:
            _abandon(files)
            raise
        with phases("syncing"):
            closed = _close(files, ranks.check)
    return RankResult(
        files=[
            {file.path.name: closed[file], **copied}
            for file, copied in zip(files, beside, strict=True)
        ],
        ledgers=[reader.ledger for reader in readers],
        digests=digests,
        report=_report(ranks.rank, context, means, time.perf_counter() - started),
    )


def _means(job: Job, tasks: Sequence[Task]) -> _Means:
    """Choose device and threads."""
    execution = job.execution
    memory, threads = execution.memory or default_memory(), execution.threads or default_threads()
    device = _device(job, tasks, threads)
    budget = make_budget(
        memory,
        threads,
        len(job.sources),
        len(job.products),
        job.plan.recipes,
        depth=device.depth,
        wanted_bytes=device.wanted_bytes,
    )
    return _Means(device, budget, max(1, min(budget.threads, memory // STEP_BYTES)))


def _device(job: Job, tasks: Sequence[Task], threads: int) -> Device:
    summed = [task for task in tasks if task.recipe.rule is not Rule.COPY]
    nbytes, sources = sum(bytes_read(summed, job.merges)), len(job.sources)
    merges = len(job.products)
    device = choose_device(job.execution.device, sources, merges, nbytes, threads, local_rank())
    logger.info("sums on %s: %s", device.torch_device, device.reason)
    return device


def _open_readers(job: Job, budget: Budget, stack: ExitStack) -> list[CheckpointReader]:
    readers = []
    for source in job.sources:
        reader = CheckpointReader(source.layout, job.execution.retries, budget.ahead)
        stack.callback(reader.close)
        readers.append(reader)
    return readers


@contextmanager
def _counting(
    job: Job, ranks: Ranks, part: Part, progress: ProgressFactory | None
) -> Iterator[Progress]:
    """Tell rank 0, and whoever watches this rank, what it has read and written."""
    if progress is None:
        yield ranks.count
        return
    with progress(ranks.rank, job.cost_of(ranks.rank, part)) as bar:

        def moved(nbytes: int) -> None:
            ranks.count(nbytes)
            bar(nbytes)

        yield moved


def _open_targets(
    job: Job, ranks: Ranks, part: Part, directories: list[Path], phases: Phases
) -> list[Target]:
    targets = []
    for k, directory in enumerate(directories):
        with phases("waiting"):
            wait_for_directory(journals(directory), ranks.check)
            wait_for_directory(directory, ranks.check)
        name, placed = file_name(ranks.rank), job.placed(k, ranks.rank, part)
        journal = journals(directory) / (name + JOURNAL_SUFFIX)
        file = CheckpointFile(directory / name, journal, placed[-1].end if placed else 0)
        targets.append(Target(file, places(placed)))
    return targets


def _work(
    job: Job, ranks: Ranks, part: Part, wire: Wire | None, context: Context, means: _Means
) -> Digests:
    """Objects, then what is done with other ranks, then what this one does by itself."""
    copy_objects(job, part, context)
    if ranks.rank == 0:
        write_common(job, context)
    digests = Digests()
    if job.spread is not None:
        digests = run_steps(job, ranks, wire, context, means.step_threads)
    Share(context, means.budget, means.device).run(part.tasks, ranks.check)
    return digests


def _report(rank: int, context: Context, means: _Means, seconds: float) -> RankReport:
    return RankReport(
        rank=rank,
        host=socket.gethostname(),
        device=str(means.device.torch_device),
        threads=means.budget.threads,
        bytes_read=sum(reader.bytes_read for reader in context.readers),
        bytes_written=sum(target.file.bytes_written for target in context.targets),
        seconds=seconds,
        phases=context.phases.seconds(),
    )


def _close(
    files: list[CheckpointFile], check: Callable[[], None]
) -> dict[CheckpointFile, tuple[int, int]]:
    """Make files durable, several at a time; the size and CRC-32 of each."""
    closed: dict[CheckpointFile, tuple[int, int]] = {}

    def close(file: CheckpointFile) -> None:
        closed[file] = file.close()

    work_through(files, close, min(len(files), MAX_THREADS), threading.Event(), check)
    return closed


def _abandon(files: list[CheckpointFile]) -> None:
    """Close files after a failure. Storage that hangs is not waited for."""
    try:
        work_through(files, CheckpointFile.abandon, 1, threading.Event(), check_storage)
    except StorageError as error:
        logger.warning("%s; what is not synced is made again", error)


def default_threads() -> int:
    """The cores that this process may use, at most 16: more wait for each other."""
    return min(MAX_THREADS, len(os.sched_getaffinity(0)))
