"""``merge``: from a config to published checkpoints, on one rank or many."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import resource
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from wsm_megatron.checkpoint.layout import COMMON_FILE, MARKER_FILE, METADATA_FILE
from wsm_megatron.checkpoint.patience import check_storage
from wsm_megatron.checkpoint.reader import CheckpointReader, Ledger
from wsm_megatron.checkpoint.run import write_tracker
from wsm_megatron.checkpoint.visible import wait_for_directory, wait_for_files
from wsm_megatron.checkpoint.writer import (
    CheckpointFile,
    Placed,
    file_name,
    write_file,
    write_marker,
    write_metadata,
)
from wsm_megatron.config import MergeConfig
from wsm_megatron.distributed import Ranks, job_ranks
from wsm_megatron.engine.crew import work_through
from wsm_megatron.engine.job import Job, Product, places, prepare_job
from wsm_megatron.engine.plan import Task
from wsm_megatron.engine.provenance import holds_merge, write_provenance
from wsm_megatron.engine.publish import Staging, copy_side_files
from wsm_megatron.engine.run import Progress, Share, Target
from wsm_megatron.engine.watch import SourceWatch
from wsm_megatron.errors import MergeError, PassingError, StorageError

logger = logging.getLogger(__name__)

MAX_THREADS = 16

ProgressFactory = Callable[[int, int], AbstractContextManager[Progress]]
"""Called on every rank with its number and the bytes it will read and write."""

Files = dict[str, tuple[int, int]]
"""Size and CRC-32 of files, by name."""


Shares = Sequence[Sequence[Task]]
"""Every rank's tasks."""


@dataclass(frozen=True)
class MergedCheckpoint:
    """One published checkpoint.

    Attributes:
        iterations: of its sources, oldest first; as coefficients.
        resume: what became of the optimizer state and how to launch Megatron, as in
            ``wsm_merge.json``.
    """

    output: Path
    iterations: tuple[int, ...]
    coefficients: tuple[float, ...]
    effective_lr: tuple[float, ...]
    resume: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class MergeReport:
    """What a merge did. Bytes are those of tensors and objects, over all ranks."""

    merged: tuple[MergedCheckpoint, ...]
    bytes_read: int
    bytes_written: int
    seconds: float

    @property
    def output(self) -> Path:
        """The merged checkpoint; of several, the last one published."""
        return self.merged[-1].output

    @property
    def iterations(self) -> tuple[int, ...]:
        return self.merged[-1].iterations

    @property
    def coefficients(self) -> tuple[float, ...]:
        return self.merged[-1].coefficients

    @property
    def effective_lr(self) -> tuple[float, ...]:
        return self.merged[-1].effective_lr

    @property
    def resume(self) -> dict[str, Any]:
        return self.merged[-1].resume


@dataclass
class _RankResult:
    """What a rank hands to rank 0: its files for each product, and its unfinished checksums."""

    files: list[Files] = field(default_factory=list)
    ledgers: list[Ledger] = field(default_factory=list)
    bytes_read: int = 0
    bytes_written: int = 0


def merge(config: MergeConfig, progress: ProgressFactory | None = None) -> MergeReport:
    """Merge checkpoints of a run into one and publish it.

    Collective: under ``torchrun`` or ``srun`` every rank calls it with the same config. The result
    does not depend on the number of ranks. Sources are never written to. What an earlier run has
    published already is left as it is.

    Args:
        config: what to merge, and how.
        progress: shows progress; called on every rank.

    Raises:
        ValueError: the options do not fit the run.
        MergeError: a source is damaged, or the target cannot be written. Nothing is published.
    """
    started = time.monotonic()
    with job_ranks() as ranks, ranks.watching(check_storage):
        job, missing = ranks.from_first(lambda: _prepare(config), "planning")
        results = []
        if missing:
            products = tuple(job.products[k] for k in missing)
            results = _merge_products(replace(job, products=products), ranks, progress)
    return MergeReport(
        merged=tuple(_merged(job, product) for product in job.products),
        bytes_read=sum(result.bytes_read for result in results),
        bytes_written=sum(result.bytes_written for result in results),
        seconds=time.monotonic() - started,
    )


def _prepare(config: MergeConfig) -> tuple[Job, list[int]]:
    """The job, and which of its products are not published yet. On rank 0."""
    job = prepare_job(config)
    missing = []
    for k, product in enumerate(job.products):
        if holds_merge(product.path, product.provenance):
            logger.warning("%s holds this very merge already", product.path)
            write_tracker(product.root, product.iteration)  # the earlier run may have died before
        else:
            missing.append(k)
    return job, missing


def _merge_products(job: Job, ranks: Ranks, progress: ProgressFactory | None) -> list[_RankResult]:
    staging = [
        Staging(product.root, product.iteration, _key(job, product, ranks.size))
        for product in job.products
    ]
    try:
        directories = ranks.from_first(lambda: _create(staging, job), "preparing the target")
        with _watching_sources(job, ranks):
            with ranks.together("merging"):
                shares = job.shares(ranks.size)
                result = _run_share(job, ranks, shares[ranks.rank], directories, progress)
            results = ranks.gather(result)
        with ranks.together("publishing"):
            if ranks.rank == 0:
                _publish(job, ranks, shares, staging, results)
    except BaseException as error:
        in_vain = isinstance(error, (ValueError, MergeError)) and not isinstance(
            error, PassingError
        )
        for one in staging if ranks.rank == 0 else ():
            one.discard() if in_vain else one.keep()
        raise
    return results


@contextmanager
def _watching_sources(job: Job, ranks: Ranks) -> Iterator[None]:
    """Rank 0 looks at the sources while they are read; all ranks raise when one has changed."""
    if ranks.rank != 0:
        yield
        return
    with SourceWatch(job.sources) as watch, ranks.watching(watch.check):
        yield


def _key(job: Job, product: Product, ranks: int) -> str:
    """Tells merges apart whose files differ in any byte, or whose sources were written anew."""
    members = [job.sources[j].fingerprint for j in product.members]
    outputs = [one.path.name for one in job.products]
    text = json.dumps([product.provenance, members, outputs, ranks])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def default_threads() -> int:
    """The cores that this process may use, at most 16: more wait for each other."""
    return min(MAX_THREADS, len(os.sched_getaffinity(0)))


def _merged(job: Job, product: Product) -> MergedCheckpoint:
    return MergedCheckpoint(
        output=product.path,
        iterations=job.iterations(product),
        coefficients=product.decay.coefficients,
        effective_lr=product.decay.effective_lr,
        resume=product.provenance["resume"],
    )


def _create(staging: list[Staging], job: Job) -> list[Path]:
    share = job.bytes_to_write() // len(staging)
    return [one.create(share) for one in staging]


def _allow_many_files() -> None:
    """Many sources times many files each can pass the usual soft limit of 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _run_share(
    job: Job,
    ranks: Ranks,
    tasks: Sequence[Task],
    directories: list[Path],
    progress: ProgressFactory | None,
) -> _RankResult:
    _allow_many_files()
    result = _RankResult()
    with ExitStack() as stack:
        retries = job.config.retries
        readers = [CheckpointReader(source.layout, retries) for source in job.sources]
        for reader in readers:
            stack.callback(reader.close)
        for directory in directories:
            wait_for_directory(directory, ranks.check)
        targets = [
            _open_target(job, product, ranks.rank, tasks, directory, readers)
            for product, directory in zip(job.products, directories, strict=True)
        ]

        bar = progress(ranks.rank, job.cost(tasks)) if progress else nullcontext(_ignore)
        try:
            share = Share(
                readers,
                [product.merge for product in job.products],
                targets,
                allow_nonfinite=job.config.allow_nonfinite,
                progress=stack.enter_context(bar),
            )
            share.run(tasks, job.config.threads or default_threads(), ranks.check)
        except BaseException:
            _abandon([target.file for target in targets])
            raise
        closed = _close([target.file for target in targets], ranks.check)
        result.files = [{file.path.name: size_and_crc} for file, size_and_crc in closed]
        result.bytes_written = sum(target.file.bytes_written for target in targets)
        result.ledgers = [reader.ledger for reader in readers]
        result.bytes_read = sum(reader.bytes_read for reader in readers)
    return result


def _open_target(
    job: Job,
    product: Product,
    rank: int,
    tasks: Sequence[Task],
    directory: Path,
    readers: list[CheckpointReader],
) -> Target:
    placed = job.placed(product, rank, tasks)
    file = CheckpointFile(directory / file_name(rank), keep_journal=True)
    reader = readers[product.members[-1]]
    for one in placed:
        if one.item.box is None:
            common = one.item.key == job.common_key(product)
            file.write_bytes(one, product.common if common else _object(reader, one))
    return Target(file, places(placed))


def _close(
    files: list[CheckpointFile], check: Callable[[], None]
) -> list[tuple[CheckpointFile, tuple[int, int]]]:
    """Make files durable, several at a time; each with its size and CRC-32, in order."""
    closed: dict[CheckpointFile, tuple[int, int]] = {}

    def close(file: CheckpointFile) -> None:
        closed[file] = file.close()

    work_through(files, close, min(len(files), MAX_THREADS), threading.Event(), check)
    return [(file, closed[file]) for file in files]


def _abandon(files: list[CheckpointFile]) -> None:
    """Close files after a failure. Storage that hangs is not waited for."""
    try:
        work_through(files, CheckpointFile.abandon, 1, threading.Event(), check_storage)
    except StorageError as error:
        logger.warning("%s; what is not synced is made again", error)


def _object(reader: CheckpointReader, placed: Placed) -> bytes:
    return reader.read_object(reader.layout.objects[placed.item.key])


def _publish(
    job: Job, ranks: Ranks, shares: Shares, staging: list[Staging], results: list[_RankResult]
) -> None:
    """Check what was read, complete every product's directory, give it its name. On rank 0."""
    for j, source in enumerate(job.sources):
        reader = CheckpointReader(source.layout)
        try:
            reader.verify([result.ledgers[j] for result in results])
        finally:
            reader.close()
        source.check_unchanged()
    for k, (product, stage) in enumerate(zip(job.products, staging, strict=True)):
        files: Files = {}
        for result in results:
            files.update(result.files[k])
        sizes = {name: size for name, (size, _) in files.items()}
        wait_for_files(stage.path, sizes, ranks.check)
        _complete(job, product, shares, stage.path, files)
        path = stage.commit()
        logger.info("published %s", path)


def _complete(job: Job, product: Product, shares: Shares, directory: Path, files: Files) -> None:
    newest = job.newest(product)
    placed = [one for rank, tasks in enumerate(shares) for one in job.placed(product, rank, tasks)]
    files[METADATA_FILE] = write_metadata(directory, placed, newest.mcore_data)
    if job.common_key(product) is None:
        files[COMMON_FILE] = write_file(directory / COMMON_FILE, product.common)
    copy_side_files(newest.path, directory)
    files[MARKER_FILE] = write_marker(directory, job.marker(product))
    write_provenance(directory, product.provenance, files)


def _ignore(_: int) -> None:
    """Progress that nobody watches."""
