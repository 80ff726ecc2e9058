"""One rank's part of a merge: its files opened, its share run, its files made durable."""

from __future__ import annotations

import logging
import os
import resource
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path

from wsm_megatron.checkpoint.direct import STREAMS
from wsm_megatron.checkpoint.patience import check_storage
from wsm_megatron.checkpoint.reader import CheckpointReader, Ledger
from wsm_megatron.checkpoint.visible import wait_for_directory
from wsm_megatron.checkpoint.writer import CheckpointFile, Placed, file_name
from wsm_megatron.distributed import Ranks
from wsm_megatron.engine.budget import Budget, default_memory, make_budget
from wsm_megatron.engine.chain import Digests
from wsm_megatron.engine.crew import work_through
from wsm_megatron.engine.device import Device, choose_device, local_rank
from wsm_megatron.engine.job import Job, Part, places
from wsm_megatron.engine.phases import Phases, RankReport
from wsm_megatron.engine.recipe import Task
from wsm_megatron.engine.run import Progress, Share, Target
from wsm_megatron.engine.steps import STEP_BYTES, copy_beside, run_steps
from wsm_megatron.engine.wire import Wire
from wsm_megatron.errors import StorageError

logger = logging.getLogger(__name__)

MAX_THREADS = 16

ProgressFactory = Callable[[int, int], AbstractContextManager[Progress]]
"""Called on every rank with its number and the bytes it will read and write."""

Files = dict[str, tuple[int, int]]
"""Size and CRC-32 of files, by name."""


@dataclass(frozen=True)
class RankResult:
    """What a rank hands to rank 0: its file for each product, and its unfinished checksums."""

    files: list[Files]
    ledgers: list[Ledger]
    digests: Digests
    report: RankReport


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
    _allow_many_files()
    started = time.perf_counter()
    device = _device(job, part.tasks)
    budget = _budget(job, device)
    with ExitStack() as stack:
        readers = [
            CheckpointReader(source.layout, job.config.retries, budget.ahead, job.config.direct_io)
            for source in job.sources
        ]
        for reader in readers:
            stack.callback(reader.close)
        bar = stack.enter_context(
            progress(ranks.rank, job.cost_of(ranks.rank, part))
            if progress
            else nullcontext(_ignore)
        )

        def moved(nbytes: int) -> None:
            ranks.count(nbytes)
            bar(nbytes)

        targets = _open_targets(job, ranks, part, directories, readers, phases)
        files = [target.file for target in targets]
        share = Share(
            readers,
            [product.merge for product in job.products],
            targets,
            budget,
            device,
            allow_nonfinite=job.config.allow_nonfinite,
            progress=moved,
            phases=phases,
        )
        digests = Digests()
        try:
            if job.spread is not None:
                threads = max(1, min(budget.threads, _memory(job) // STEP_BYTES))
                digests = run_steps(job, ranks, wire, readers, targets, threads, moved)
                copy_beside(job, ranks.rank, directories)
            share.run(part.tasks, ranks.check)
        except BaseException:
            _abandon(files)
            raise
        with phases("syncing"):
            closed = _close(files, ranks.check)
    report = RankReport(
        rank=ranks.rank,
        host=socket.gethostname(),
        device=str(device.torch_device),
        threads=budget.threads,
        bytes_read=sum(reader.bytes_read for reader in readers),
        bytes_written=sum(file.bytes_written for file in files),
        seconds=time.perf_counter() - started,
        phases=phases.seconds(budget.threads),
    )
    return RankResult(
        files=[{file.path.name: closed[file]} for file in files],
        ledgers=[reader.ledger for reader in readers],
        digests=digests,
        report=report,
    )


def _open_targets(
    job: Job,
    ranks: Ranks,
    part: Part,
    directories: list[Path],
    readers: list[CheckpointReader],
    phases: Phases,
) -> list[Target]:
    with phases("waiting"):
        for directory in directories:
            wait_for_directory(directory, ranks.check)
    return [
        _open_target(job, k, ranks.rank, part, directory, readers)
        for k, directory in enumerate(directories)
    ]


def _open_target(
    job: Job,
    k: int,
    rank: int,
    part: Part,
    directory: Path,
    readers: list[CheckpointReader],
) -> Target:
    product, placed = job.products[k], job.placed(k, rank, part)
    file = CheckpointFile(directory / file_name(rank), keep_journal=True)
    reader = readers[product.members[-1]]
    for one in placed:
        if one.item.box is None:
            common = one.item.key == job.common_key(product)
            file.write_bytes(one, product.common if common else _object(reader, one))
    return Target(file, places(placed))


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


def _object(reader: CheckpointReader, placed: Placed) -> bytes:
    return reader.read_object(reader.layout.objects[placed.item.key])


def _device(job: Job, tasks: Sequence[Task]) -> Device:
    sources, merges = len(job.sources), len(job.products)
    read = sum(task.box.numel * task.recipe.cost(sources, 0) for task in tasks)
    threads = job.config.threads or default_threads()
    device = choose_device(job.config.device, sources, merges, read, threads, local_rank())
    logger.info("sums on %s: %s", device.torch_device, device.reason)
    return device


def _budget(job: Job, device: Device) -> Budget:
    config = job.config
    return make_budget(
        _memory(job),
        config.threads or default_threads(),
        len(job.sources),
        len(job.products),
        job.plan.recipes,
        blocks=STREAMS if config.direct_io else 1,
        depth=device.depth,
        wanted_bytes=device.wanted_bytes,
    )


def _memory(job: Job) -> int:
    return job.config.memory or default_memory()


def default_threads() -> int:
    """The cores that this process may use, at most 16: more wait for each other."""
    return min(MAX_THREADS, len(os.sched_getaffinity(0)))


def _allow_many_files() -> None:
    """Many sources times many files each can pass the usual soft limit of 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _ignore(_: int) -> None:
    """Progress that nobody watches."""
