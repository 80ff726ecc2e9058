"""A search over a run: in memory, by a function in Python; on disk, by a command."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from isal.isal_zlib import crc32

from wsm_megatron.api import merge_together, plan_together
from wsm_megatron.checkpoint.run_directory import list_checkpoints
from wsm_megatron.comm.communicator import Ranks, job_ranks
from wsm_megatron.config import ExecutionOptions, MergeConfig
from wsm_megatron.errors import UsageError
from wsm_megatron.execution.rank import ProgressFactory
from wsm_megatron.planning.job import Job
from wsm_megatron.planning.merge_set import MergeSet
from wsm_megatron.planning.prepare import prepare_job
from wsm_megatron.planning.provenance import read_provenance
from wsm_megatron.sweeps.evaluate import EvaluationCommand
from wsm_megatron.sweeps.in_memory import InMemoryMerges, Tensors
from wsm_megatron.sweeps.run import delete_merge
from wsm_megatron.sweeps.search import (
    REPORT,
    SEARCH,
    Coefficients,
    SearchOptions,
    SearchReport,
    search_coefficients,
)

Evaluate = Callable[[Tensors], float | Mapping[str, float]]
"""Scores merged tensors, which are valid in the call: one number, the metric's, or several."""


def search(
    config: MergeConfig,
    evaluate: Evaluate,
    report: Evaluate | None = None,
    options: SearchOptions = SearchOptions(),
    execution: ExecutionOptions = ExecutionOptions(),
    remember: Path | None = None,
) -> SearchReport:
    """Search coefficients over a window by a function in Python; no checkpoint is written.

    One process: the weights of all sources, and of one merge, are held in its memory.

    Args:
        config: chooses the sources: one window, without optimizer state. Its decay does not matter.
        evaluate: scores a merge on the split that is searched on.
        report: scores the best and the named decays on another split.
        remember: a folder for ``search.json``, from which the same search goes on.

    Raises:
        UsageError: the options do not fit the run; scipy is not there. MergeError: a source is
            damaged. EvaluationError: a score is no finite number. Whatever the functions raise.
    """
    job = prepare_job(_window_of(config), execution)
    _check_one(job)
    evaluator = _InMemory(InMemoryMerges(job), evaluate, report, options.by.name)
    return search_coefficients(job, evaluator, options, remember)


@dataclass(frozen=True)
class _InMemory:
    merges: InMemoryMerges
    evaluate: Evaluate
    report: Evaluate | None
    metric: str

    @property
    def splits(self) -> tuple[str, ...]:
        return (SEARCH,) if self.report is None else (SEARCH, REPORT)

    def score(self, coefficients: Coefficients, split: str) -> Mapping[str, float]:
        function = self.evaluate if split == SEARCH else self.report
        assert function is not None
        found = function(self.merges.tensors(coefficients))
        return found if isinstance(found, Mapping) else {self.metric: float(found)}


def search_on_disk(
    config: MergeConfig,
    options: SearchOptions,
    execution: ExecutionOptions = ExecutionOptions(),
    progress: ProgressFactory | None = None,
) -> tuple[SearchReport, Path] | None:
    """Search coefficients by the command of ``--eval``; the best merge is kept, in ``OUT/best``.

    Every point is merged to ``OUT/candidate-…``, scored and deleted, so one merge lies on disk
    beside the best at a time. Collective: all ranks merge, rank 0 searches and scores.

    Returns:
        what was found, and the best merge, on rank 0; elsewhere None.

    Raises:
        as :func:`search`, and EvaluationError: a command failed. The same call goes on.
    """
    command = options.command
    if command is None:
        raise UsageError("give --eval CMD, which scores a merge")
    if config.load is None:
        raise UsageError("wsm search is over the checkpoints of a run: give --load")
    merges = MergeSet.of(_window_of(config))
    with job_ranks() as ranks:
        found = plan_together(merges, execution)
        maker = _Maker(merges.shared, execution, progress, ranks)
        if ranks.rank != 0:
            maker.serve()
            return None
        assert found is not None
        job, _ = found
        _check_one(job)
        other = None if options.report is None else replace(command, line=options.report)
        report = search_coefficients(job, _OnDisk(maker, command, other), options, config.save)
        best = maker.keep(report.best.coefficients)
        maker.end()
        return report, best


@dataclass(frozen=True)
class _Maker:
    """Merges with given coefficients, made by all ranks as rank 0 says."""

    config: MergeConfig
    execution: ExecutionOptions
    progress: ProgressFactory | None
    ranks: Ranks

    def serve(self) -> None:
        """On other ranks than 0: take part in every merge, until there are no more."""
        while (wanted := self.ranks.broadcast(_nothing, "searching")) is not None:
            self._merge(*wanted)

    def end(self) -> None:
        """On rank 0: there are no more."""
        self.ranks.broadcast(_nothing, "searching")

    def make(self, coefficients: Coefficients, folder: str) -> Path:
        """On rank 0: a merge, published in a folder of ``--save``."""
        wanted = coefficients, folder
        self.ranks.broadcast(lambda: wanted, "searching")
        return self._merge(*wanted)

    def keep(self, coefficients: Coefficients) -> Path:
        """On rank 0: the merge in ``best``, in place of what an earlier search has found."""
        root = self.config.save / "best"
        for path in list_checkpoints(root).values() if root.is_dir() else ():
            known = read_provenance(path)
            if known is not None and tuple(known["coefficients"]) != coefficients:
                delete_merge(path)
        return self.make(coefficients, "best")

    def _merge(self, coefficients: Coefficients, folder: str) -> Path:
        save = self.config.save / folder
        one = replace(self.config, decay="linear", weights=coefficients, save=save)
        merges = MergeSet(self.config.save, (one,))
        return merge_together(merges, self.execution, self.progress, asdict(one)).output


@dataclass(frozen=True)
class _OnDisk:
    maker: _Maker
    command: EvaluationCommand
    report: EvaluationCommand | None

    @property
    def splits(self) -> tuple[str, ...]:
        return (SEARCH,) if self.report is None else (SEARCH, REPORT)

    def score(self, coefficients: Coefficients, split: str) -> Mapping[str, float]:
        command = self.command if split == SEARCH else self.report
        assert command is not None
        name = f"candidate-{crc32(repr(coefficients).encode()):08x}"
        path = self.maker.make(coefficients, name)
        scores = command.score(path)
        delete_merge(path)
        return scores


def _nothing() -> tuple[Coefficients, str] | None:
    return None


def _window_of(config: MergeConfig) -> MergeConfig:
    """The same window, weighed by a decay that needs no spacing."""
    if config.weights is not None:
        raise UsageError("--weights: coefficients are what is searched for; leave it out")
    return replace(config, decay="mean", min_decay=0.0, order="sequential", order_seed=0)


def _check_one(job: Job) -> None:
    if len(job.outputs) != 1:
        raise UsageError(f"one window is searched over at a time, not {len(job.outputs)}")
