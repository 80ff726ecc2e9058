"""``merge``: from a config to published checkpoints, on one rank or many."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
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
from wsm_megatron.execution.observer import trajectory_of
from wsm_megatron.execution.rank import ProgressFactory, RankResult, observe_rank
from wsm_megatron.execution.result import MergedCheckpoint, MergeReport
from wsm_megatron.execution.timing import Phases, RankReport
from wsm_megatron.export.job import ExportReport, export
from wsm_megatron.export.options import MergeExport
from wsm_megatron.export.plan import ExportPlan, make_plan
from wsm_megatron.inspection.trajectory import write_trajectory
from wsm_megatron.planning.job import Job, OutputCheckpoint, RankPlan
from wsm_megatron.planning.merge_set import MergeSet
from wsm_megatron.planning.provenance import write_provenance
from wsm_megatron.planning.staging_key import placement, staging_key
from wsm_megatron.planning.targets import Claims
from wsm_megatron.process.signals import ending_later
from wsm_megatron.storage.retry import check_storage
from wsm_megatron.storage.visibility import wait_for_files
from wsm_megatron.trajectory.record import Trajectory
from wsm_megatron.version import __version__

logger = logging.getLogger(__name__)


def merge(
    config: MergeConfig,
    execution: ExecutionOptions = ExecutionOptions(),
    progress: ProgressFactory | None = None,
) -> MergeReport:
    """Merge checkpoints of a run into one and publish it.

    Collective: under ``torchrun`` or ``srun`` every rank calls it with the same options. The result
    does not depend on the number of ranks. Sources are never written to. What an earlier run has
    published already is left as it is.

    Args:
        config: what to merge.
        execution: how the job runs.
        progress: shows progress; called on every rank.

    Raises:
        UsageError: the options do not fit the run.
        MergeError: a source is damaged, or the target cannot be written. Nothing is published.
    """
    return merge_together(MergeSet.of(config), execution, progress, asdict(config))


def merge_together(
    merges: MergeSet,
    execution: ExecutionOptions = ExecutionOptions(),
    progress: ProgressFactory | None = None,
    told: Mapping[str, Any] | None = None,
    planned: Callable[[Job, Estimate], None] = lambda job, estimate: None,
) -> MergeReport:
    """:func:`merge` of merges that are made of one read. Collective.

    Args:
        told: the options that were given, for the event log.
        planned: called on rank 0 before anything is written; what it raises is raised on all.
    """
    started, phases = time.monotonic(), Phases()
    with job_ranks() as ranks, ranks.watching(check_storage):
        access = _access(merges, execution, ranks)
        access.check_options()
        options = {**(told or {}), **asdict(execution)}
        with job_events(execution.log_json, ranks, __version__, options) as events:
            with phases("planning" if ranks.rank == 0 else "waiting"):
                job = access.prepare()
                with ranks.together("planning"):
                    if ranks.rank == 0:
                        planned(job, access.estimate(job))
            reports, trajectory = _merge_missing(job, access, ranks, progress, phases, events)
            report = MergeReport(
                merged=tuple(_merged(job, output) for output in job.outputs),
                bytes_read=sum(one.bytes_read for one in reports),
                bytes_written=sum(one.bytes_written for one in reports),
                seconds=time.monotonic() - started,
                ranks=tuple(reports),
                trajectory=trajectory,
            )
            with ranks.together("writing the trajectory"):
                if trajectory is not None:
                    write_trajectory(merges.save, trajectory)
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

    def planned(job: Job, estimate: Estimate) -> None:
        if not execution.node_local:
            plan_exports(job, exports, config.save)

    with job_ranks():
        merges = MergeSet.of(config)
        report = merge_together(merges, execution, progress, asdict(config), planned)
        configs = [exports.of(one.output, config.save) for one in report.merged]
        return report, [export(one, execution, progress) for one in configs]


def plan_exports(job: Job, exports: MergeExport, root: Path) -> list[tuple[Path, ExportPlan]]:
    """Where the exports of a job's merges below ``root`` go, and what they will hold, told by its
    sources.

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
    return plan_together(MergeSet.of(config), execution)


def plan_together(
    merges: MergeSet, execution: ExecutionOptions = ExecutionOptions()
) -> tuple[Job, Estimate] | None:
    """:func:`plan` of what :func:`merge_together` would do. Collective."""
    with job_ranks() as ranks:
        access = _access(merges, execution, ranks)
        access.check_options()
        job = access.prepare()
        return (job, access.estimate(job)) if ranks.rank == 0 else None


def trajectory(
    merges: MergeSet,
    execution: ExecutionOptions = ExecutionOptions(),
    progress: ProgressFactory | None = None,
) -> Trajectory | None:
    """Read the sources of merges for their trajectory alone; writes nothing. Collective.

    Returns:
        what was found, on rank 0; elsewhere None.

    Raises as :func:`merge` does.
    """
    execution = replace(execution, trajectory=True)
    with job_ranks() as ranks, ranks.watching(check_storage):
        access, phases = Shared(merges, execution, ranks), Phases()
        work = access.distribute(access.prepare())
        with access.watching(work.job), ranks.together("reading"):
            result = observe_rank(work.job, ranks, work.rank_plan, progress, phases)
        access.verify(work.job, result)
        return _observed(work.job, ranks, result)


def _access(merges: MergeSet, execution: ExecutionOptions, ranks: Ranks) -> Access:
    return (NodeLocal if execution.node_local else Shared)(merges, execution, ranks)


def _merge_missing(
    job: Job,
    access: Access,
    ranks: Ranks,
    progress: ProgressFactory | None,
    phases: Phases,
    events: Events,
) -> tuple[list[RankReport], Trajectory | None]:
    """Make the outputs that are not there yet, nor by the time that their targets are free.
    Collective.

    Returns:
        what each rank did; on rank 0 the trajectory of the sources, where it is wanted.
    """
    with Claims() as claims, ranks.watching(claims.check):
        with phases("waiting"):
            missing = ranks.broadcast(lambda: claims.take(job, ranks.check), "preparing the target")
        if not missing:
            return [], None
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
) -> tuple[list[RankReport], Trajectory | None]:
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
        trajectory = _observed(job, ranks, result)
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
    return _reports(reports, phases), trajectory


def _observed(job: Job, ranks: Ranks, result: RankResult) -> Trajectory | None:
    """The trajectory of a job's sources, where it is wanted, on rank 0; it warns of what is off the
    path. Collective."""
    if not job.execution.trajectory:
        return None
    of_ranks, found = ranks.gather(result.grams), None
    with ranks.together("comparing the sources"):
        if ranks.rank == 0:
            found = trajectory_of(job, of_ranks)
            for warning in () if found is None else found.warnings():
                logger.warning("%s", warning)
    return found


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
