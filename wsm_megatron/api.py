"""``merge``: from a config to published checkpoints, on one rank or many."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import wsm_megatron
from wsm_megatron.access.node_local.planning import prepare_spread
from wsm_megatron.access.node_local.stages import check_shared, check_sources, connect
from wsm_megatron.checkpoint.layout import COMMON_FILE, MARKER_FILE, METADATA_FILE
from wsm_megatron.checkpoint.metadata_writer import write_marker, write_metadata
from wsm_megatron.checkpoint.reader import CheckpointReader
from wsm_megatron.checkpoint.side_files import Files
from wsm_megatron.checkpoint.staging_dir import Staging
from wsm_megatron.checkpoint.writer import write_file
from wsm_megatron.comm.communicator import Ranks, job_ranks
from wsm_megatron.comm.event_log import Events, job_events
from wsm_megatron.config import MergeConfig
from wsm_megatron.errors import MergeError, PassingError, UsageError
from wsm_megatron.execution.rank import ProgressFactory, RankResult, run_share
from wsm_megatron.execution.result import MergedCheckpoint, MergeReport
from wsm_megatron.execution.timing import Phases, RankReport
from wsm_megatron.planning.job import Job, Part, Product
from wsm_megatron.planning.output_paths import check_outputs
from wsm_megatron.planning.prepare import prepare_job
from wsm_megatron.planning.provenance import write_provenance
from wsm_megatron.planning.scatter import Dealer, outline
from wsm_megatron.planning.staging_key import placement, staging_key
from wsm_megatron.planning.targets import Claims
from wsm_megatron.process.signals import ending_later
from wsm_megatron.process.worker_threads import in_background
from wsm_megatron.storage.change_watch import SourceWatch
from wsm_megatron.storage.retry import check_storage
from wsm_megatron.storage.visibility import wait_for_files

logger = logging.getLogger(__name__)


def merge(config: MergeConfig, progress: ProgressFactory | None = None) -> MergeReport:
    """Merge checkpoints of a run into one and publish it.

    Collective: under ``torchrun`` or ``srun`` every rank calls it with the same config. The result
    does not depend on the number of ranks. Sources are never written to. What an earlier run has
    published already is left as it is.

    Args:
        config: what to merge, and how.
        progress: shows progress; called on every rank.

    Raises:
        UsageError: the options do not fit the run.
        MergeError: a source is damaged, or the target cannot be written. Nothing is published.
    """
    started, phases = time.monotonic(), Phases()
    with job_ranks() as ranks, ranks.watching(check_storage):
        _check_outputs(config, ranks)
        with job_events(config.log_json, ranks, wsm_megatron.__version__, asdict(config)) as events:
            with phases("planning" if ranks.rank == 0 else "waiting"):
                job = _prepare(config, ranks)
            reports = _merge_missing(job, ranks, progress, phases, events)
            report = MergeReport(
                merged=tuple(_merged(job, product) for product in job.products),
                bytes_read=sum(one.bytes_read for one in reports),
                bytes_written=sum(one.bytes_written for one in reports),
                seconds=time.monotonic() - started,
                ranks=tuple(reports),
            )
            events.exchange()
            events.tell("finished", **report.as_data())
    return report


def prepare(config: MergeConfig, ranks: Ranks) -> Job:
    """The job of a config, on every rank. Collective. Raises as :func:`merge` does."""
    _check_outputs(config, ranks)
    if config.source_parallel:
        return prepare_spread(config, ranks)
    return ranks.from_first(lambda: _plan(config, ranks), "planning")


def _plan(config: MergeConfig, ranks: Ranks) -> Job:
    """On rank 0; minutes for large runs, in which a rank may be lost."""
    return in_background(lambda: prepare_job(config), ranks.check)


def _check_outputs(config: MergeConfig, ranks: Ranks) -> None:
    """Before any file is opened for writing; on every rank, where they see different ones.
    Collective.
    """
    with ranks.together("checking the options"):
        if ranks.rank == 0 or config.source_parallel:
            check_outputs(config)


def _prepare(config: MergeConfig, ranks: Ranks) -> Job:
    """The job; where rank 0 alone plans it, an outline on other ranks. Collective."""
    if config.source_parallel:
        return prepare_spread(config, ranks)
    planned: list[Job] = []

    def plan(rank: int) -> Job:
        if rank == 0:
            planned.append(_plan(config, ranks))
            return planned[0]
        return outline(planned[0])

    return ranks.deal(plan, "planning")


def _merge_missing(
    job: Job,
    ranks: Ranks,
    progress: ProgressFactory | None,
    phases: Phases,
    events: Events,
) -> list[RankReport]:
    """Make the products that are not there yet, nor by the time that their targets are free.
    Collective.
    """
    with Claims() as claims, ranks.watching(claims.check):
        with phases("waiting"):
            missing = ranks.from_first(
                lambda: claims.take(job, ranks.check), "preparing the target"
            )
        if not missing:
            return []
        return _merge_products(job.only(missing), ranks, claims, progress, phases, events)


def _merge_products(
    job: Job,
    ranks: Ranks,
    claims: Claims,
    progress: ProgressFactory | None,
    phases: Phases,
    events: Events,
) -> list[RankReport]:
    with phases("planning" if ranks.rank == 0 else "waiting"):
        parts = job.parts(ranks.size) if ranks.rank == 0 or job.spread is not None else ()
        staging = _staging(job, parts, claims) if ranks.rank == 0 else []
    wire = None
    try:
        directories = ranks.from_first(
            lambda: [one.create() for one in staging], "preparing the target"
        )
        if job.spread is not None:
            check_shared(directories[0], ranks)
        costs = [job.cost_of(rank, part) for rank, part in enumerate(parts)]
        if ranks.rank == 0:
            events.tell("planned", **_plan_data(job, parts))
        own, part = _part(job, parts, ranks)
        with _watching_sources(job, ranks), events.progress(sum(costs)):
            with ranks.together("merging"):
                wire = connect(job, ranks) if job.spread is not None else None
                result = run_share(own, ranks, part, directories, wire, progress, phases)
            events.exchange()
            reports = ranks.gather(result.report)
            results = ranks.collect(result) if job.spread is None else ranks.gather(result)
        if job.spread is not None:
            with ranks.together("checking the sources"):
                ledgers = [one.ledgers for one in results]
                check_sources(job, ranks.rank, ledgers, [one.digests for one in results])
        with ranks.together("publishing"), phases("publishing"):
            if ranks.rank == 0:
                _publish(job, ranks, parts, staging, results, events)
    except BaseException as error:
        if wire is not None:
            wire.abandon()
        in_vain = isinstance(error, (UsageError, MergeError)) and not isinstance(
            error, PassingError
        )
        for one in staging:
            one.discard() if in_vain else one.keep()
        raise
    return _reports(reports, phases)


def _plan_data(job: Job, parts: Sequence[Part]) -> dict[str, Any]:
    return {
        "sources": [str(source.path) for source in job.sources],
        "products": [str(product.path) for product in job.products],
        "bytes_to_read": job.bytes_to_read(),
        "bytes_to_write": job.bytes_to_write(),
        "bytes_to_send": job.bytes_to_send(),
        "tasks_per_rank": [len(part.written[0]) for part in parts],
    }


def _part(job: Job, parts: Sequence[Part], ranks: Ranks) -> tuple[Job, Part]:
    """This rank's part, and the job as far as it needs it. Collective."""
    if job.spread is not None:
        return job, parts[ranks.rank]
    dealer = Dealer(job, parts)
    return ranks.deal(dealer.deal, "planning")


def _reports(own: list[RankReport], phases: Phases) -> list[RankReport]:
    """Each rank's report, with its wait for the slowest; rank 0 has published meanwhile."""
    slowest = max(report.seconds for report in own)
    reports = [report.with_seconds("waiting", slowest - report.seconds) for report in own]
    published = phases.seconds().get("publishing", 0.0)
    return [reports[0].with_seconds("publishing", published), *reports[1:]]


@contextmanager
def _watching_sources(job: Job, ranks: Ranks) -> Iterator[None]:
    """Rank 0, or each rank that sees others, looks at the sources while they are read; all ranks
    raise when one has changed."""
    if ranks.rank != 0 and job.spread is None:
        yield
        return
    with (
        SourceWatch([source for source in job.sources if source.fingerprint]) as watch,
        ranks.watching(watch.check),
    ):
        yield


def _merged(job: Job, product: Product) -> MergedCheckpoint:
    return MergedCheckpoint(
        output=product.path,
        iterations=job.iterations(product),
        decay=product.decay,
        resume=product.provenance["resume"],
    )


def _staging(job: Job, parts: Sequence[Part], claims: Claims) -> list[Staging]:
    staging = []
    for k, product in enumerate(job.products):
        placed = placement(job, k, parts)
        key, files = staging_key(job, product, placed), tuple(placed.sizes)
        lock = claims.lock(product)
        staging.append(Staging(product.root, product.iteration, key, files, lock))
    return staging


def _publish(
    job: Job,
    ranks: Ranks,
    parts: Sequence[Part],
    staging: list[Staging],
    results: list[RankResult],
    events: Events,
) -> None:
    """Check what was read, complete every product's directory, give them their names. On rank 0."""
    for j, source in enumerate(job.sources if job.spread is None else ()):
        reader = CheckpointReader(source.layout)
        try:
            reader.verify([result.ledgers[j] for result in results])
        finally:
            reader.close()
        source.check_unchanged()
    seconds = []
    for k, stage in enumerate(staging):
        started = time.monotonic()
        files: Files = {}
        for result in results:
            files.update(result.files[k])
        sizes = {name: size for name, (size, _) in files.items()}
        wait_for_files(stage.path, sizes, ranks.check)
        _complete(job, k, parts, stage.path, files)
        seconds.append(time.monotonic() - started)
    with ending_later():  # all is done and checked: a signal shall not divide what belongs together
        for stage, before in zip(staging, seconds, strict=True):
            started = time.monotonic()
            path = stage.commit()
            logger.info("published %s", path)
            took = before + time.monotonic() - started
            events.tell("published", path=str(path), publishing_seconds=took)


def _complete(job: Job, k: int, parts: Sequence[Part], directory: Path, files: Files) -> None:
    product = job.products[k]
    newest = job.newest(product)
    if job.spread is None:
        files |= job.copy_beside(product, directory)
    placed = [one for rank, part in enumerate(parts) for one in job.placed(k, rank, part)]
    files[METADATA_FILE] = write_metadata(directory, placed, newest.mcore_data)
    if job.common_key(product) is None:
        files[COMMON_FILE] = write_file(directory / COMMON_FILE, product.common)
    files[MARKER_FILE] = write_marker(directory, job.marker(product))
    write_provenance(directory, product.provenance, files)
