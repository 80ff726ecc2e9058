"""One rank's part of a merge: its files opened, its share run, its files made durable."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace

from wsm_megatron.checkpoint.reader import CheckpointReader, Ledger
from wsm_megatron.checkpoint.side_files import Files
from wsm_megatron.comm.communicator import Ranks
from wsm_megatron.comm.launcher import local_rank
from wsm_megatron.errors import StorageError
from wsm_megatron.execution.byte_entries import copy_objects, write_common
from wsm_megatron.execution.context import Context, Progress
from wsm_megatron.execution.device import Device, choose_device, host_device
from wsm_megatron.execution.executor import Executor, Peers
from wsm_megatron.execution.memory_budget import Budget, default_memory, make_budget
from wsm_megatron.execution.observer import Observer, is_observed
from wsm_megatron.execution.targets import Closed, Destination, Target
from wsm_megatron.execution.timing import Phases, RankReport
from wsm_megatron.kernels import backend
from wsm_megatron.planning.job import Job, RankPlan
from wsm_megatron.planning.tasks import Rule, Scope, Stage, Task, bytes_read, whole_stages
from wsm_megatron.process.cores import usable_cores
from wsm_megatron.process.worker_threads import run_workers
from wsm_megatron.storage.descriptors import check_room
from wsm_megatron.storage.retry import check_storage
from wsm_megatron.trajectory.gram import Gram, Group

logger = logging.getLogger(__name__)

MAX_THREADS = 16

ProgressFactory = Callable[[int, int], AbstractContextManager[Progress]]
"""Called on every rank with its number and the bytes it will read and write."""


def no_progress(rank: int, total: int) -> AbstractContextManager[Progress]:
    """The one that shows nothing."""
    return nullcontext(lambda nbytes: None)


@dataclass(frozen=True)
class RankResult:
    """What a rank hands to rank 0, and its unfinished checksums.

    Attributes:
        files: its own, for each output. shared: for each, its part of those that all ranks write,
            as of :class:`.Closed`.
        grams: of the sources, where the trajectory is wanted.
    """

    files: list[Files]
    shared: list[Files]
    ledgers: list[Ledger]
    report: RankReport
    grams: dict[Group, Gram] = field(default_factory=dict)


@dataclass(frozen=True)
class RankWork:
    """One rank at work: what it reads, writes and sums with.

    Attributes:
        memory: bytes that it may take.
    """

    ranks: Ranks
    context: Context
    device: Device
    budget: Budget
    memory: int

    def execute(self, stages: Sequence[Stage]) -> None:
        """Run stages that are this rank's alone."""
        Executor(self.context, self.budget, self.device).run(stages, self.ranks.check)

    def execute_with(self, peers: Peers, stages: Sequence[Stage], stage_bytes: int) -> None:
        """Run stages that other ranks take part in, on the CPU.

        Args:
            stage_bytes: memory that each takes.
        """
        threads = max(1, min(self.budget.threads, self.memory // stage_bytes))
        budget = replace(self.budget, threads=threads)
        device = host_device("sums that travel are made on the CPU")
        Executor(self.context, budget, device, peers).run(stages, self.ranks.check)


def run_rank(
    job: Job,
    ranks: Ranks,
    rank_plan: RankPlan,
    destinations: Sequence[Destination],
    progress: ProgressFactory | None,
    phases: Phases,
    before: Callable[[RankWork], None] = lambda _: None,
) -> RankResult:
    """Do this rank's part for every output; its files are on disk when it returns.

    Args:
        destinations: of the outputs.
        progress: as for :func:`.merge`.
        before: what it does with other ranks, before what it does by itself.
    """
    check_room(sum(one.files for one in destinations))
    started = time.perf_counter()
    with ExitStack() as stack:
        work = _open(job, ranks, rank_plan, destinations, progress, phases, stack)
        targets = work.context.targets
        try:
            copy_objects(job, rank_plan, work.context)
            if ranks.rank == 0:
                write_common(job, work.context)
            before(work)
            work.execute(whole_stages(rank_plan.tasks, job.merges))
            beside = _copy_beside(job, rank_plan, destinations)
        except BaseException:
            _abandon(targets)
            raise
        with phases("syncing"):
            closed = _close(targets, ranks.check)
    return RankResult(
        files=[{**one.files, **copied} for one, copied in zip(closed, beside, strict=True)],
        shared=[one.shared for one in closed],
        ledgers=[reader.ledger for reader in work.context.readers],
        report=_report(work, time.perf_counter() - started),
        grams=_grams(work.context),
    )


def observe_rank(
    job: Job,
    ranks: Ranks,
    rank_plan: RankPlan,
    progress: ProgressFactory | None,
    phases: Phases,
) -> RankResult:
    """Read this rank's part of all sources, for their inner products alone. Writes nothing."""
    started, options = time.perf_counter(), job.execution
    scope = Scope(tuple(range(len(job.sources))), ())
    stages = [Stage(task, scope) for task in rank_plan.tasks if is_observed(task)]
    memory, threads = options.memory or default_memory(), options.threads or default_threads()
    device = host_device("inner products are taken on the CPU")
    budget = make_budget(memory, threads, len(job.sources), 0, job.plan.recipes)
    rank_plan = replace(rank_plan, nbytes=sum(stage.nbytes for stage in stages))
    with ExitStack() as stack:
        readers = _open_readers(job, budget, stack)
        moved = stack.enter_context(_counting(ranks, rank_plan, progress))
        context = Context(readers, (), (), True, moved, phases, Observer(len(readers)))
        work = RankWork(ranks, context, device, budget, memory)
        work.execute(stages)
        report = _report(work, time.perf_counter() - started)
    ledgers = [reader.ledger for reader in readers]
    return RankResult([], [], ledgers, report, _grams(context))


def _grams(context: Context) -> dict[Group, Gram]:
    return {} if context.observer is None else context.observer.sums()


def _open(
    job: Job,
    ranks: Ranks,
    rank_plan: RankPlan,
    destinations: Sequence[Destination],
    progress: ProgressFactory | None,
    phases: Phases,
    stack: ExitStack,
) -> RankWork:
    config, options = job.config, job.execution
    memory, threads = options.memory or default_memory(), options.threads or default_threads()
    device = _device(job, rank_plan.tasks, threads)
    if ranks.rank == 0:
        _warn_of_slow_sums(device)
    budget = make_budget(
        memory,
        threads,
        len(job.sources),
        len(job.outputs),
        job.plan.recipes,
        depth=device.depth,
        wanted_bytes=device.wanted_bytes,
    )
    readers = _open_readers(job, budget, stack)
    moved = stack.enter_context(_counting(ranks, rank_plan, progress))
    targets = _open_targets(job, ranks, rank_plan, destinations, phases)
    observer = Observer(len(readers)) if options.trajectory else None
    context = Context(readers, job.merges, targets, config.allow_nonfinite, moved, phases, observer)
    return RankWork(ranks, context, device, budget, memory)


def _device(job: Job, tasks: Sequence[Task], threads: int) -> Device:
    summed = [task for task in tasks if task.recipe.rule is not Rule.COPY]
    nbytes, sources = sum(bytes_read(summed, job.merges)), len(job.sources)
    merges = len(job.outputs)
    device = choose_device(job.execution.device, sources, merges, nbytes, threads, local_rank())
    logger.info("sums on %s: %s", device.torch_device, device.reason)
    return device


def _warn_of_slow_sums(device: Device) -> None:
    how = backend(device.torch_device)
    if how.startswith("eager"):
        logger.warning(
            "sums are made by torch, the same bits several times slower: %s",
            how.removeprefix("eager: "),
        )


def _open_readers(job: Job, budget: Budget, stack: ExitStack) -> list[CheckpointReader]:
    readers = []
    for source in job.sources:
        reader = CheckpointReader(source.layout, job.execution.retries, budget.ahead)
        stack.callback(reader.close)
        readers.append(reader)
    return readers


@contextmanager
def _counting(
    ranks: Ranks, rank_plan: RankPlan, progress: ProgressFactory | None
) -> Iterator[Progress]:
    """Tell rank 0, and whoever watches this rank, what it has read and written."""
    if progress is None:
        yield ranks.count
        return
    with progress(ranks.rank, rank_plan.nbytes) as bar:

        def moved(nbytes: int) -> None:
            ranks.count(nbytes)
            bar(nbytes)

        yield moved


def _open_targets(
    job: Job,
    ranks: Ranks,
    rank_plan: RankPlan,
    destinations: Sequence[Destination],
    phases: Phases,
) -> list[Target]:
    targets = []
    for k, destination in enumerate(destinations):
        placed = job.placed(k, ranks.rank, rank_plan)
        with phases("waiting"):
            targets.append(destination.open(ranks.rank, placed, ranks.check))
    return targets


def _copy_beside(job: Job, rank_plan: RankPlan, destinations: Sequence[Destination]) -> list[Files]:
    """Copy the side files of the outputs that this rank does it for; the copies, by output."""
    return [
        job.copy_beside(output, destination.directory)
        if destination.takes_side_files and k in rank_plan.side_files
        else {}
        for k, (output, destination) in enumerate(zip(job.outputs, destinations, strict=True))
    ]


def _report(work: RankWork, seconds: float) -> RankReport:
    context = work.context
    return RankReport(
        rank=work.ranks.rank,
        host=socket.gethostname(),
        device=str(work.device.torch_device),
        threads=work.budget.threads,
        bytes_read=sum(reader.bytes_read for reader in context.readers),
        bytes_written=sum(target.bytes_written for target in context.targets),
        seconds=seconds,
        phases=context.phases.seconds(),
    )


def _close(targets: Sequence[Target], check: Callable[[], None]) -> list[Closed]:
    """Make all targets durable, several at a time."""
    closed: dict[int, Closed] = {}

    def close(k: int) -> None:
        closed[k] = targets[k].close()

    threads = min(len(targets), MAX_THREADS)
    run_workers(range(len(targets)), close, threads, threading.Event(), check)
    return [closed[k] for k in range(len(targets))]


def _abandon(targets: Sequence[Target]) -> None:
    """Close targets after a failure. Storage that hangs is not waited for."""
    try:
        run_workers(targets, lambda target: target.abandon(), 1, threading.Event(), check_storage)
    except StorageError as error:
        logger.warning("%s; what is not synced is made again", error)


def default_threads() -> int:
    """The cores that this process may use, at most 16: more wait for each other."""
    return min(MAX_THREADS, usable_cores())
