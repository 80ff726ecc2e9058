"""``merge``: from a config to published checkpoints, on one rank or many."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from wsm_megatron.access.node_local.access import NodeLocal
from wsm_megatron.access.protocol import Access, Estimate
from wsm_megatron.access.shared import Shared
from wsm_megatron.checkpoint.layout import COMMON_FILE, MARKER_FILE, METADATA_FILE
from wsm_megatron.checkpoint.metadata_writer import write_marker, write_metadata
from wsm_megatron.checkpoint.side_files import Files
from wsm_megatron.checkpoint.staging_dir import StagingDirectory
from wsm_megatron.checkpoint.writer import write_file
from wsm_megatron.comm.communicator import Ranks, job_ranks
from wsm_megatron.comm.event_log import Events, job_events
from wsm_megatron.config import ExecutionOptions, MergeConfig
from wsm_megatron.errors import MergeError, PassingError, UsageError
from wsm_megatron.execution.rank import ProgressFactory
from wsm_megatron.execution.result import MergedCheckpoint, MergeReport
from wsm_megatron.execution.timing import Phases, RankReport
from wsm_megatron.export.job import ExportReport, export
from wsm_megatron.export.options import MergeExport
from wsm_megatron.export.plan import ExportPlan, make_plan
from wsm_megatron.planning.job import Job, OutputCheckpoint, RankPlan
from wsm_megatron.planning.provenance import write_provenance
from wsm_megatron.planning.staging_key import placement, staging_key
from wsm_megatron.planning.targets import Claims
from wsm_megatron.process.signals import ending_later
from wsm_megatron.storage.retry import check_storage
from wsm_megatron.storage.visibility import wait_for_files
from wsm_megatron.version import __version__

logger = logging.getLogger(__name__)


def merge(
    config: MergeConfig,
    execution: ExecutionOptions = ExecutionOptions(),
    progress: ProgressFactory | None = None,
    check: Callable[[Job], None] = lambda job: None,
) -> MergeReport:
    """Merge checkpoints of a run into one and publish it.

    Collective: under ``torchrun`` or ``srun`` every rank calls it with the same options. The result
    does not depend on the number of ranks. Sources are never written to. What an earlier run has
    published already is left as it is.

    Args:
        config: what to merge.
        execution: how the job runs.
        progress: shows progress; called on every rank.
        check: called on rank 0 with what is planned; what it raises ends the merge.

    Raises:
        UsageError: the options do not fit the run.
        MergeError: a source is damaged, or the target cannot be written. Nothing is published.
    """
    started, phases = time.monotonic(), Phases()
    with job_ranks() as ranks, ranks.watching(check_storage):
        access = _access(config, execution, ranks)
        access.check_options()
        options = asdict(config) | asdict(execution)
        with job_events(execution.log_json, ranks, __version__, options) as events:
            with phases("planning" if ranks.rank == 0 else "waiting"):
                job = access.prepare()
                ranks.broadcast(lambda: check(job), "planning")
            reports = _merge_missing(job, access, ranks, progress, phases, events)
            report = MergeReport(
                merged=tuple(_merged(job, output) for output in job.outputs),
                bytes_read=sum(one.bytes_read for one in reports),
                bytes_written=sum(one.bytes_written for one in reports),
                seconds=time.monotonic() - started,
                ranks=tuple(reports),
            )
            events.exchange()
            events.tell("finished", **report.as_data())
    return report


def merge_and_export(
    config: MergeConfig,
    exports: MergeExport,
    execution: ExecutionOptions = ExecutionOptions(),
    progress: ProgressFactory | None = None,
) -> tuple[MergeReport, list[ExportReport]]:
    """:func:`merge`, and an export of each merge, by the same ranks. Collective.

    Before anything is merged it is known that the newest source could be exported so, where rank 0
    sees all of it. An export of a merge that was published before is made up for.

    Raises:
        UsageError: as for :func:`merge` and :func:`.export`.
        MergeError: as for these. Merges that are published stay.
    """
    if exports.export is None:
        return merge(config, execution, progress), []

    def check(job: Job) -> None:
        if not execution.node_local:
            plan_exports(job, exports, config.save)

    with job_ranks():
        report = merge(config, execution, progress, check)
        configs = [exports.of(one.output, config.save) for one in report.merged]
        return report, [export(one, execution, progress) for one in configs]


def plan_exports(job: Job, exports: MergeExport, root: Path) -> list[tuple[Path, ExportPlan]]:
    """Where the exports of a job's merges go, and what they will hold, told by its sources.

    Args:
        root: of all merges, below which each has its place.

    Raises as :func:`.make_plan` does.
    """
    if exports.export is None:
        return []
    found = []
    for output in job.outputs:
        config = exports.of(output.path, root)
        found.append((config.save, make_plan(replace(config, load=job.newest(output).path))))
    return found


def plan(
    config: MergeConfig, execution: ExecutionOptions = ExecutionOptions()
) -> tuple[Job, Estimate] | None:
    """What :func:`merge` would do: on rank 0 the job, and what it moves; elsewhere None. Writes
    nothing.

    Collective. Raises as :func:`merge` does.
    """
    with job_ranks() as ranks:
        access = _access(config, execution, ranks)
        access.check_options()
        job = access.prepare()
        return (job, access.estimate(job)) if ranks.rank == 0 else None


def _access(config: MergeConfig, execution: ExecutionOptions, ranks: Ranks) -> Access:
    return (NodeLocal if execution.node_local else Shared)(config, execution, ranks)


def _merge_missing(
    job: Job,
    access: Access,
    ranks: Ranks,
    progress: ProgressFactory | None,
    phases: Phases,
    events: Events,
) -> list[RankReport]:
    """Make the outputs that are not there yet, nor by the time that their targets are free.
    Collective.
    """
    with Claims() as claims, ranks.watching(claims.check):
        with phases("waiting"):
            missing = ranks.broadcast(lambda: claims.take(job, ranks.check), "preparing the target")
        if not missing:
            return []
        left = access.only(job, missing)
        return _merge_products(left, access, ranks, claims, progress, phases, events)


def _merge_products(
    job: Job,
    access: Access,
    ranks: Ranks,
    claims: Claims,
    progress: ProgressFactory | None,
    phases: Phases,
    events: Events,
) -> list[RankReport]:
    staging: list[StagingDirectory] = []
    try:
        with phases("planning" if ranks.rank == 0 else "waiting"):
            work = access.distribute(job)
        if ranks.rank == 0:
            staging = _staging(job, work.rank_plans, claims)
            events.tell("planned", **_plan_data(job, access.estimate(job), work.rank_plans))
        directories = ranks.broadcast(
            lambda: [one.create() for one in staging], "preparing the target"
        )
        cost = sum(rank_plan.nbytes for rank_plan in work.rank_plans)
        with access.watching(job), events.progress(cost):
            result = access.run(work, directories, progress, phases)
            events.exchange()
            reports = ranks.all_gather(result.report)
            files = ranks.gather(result.files)
        access.verify(job, result)
        with ranks.together("publishing"), phases("publishing"):
            if ranks.rank == 0:
                _publish(job, ranks, work.rank_plans, staging, files, events)
    except BaseException as error:
        access.abandon()
        in_vain = isinstance(error, (UsageError, MergeError)) and not isinstance(
            error, PassingError
        )
        for one in staging:
            one.discard() if in_vain else one.keep()
        raise
    return _reports(reports, phases)


def _plan_data(job: Job, estimate: Estimate, rank_plans: Sequence[RankPlan]) -> dict[str, Any]:
    return {
        "sources": [str(source.path) for source in job.sources],
        "outputs": [str(output.path) for output in job.outputs],
        "bytes_to_read": estimate.read,
        "bytes_to_write": estimate.written,
        "bytes_to_send": estimate.sent,
        "tasks_per_rank": [len(rank_plan.written[0]) for rank_plan in rank_plans],
    }


def _reports(own: list[RankReport], phases: Phases) -> list[RankReport]:
    """Each rank's report, with its wait for the slowest; rank 0 has published meanwhile."""
    slowest = max(report.seconds for report in own)
    reports = [report.with_seconds("waiting", slowest - report.seconds) for report in own]
    published = phases.seconds().get("publishing", 0.0)
    return [reports[0].with_seconds("publishing", published), *reports[1:]]


def _merged(job: Job, output: OutputCheckpoint) -> MergedCheckpoint:
    return MergedCheckpoint(
        output=output.path,
        iterations=job.iterations(output),
        decay=output.decay,
        resume=output.provenance["resume"],
    )


def _staging(job: Job, rank_plans: Sequence[RankPlan], claims: Claims) -> list[StagingDirectory]:
    staging = []
    for k, output in enumerate(job.outputs):
        placed = placement(job, k, rank_plans)
        key, files = staging_key(job, output, placed), tuple(placed.sizes)
        lock = claims.lock(output)
        staging.append(StagingDirectory(output.root, output.iteration, key, files, lock))
    return staging


def _publish(
    job: Job,
    ranks: Ranks,
    rank_plans: Sequence[RankPlan],
    staging: list[StagingDirectory],
    of_ranks: list[list[Files]],
    events: Events,
) -> None:
    """Complete every output's directory, then give them their names. On rank 0.

    Args:
        of_ranks: ``[rank][output]``: the files that each rank has written.
    """
    seconds = []
    for k, stage in enumerate(staging):
        started = time.monotonic()
        files: Files = {}
        for by_product in of_ranks:
            files.update(by_product[k])
        sizes = {name: size for name, (size, _) in files.items()}
        wait_for_files(stage.path, sizes, ranks.check)
        _complete(job, k, rank_plans, stage.path, files)
        seconds.append(time.monotonic() - started)
    with ending_later():  # all is done and checked: a signal shall not divide what belongs together
        for stage, before in zip(staging, seconds, strict=True):
            started = time.monotonic()
            path = stage.commit()
            logger.info("published %s", path)
            took = before + time.monotonic() - started
            events.tell("published", path=str(path), publishing_seconds=took)


def _complete(
    job: Job, k: int, rank_plans: Sequence[RankPlan], directory: Path, files: Files
) -> None:
    output = job.outputs[k]
    placed = [
        one for rank, rank_plan in enumerate(rank_plans) for one in job.placed(k, rank, rank_plan)
    ]
    named, paths = job.on_disk(output, placed)
    files[METADATA_FILE] = write_metadata(directory, named, job.newest(output).mcore_data, paths)
    if output.common.file is not None:
        files[COMMON_FILE] = write_file(directory / COMMON_FILE, output.common.file)
    if (marker := job.marker(output)) is not None:
        files[MARKER_FILE] = write_marker(directory, marker)
    write_provenance(directory, output.provenance, files)
