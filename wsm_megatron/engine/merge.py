"""``merge``: from a config to published checkpoints, on one rank or many."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import resource
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from wsm_megatron.checkpoint.direct import STREAMS
from wsm_megatron.checkpoint.layout import COMMON_FILE, MARKER_FILE, METADATA_FILE
from wsm_megatron.checkpoint.patience import check_storage
from wsm_megatron.checkpoint.reader import CheckpointReader, Ledger
from wsm_megatron.checkpoint.run import write_tracker
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
from wsm_megatron.engine.budget import Budget, default_memory, make_budget
from wsm_megatron.engine.chain import Digests
from wsm_megatron.engine.device import Device, choose_device, local_rank
from wsm_megatron.engine.job import Job, Part, Product, places, prepare_job
from wsm_megatron.engine.parallel import prepare_spread
from wsm_megatron.engine.plan import Task
from wsm_megatron.engine.provenance import holds_merge, write_provenance
from wsm_megatron.engine.publish import Staging, copy_side_files
from wsm_megatron.engine.run import Progress, Share, Target
from wsm_megatron.engine.steps import (
    STEP_BYTES,
    check_shared,
    check_sources,
    connect,
    copy_beside,
    run_steps,
)
from wsm_megatron.engine.wire import Wire
from wsm_megatron.errors import MergeError, PassingError

logger = logging.getLogger(__name__)

MAX_THREADS = 16

ProgressFactory = Callable[[int, int], AbstractContextManager[Progress]]
"""Called on every rank with its number and the bytes it will read and write."""

Files = dict[str, tuple[int, int]]
"""Size and CRC-32 of files, by name."""


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
    digests: Digests = field(default_factory=Digests)
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
    with job_ranks() as ranks:
        job, missing = _prepare(config, ranks)
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


def prepare(config: MergeConfig, ranks: Ranks) -> Job:
    """The job of a config, on every rank. Collective. Raises as :func:`merge` does."""
    if config.source_parallel:
        return prepare_spread(config, ranks)
    return ranks.from_first(lambda: prepare_job(config), "planning")


def _prepare(config: MergeConfig, ranks: Ranks) -> tuple[Job, list[int]]:
    """The job, and which of its products are not published yet. Collective."""
    if not config.source_parallel:
        return ranks.from_first(lambda: _with_missing(prepare_job(config)), "planning")
    job = prepare_spread(config, ranks)
    return job, ranks.from_first(lambda: _with_missing(job)[1], "planning")


def _with_missing(job: Job) -> tuple[Job, list[int]]:
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
    wire = None
    try:
        directories = ranks.from_first(lambda: _create(staging, job), "preparing the target")
        if job.spread is not None:
            check_shared(directories[0], ranks)
        with ranks.together("merging"):
            parts = job.parts(ranks.size)
            wire = connect(job, ranks) if job.spread is not None else None
            result = _run_share(job, ranks, parts[ranks.rank], directories, wire, progress)
        results = ranks.gather(result)
        if job.spread is not None:
            with ranks.together("checking the sources"):
                ledgers = [one.ledgers for one in results]
                check_sources(job, ranks.rank, ledgers, [one.digests for one in results])
        with ranks.together("publishing"):
            if ranks.rank == 0:
                _publish(job, parts, staging, results)
    except BaseException as error:
        if wire is not None:
            wire.abandon()
        in_vain = isinstance(error, (ValueError, MergeError)) and not isinstance(
            error, PassingError
        )
        for one in staging if ranks.rank == 0 else ():
            one.discard() if in_vain else one.keep()
        raise
    return results


def _key(job: Job, product: Product, ranks: int) -> str:
    """Tells merges apart whose files differ in any byte, or whose sources were written anew."""
    members = [job.fingerprint(j) for j in product.members]
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


def _device(job: Job, tasks: Sequence[Task]) -> Device:
    sources, merges = len(job.sources), len(job.products)
    read = sum(task.box.numel * task.recipe.cost(sources, 0) for task in tasks)
    threads = job.config.threads or default_threads()
    device = choose_device(job.config.device, sources, merges, read, threads, local_rank())
    logger.info("sums on %s: %s", device.torch_device, device.reason)
    return device


def _memory(job: Job) -> int:
    return job.config.memory or default_memory()


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


def _run_share(
    job: Job,
    ranks: Ranks,
    part: Part,
    directories: list[Path],
    wire: Wire | None,
    progress: ProgressFactory | None,
) -> _RankResult:
    _allow_many_files()
    result = _RankResult()
    with ExitStack() as stack:
        device = _device(job, part.tasks)
        budget = _budget(job, device)
        readers = [
            CheckpointReader(source.layout, job.config.retries, budget.ahead, job.config.direct_io)
            for source in job.sources
        ]
        for reader in readers:
            stack.callback(reader.close)
        targets = [
            _open_target(job, k, ranks.rank, part, directory, readers)
            for k, directory in enumerate(directories)
        ]

        def check() -> None:
            ranks.check()
            check_storage()

        cost = job.cost(part.tasks) + job.cost_of_steps(ranks.rank)
        bar = progress(ranks.rank, cost) if progress else nullcontext(_ignore)
        try:
            advance = stack.enter_context(bar)
            if job.spread is not None:
                threads = max(1, min(budget.threads, _memory(job) // STEP_BYTES))
                result.digests = run_steps(
                    job, ranks, wire, readers, targets, threads, check, advance
                )
            share = Share(
                readers,
                [product.merge for product in job.products],
                targets,
                budget,
                device,
                allow_nonfinite=job.config.allow_nonfinite,
                progress=advance,
            )
            share.run(part.tasks, check)
        except BaseException:
            for target in targets:
                target.file.abandon()
            raise
        if job.spread is not None:
            copy_beside(job, ranks.rank, directories)
        for target in targets:
            result.files.append({target.file.path.name: target.file.close()})
            result.bytes_written += target.file.bytes_written
        result.ledgers = [reader.ledger for reader in readers]
        result.bytes_read = sum(reader.bytes_read for reader in readers)
    return result


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


def _object(reader: CheckpointReader, placed: Placed) -> bytes:
    return reader.read_object(reader.layout.objects[placed.item.key])


def _publish(
    job: Job, parts: Sequence[Part], staging: list[Staging], results: list[_RankResult]
) -> None:
    """Check what was read, complete every product's directory, give it its name. On rank 0."""
    for j, source in enumerate(job.sources if job.spread is None else ()):
        reader = CheckpointReader(source.layout)
        try:
            reader.verify([result.ledgers[j] for result in results])
        finally:
            reader.close()
        source.check_unchanged()
    for k, stage in enumerate(staging):
        files: Files = {}
        for result in results:
            files.update(result.files[k])
        _complete(job, k, parts, stage.path, files)
        path = stage.commit()
        logger.info("published %s", path)


def _complete(job: Job, k: int, parts: Sequence[Part], directory: Path, files: Files) -> None:
    product = job.products[k]
    newest = job.newest(product)
    placed = [one for rank, part in enumerate(parts) for one in job.placed(k, rank, part)]
    files[METADATA_FILE] = write_metadata(directory, placed, newest.mcore_data)
    if job.common_key(product) is None:
        files[COMMON_FILE] = write_file(directory / COMMON_FILE, product.common)
    if job.spread is None:
        copy_side_files(newest.path, directory)
    files[MARKER_FILE] = write_marker(directory, job.marker(product))
    write_provenance(directory, product.provenance, files)


def _ignore(_: int) -> None:
    """Progress that nobody watches."""
