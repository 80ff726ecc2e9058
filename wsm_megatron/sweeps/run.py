"""``sweep``: the merges of a grid, made of one read or batch by batch, evaluated, the best kept."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from wsm_megatron.access.protocol import Estimate
from wsm_megatron.api import merge_and_export_together, plan_together
from wsm_megatron.checkpoint.run_directory import TRACKER_FILE, list_checkpoints
from wsm_megatron.checkpoint.staging_dir import advance_tracker, remove
from wsm_megatron.comm.communicator import Ranks, job_ranks
from wsm_megatron.config import ExecutionOptions
from wsm_megatron.errors import UsageError, some
from wsm_megatron.execution.rank import ProgressFactory
from wsm_megatron.export.job import ExportReport
from wsm_megatron.export.merged import MergedExports
from wsm_megatron.export.options import MergeExport
from wsm_megatron.options import COUNT, PATH, SWITCH, option
from wsm_megatron.planning.job import Job
from wsm_megatron.planning.merge_set import MergeSet
from wsm_megatron.storage.durable import fsync_path
from wsm_megatron.storage.retry import watched
from wsm_megatron.sweeps.estimate import SweepEstimate
from wsm_megatron.sweeps.evaluate import EVALUATION, EvaluationOptions
from wsm_megatron.sweeps.grid import Sweep
from wsm_megatron.sweeps.manifest import SweepManifest, SweptMerge
from wsm_megatron.trajectory.record import Trajectory

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SweepOptions(EvaluationOptions):
    """How a sweep goes about it."""

    batch: int | None = option(
        "make N merges at a time, evaluate them, keep the best and delete the others; the sources "
        "are read once a batch",
        COUNT,
        None,
        default_text="all at once, and all are kept",
        group=EVALUATION,
        least=1,
    )
    keep: int = option("how many of the best --batch keeps", COUNT, 1, group=EVALUATION, least=1)
    report: Path | None = option(
        "also write one page for people: scores, coefficients, the run, its path",
        PATH,
        None,
        group=EVALUATION,
        metavar="FILE.html",
    )
    dry_run: bool = option(
        "say bytes, seconds and free space; write nothing", SWITCH, False, group=EVALUATION
    )

    def check(self) -> None:
        super().check()
        if self.batch is not None and self.eval is None:
            raise UsageError("--batch keeps the best: give --eval CMD, which says what is good")
        if self.keep != 1 and self.batch is None:
            raise UsageError("--keep has no effect without --batch: all merges are kept")


@dataclass(frozen=True)
class SweepReport:
    """What a sweep did.

    Attributes:
        merges: those of its grid. manifest: where they are listed, with those of earlier sweeps of
            the same folder.
        estimate: made before. seconds: that merging took.
        trajectory: of the sources, where it was wanted and something was read.
    """

    merges: tuple[SweptMerge, ...]
    manifest: Path
    estimate: SweepEstimate
    bytes_read: int = 0
    bytes_written: int = 0
    seconds: float = 0.0
    trajectory: Trajectory | None = None


def sweep(
    wanted: Sweep,
    execution: ExecutionOptions = ExecutionOptions(),
    options: SweepOptions = SweepOptions(),
    progress: ProgressFactory | None = None,
    tell: Callable[[SweepEstimate], None] = lambda estimate: None,
    exports: MergeExport = MergeExport(),
) -> SweepReport | None:
    """Make every merge of a grid, and write ``sweep.json``. The same call goes on where one ended.

    Collective: every rank calls it with the same options.

    Args:
        progress: shows progress of merging; called on every rank.
        tell: called on rank 0 with the estimate, before anything is written.
        exports: of every merge, made with it or instead of it.

    Returns:
        what was done, on rank 0; elsewhere None.

    Raises:
        UsageError: the options do not fit the run. MergeError: as :func:`.merge` raises it.
        EvaluationError: the command failed; what is made and scored is kept.
    """
    if exports.export is None and "{export}" in (options.eval or ""):
        raise UsageError("--eval wants {export}: give --export hf")
    with job_ranks() as ranks:
        return _Run(wanted, execution, options, progress, tell, exports, ranks).do()


class _Run:
    """One sweep. Decisions are rank 0's; merging is all ranks'."""

    def __init__(
        self,
        wanted: Sweep,
        execution: ExecutionOptions,
        options: SweepOptions,
        progress: ProgressFactory | None,
        tell: Callable[[SweepEstimate], None],
        exports: MergeExport,
        ranks: Ranks,
    ):
        self._save, self._set = wanted.base.save, wanted.merge_set()
        self._execution, self._options, self._ranks = execution, options, ranks
        self._progress, self._tell, self._exports = progress, tell, exports
        self._manifest = SweepManifest(self._save)
        self._paths: list[str] = []
        self._estimate: SweepEstimate | None = None
        self._read, self._written, self._seconds = 0, 0, 0.0
        self._trajectory: Trajectory | None = None
        if execution.trajectory and options.batch is not None:
            raise UsageError(
                "--trajectory is of one read of all sources, and --batch reads some at a time: "
                "wsm inspect RUN --trajectory shows it"
            )

    def do(self) -> SweepReport | None:
        options, everything = self._options, range(len(self._set.merges))
        if options.dry_run or options.batch is not None:
            exports = MergedExports(self._exports, self._save)
            found = plan_together(self._set, self._execution, exports)
            with self._ranks.together("planning"):
                if found is not None:
                    self._planned(*found, exports)
        if options.dry_run:
            return self._report()
        if options.batch is None:
            self._make(everything)
            self._evaluate(everything)
            return self._report()
        todo = self._ranks.broadcast(self._unscored, "choosing")
        for start in range(0, len(todo), options.batch):
            batch = todo[start : start + options.batch]
            self._make(batch)
            self._evaluate(batch)
            self._ranks.broadcast(self._drop, "deleting merges")
        if gone := self._ranks.broadcast(self._gone, "choosing"):
            self._make(gone)  # scored by an earlier sweep that kept fewer
            self._ranks.broadcast(self._drop, "deleting merges")
        return self._report()

    def _planned(self, job: Job, moved: Estimate, exports: MergedExports) -> None:
        planned = [
            SweptMerge.of(job, output, config, self._save)
            for output, config in zip(job.outputs, self._set.merges, strict=True)
        ]
        _warn_of_equal(planned)
        self._paths = [one.path for one in planned]
        self._manifest = SweepManifest.there(self._save).with_planned(planned)
        self._estimate = SweepEstimate.of(
            job, moved, self._save, self._options.batch, self._options.keep, exports
        )
        self._tell(self._estimate)

    def _make(self, numbers: Sequence[int]) -> None:
        """Merges of the grid, by number, of one read. Collective."""
        merges = MergeSet(self._save, tuple(self._set.merges[k] for k in numbers))
        told = {"merges": [asdict(one) for one in merges.merges]}
        exports = MergedExports(self._exports, self._save)

        def planned(job: Job, moved: Estimate) -> None:
            if self._estimate is None:
                self._planned(job, moved, exports)

        done, exported = merge_and_export_together(
            merges, exports, self._execution, self._progress, told, planned
        )
        self._read += done.bytes_read
        self._written += done.bytes_written
        self._seconds += done.seconds
        self._trajectory = done.trajectory
        self._ranks.broadcast(lambda: self._note(numbers, exported), "writing the manifest")

    def _note(self, numbers: Sequence[int], exported: Sequence[ExportReport]) -> None:
        for k in numbers:
            exists = not self._exports.export_only or self._swept(k).exists
            self._manifest = self._manifest.updated(self._paths[k], exists=exists)
        for k, one in zip(numbers, exported, strict=False):  # without --export there are none
            export = str(one.path.absolute())
            self._manifest = self._manifest.updated(self._paths[k], export=export)
        self._manifest.write()

    def _evaluate(self, numbers: Sequence[int]) -> None:
        """Score merges that have no score of the metric yet, on rank 0. Collective."""
        command = self._options.command
        if command is None:
            return

        def score(k: int) -> None:
            if self._score(k) is None:
                swept = self._swept(k)
                export = None if swept.export is None else Path(swept.export)
                scores = command.score(Path(swept.path), export)
                before = swept.scores or {}
                self._manifest = self._manifest.updated(self._paths[k], scores=before | scores)
                self._manifest.write()

        for k in numbers:
            self._ranks.broadcast(lambda k=k: score(k), "evaluating")  # type: ignore[misc]

    def _swept(self, k: int) -> SweptMerge:
        return next(one for one in self._manifest.merges if one.path == self._paths[k])

    def _score(self, k: int) -> float | None:
        """To sort by: the less the better; None where there is none."""
        value = (self._swept(k).scores or {}).get(self._options.by.name)
        return None if value is None else self._options.by.rank(value)

    def _unscored(self) -> list[int]:
        return [k for k in range(len(self._paths)) if self._score(k) is None]

    def _best(self) -> list[int]:
        scores = [
            (score, k) for k in range(len(self._paths)) if (score := self._score(k)) is not None
        ]
        return [k for _, k in sorted(scores)[: self._options.keep]]

    def _gone(self) -> list[int]:
        return [k for k in sorted(self._best()) if not self._is_made(k)]

    def _is_made(self, k: int) -> bool:
        one, exports = self._swept(k), self._exports
        return (one.exists or exports.export_only) and (
            exports.export is None or one.export is not None
        )

    def _drop(self) -> None:
        """Delete what is scored and not among the best."""
        for k in {k for k in range(len(self._paths)) if self._score(k) is not None} - {
            *self._best()
        }:
            swept = self._swept(k)
            if swept.exists:
                delete_merge(Path(swept.path))
            if swept.export is not None:
                delete_export(Path(swept.export))
            self._manifest = self._manifest.updated(swept.path, exists=False, export=None)
        self._manifest.write()

    def _report(self) -> SweepReport | None:
        if self._ranks.rank != 0:
            return None
        assert self._estimate is not None
        merges = tuple(self._swept(k) for k in range(len(self._paths)))
        return SweepReport(
            merges,
            self._manifest.path,
            self._estimate,
            self._read,
            self._written,
            self._seconds,
            self._trajectory,
        )


def _warn_of_equal(merges: Sequence[SweptMerge]) -> None:
    """Say which merges come out the same: of ``mean`` in any order, of windows that reach back
    beyond the run's first checkpoint."""
    alike: dict[tuple[tuple[str, ...], tuple[float, ...]], list[str]] = {}
    for one in merges:
        alike.setdefault((one.sources, one.coefficients), []).append(one.name)
    equal = [names for names in alike.values() if names[1:]]
    if equal:
        logger.warning(
            "%d of %d merges are equal to others, of the same sources with the same coefficients: "
            "%s", sum(len(names) - 1 for names in equal), len(merges),
            "; ".join(some(names) for names in equal[:3]),
        )  # fmt: skip


def delete_merge(path: Path) -> None:
    """Delete a merged checkpoint: it loses its name first, so that no half of it is ever found; the
    tracker beside it goes to the newest that is left."""
    root = path.parent
    hidden = _hide(path)
    if left := list_checkpoints(root):
        advance_tracker(root, max(left))
        remove([hidden])
    else:
        remove([root / TRACKER_FILE, hidden])
        if not any(root.iterdir()):
            root.rmdir()
    logger.info("deleted %s", path)


def delete_export(path: Path) -> None:
    """The same of an export, with the folder of its merge's name where that is empty then."""
    remove([_hide(path)])
    if not any(path.parent.iterdir()):
        path.parent.rmdir()
    logger.info("deleted %s", path)


def _hide(path: Path) -> Path:
    hidden = path.with_name(f".{path.name}.wsm-deleted")
    with watched(lambda: f"{path}: renaming"):
        path.rename(hidden)
    fsync_path(path.parent)
    return hidden
