"""``merge``: from a config to published checkpoints, on one rank or many."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from wsm_megatron.access.node_local.access import NodeLocal
from wsm_megatron.access.protocol import Access, Estimate
from wsm_megatron.access.shared import Shared
from wsm_megatron.checkpoint.staging_dir import StagingDirectory
from wsm_megatron.comm.communicator import Ranks, job_ranks
from wsm_megatron.comm.event_log import Events, job_events
from wsm_megatron.config import ExecutionOptions, MergeConfig
from wsm_megatron.errors import MergeError, PassingError, UsageError
from wsm_megatron.execution.observer import trajectory_of
from wsm_megatron.execution.rank import ProgressFactory, RankResult, observe_rank
from wsm_megatron.execution.result import MergedCheckpoint, MergeReport
from wsm_megatron.execution.targets import CheckpointDirectory, Destination
from wsm_megatron.execution.timing import Phases, RankReport
from wsm_megatron.export.job import ExportReport, export
from wsm_megatron.export.merged import MergedExports
from wsm_megatron.export.options import ExportConfig, MergeExport
from wsm_megatron.export.turn import turn
from wsm_megatron.inspection.trajectory import write_trajectory
from wsm_megatron.planning.job import Job, RankPlan
from wsm_megatron.planning.merge_set import MergeSet
from wsm_megatron.planning.targets import Claims
from wsm_megatron.publication import publish, staging_directories
from wsm_megatron.storage.retry import check_storage
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
    exports: MergedExports | None = None,
) -> MergeReport:
    """:func:`merge` of merges that are made of one read. Collective.

    Args:
        told: the options that were given, for the event log.
        planned: called on rank 0 before anything is written; what it raises is raised on all.
        exports: made in the same pass, or instead.
    """
    started, phases = time.monotonic(), Phases()
    exports = exports or MergedExports(MergeExport(), merges.save)
    with job_ranks() as ranks, ranks.watching(check_storage):
        access = _access(merges, execution, ranks)
        access.check_options()
        with ranks.together("checking the options"):
            if ranks.rank == 0:
                exports.check_options(merges, execution)
        options = {**(told or {}), **asdict(execution)}
        with job_events(execution.log_json, ranks, __version__, options) as events:
            with phases("planning" if ranks.rank == 0 else "waiting"):
                job = access.prepare()
                with ranks.together("planning"):
                    if ranks.rank == 0:
                        job = exports.plan(job)
                        planned(job, access.estimate(job))
            reports, trajectory, made = _merge_missing(
                job, access, ranks, exports, progress, phases, events
            )
            report = MergeReport(
                merged=tuple(_merged(job, k, k in made) for k in range(len(job.outputs))),
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
    """:func:`merge`, and an export of each merge in the same pass. Collective.

    Raises:
        UsageError: as for :func:`merge` and :func:`.export`; then nothing was done.
        MergeError: as for these.
    """
    made = MergedExports(exports, config.save)
    return merge_and_export_together(MergeSet.of(config), made, execution, progress, asdict(config))


def merge_and_export_together(
    merges: MergeSet,
    exports: MergedExports,
    execution: ExecutionOptions = ExecutionOptions(),
    progress: ProgressFactory | None = None,
    told: Mapping[str, Any] | None = None,
    planned: Callable[[Job, Estimate], None] = lambda job, estimate: None,
) -> tuple[MergeReport, list[ExportReport]]:
    """:func:`merge_and_export` of merges that are made of one read. Collective.

    An export of a merge that was published before is made from there.

    Args:
        told, planned: as for :func:`merge_together`.
    """
    with job_ranks() as ranks:
        report = merge_together(merges, execution, progress, told, planned, exports)
        if not exports.wanted:
            return report, []
        found = ranks.broadcast(lambda: exports.reports(report.seconds), "reporting")
        return report, [
            export(one, execution, progress) if isinstance(one, ExportConfig) else one
            for one in (found[merged.output] for merged in report.merged)
        ]


def plan(
    config: MergeConfig,
    execution: ExecutionOptions = ExecutionOptions(),
    exports: MergedExports | None = None,
) -> tuple[Job, Estimate] | None:
    """What :func:`merge` would do: on rank 0 the job, and what it moves; elsewhere None. Writes
    nothing.

    Collective. Raises as :func:`merge` does.

    Args:
        exports: are planned with it.
    """
    return plan_together(MergeSet.of(config), execution, exports)


def plan_together(
    merges: MergeSet,
    execution: ExecutionOptions = ExecutionOptions(),
    exports: MergedExports | None = None,
) -> tuple[Job, Estimate] | None:
    """:func:`plan` of what :func:`merge_together` would do. Collective."""
    exports = exports or MergedExports(MergeExport(), merges.save)
    with job_ranks() as ranks:
        access = _access(merges, execution, ranks)
        access.check_options()
        with ranks.together("checking the options"):
            if ranks.rank == 0:
                exports.check_options(merges, execution)
        job = access.prepare()
        if ranks.rank != 0:
            return None
        job = exports.plan(job)
        return job, access.estimate(job)


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
    exports: MergedExports,
    progress: ProgressFactory | None,
    phases: Phases,
    events: Events,
) -> tuple[list[RankReport], Trajectory | None, list[int]]:
    """Make the outputs that are not there yet, nor by the time that their targets are free.
    Collective.

    Returns:
        what each rank did; on rank 0 the trajectory of the sources, where it is wanted; which of
        the outputs were made.
    """

    def take() -> list[int]:
        every = list(range(len(job.outputs)))
        wanted = every if exports.only else claims.take(job, ranks.check)
        return exports.take(job, wanted, ranks.check)

    with Claims() as claims, exports, ranks.watching(claims.check), ranks.watching(exports.check):
        with phases("waiting"):
            missing = ranks.broadcast(take, "preparing the target")
        if not missing:
            return [], None, []
        left = access.only(job, missing)
        done = _merge_products(left, access, ranks, claims, exports, progress, phases, events)
        return *done, missing


def _merge_products(
    job: Job,
    access: Access,
    ranks: Ranks,
    claims: Claims,
    exports: MergedExports,
    progress: ProgressFactory | None,
    phases: Phases,
    events: Events,
) -> tuple[list[RankReport], Trajectory | None]:
    staging: list[StagingDirectory] = []
    try:
        with phases("planning" if ranks.rank == 0 else "waiting"):
            work = access.distribute(job)
        if ranks.rank == 0:
            staging = [] if exports.only else staging_directories(job, work.rank_plans, claims)
            events.tell("planned", **_plan_data(job, access.estimate(job), work.rank_plans))
        ranks.broadcast(lambda: [one.create() for one in staging], "preparing the target")
        destinations = ranks.scatter(
            lambda rank: _destinations(job, work.rank_plans[rank], staging, exports),
            "preparing the target",
        )
        cost = sum(rank_plan.nbytes for rank_plan in work.rank_plans)
        with access.watching(job), events.progress(cost):
            result = access.run(work, destinations, progress, phases)
            events.exchange()
            reports = ranks.all_gather(result.report)
            results = ranks.gather((result.files, result.shared))
            _turn(job, ranks, exports)
        access.verify(job, result)
        trajectory = _observed(job, ranks, result)
        with ranks.together("publishing"), phases("publishing"):
            if ranks.rank == 0:
                for _, shared in results:
                    for output, written in zip(job.outputs, shared, strict=True):
                        exports.add(output, written)
                files = [of_rank for of_rank, _ in results]
                publish(job, ranks, work.rank_plans, staging, exports, files, events)
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


def _destinations(
    job: Job, rank_plan: RankPlan, staging: Sequence[StagingDirectory], exports: MergedExports
) -> list[Destination]:
    """Where a rank puts each output."""
    checkpoints: list[CheckpointDirectory | None] = [None] * len(job.outputs)
    if not exports.only:
        checkpoints = [CheckpointDirectory(one.path) for one in staging]
    every = zip(job.outputs, checkpoints, rank_plan.written, strict=True)
    return [exports.destination(*one) for one in every]


def _turn(job: Job, ranks: Ranks, exports: MergedExports) -> None:
    """The last step of exports that have transposed matrices. Collective."""
    own = ranks.scatter(lambda rank: exports.to_turn(rank, ranks.size), "exporting")
    with ranks.together("exporting"):
        written = turn(own, job.execution, ranks.check)
    for of_rank in ranks.gather(written):
        exports.add_turned(of_rank)


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


def _merged(job: Job, k: int, made: bool) -> MergedCheckpoint:
    output = job.outputs[k]
    return MergedCheckpoint(
        output=output.path,
        iterations=job.iterations(output),
        decay=output.decay,
        resume=output.provenance["resume"],
        made=made,
    )
