"""Every rank sees every file, as on a parallel file system: rank 0 plans, and deals out tasks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from wsm_megatron.access.protocol import Distribution, Estimate
from wsm_megatron.access.source_check import check_source
from wsm_megatron.comm.communicator import Ranks
from wsm_megatron.config import ExecutionOptions
from wsm_megatron.execution.rank import ProgressFactory, RankResult, run_rank
from wsm_megatron.execution.targets import Destination
from wsm_megatron.execution.timing import Phases
from wsm_megatron.planning.job import Job
from wsm_megatron.planning.merge_set import MergeSet
from wsm_megatron.planning.output_paths import check_outputs
from wsm_megatron.planning.prepare import prepare_job
from wsm_megatron.planning.scatter import JobSlices, outline
from wsm_megatron.process.worker_threads import in_background
from wsm_megatron.storage.change_watch import ChangeWatch


class Shared:
    """:class:`.Access` of ranks that see the same files."""

    def __init__(self, merges: MergeSet, execution: ExecutionOptions, ranks: Ranks):
        self._merges, self._execution, self._ranks = merges, execution, ranks

    def check_options(self) -> None:
        with self._ranks.together("checking the options"):
            if self._ranks.rank == 0:
                check_outputs(self._merges, self._execution)

    def prepare(self) -> Job:
        planned: list[Job] = []

        def plan(rank: int) -> Job:
            if rank != 0:
                return outline(planned[0])
            # minutes for large runs, in which a rank may be lost
            planned.append(
                in_background(lambda: prepare_job(self._merges, self._execution), self._ranks.check)
            )
            return planned[0]

        return self._ranks.scatter(plan, "planning")

    def only(self, job: Job, outputs: Sequence[int]) -> Job:
        return job.only(outputs)

    def estimate(self, job: Job) -> Estimate:
        return Estimate(job.bytes_to_read(), job.bytes_to_write(), sent=0)

    def distribute(self, job: Job) -> Distribution:
        rank_plans = job.rank_plans(self._ranks.size) if self._ranks.rank == 0 else ()
        own, rank_plan = self._ranks.scatter(JobSlices(job, rank_plans).of, "planning")
        return Distribution(own, rank_plan, rank_plans)

    @contextmanager
    def watching(self, job: Job) -> Iterator[None]:
        if self._ranks.rank != 0:
            yield
            return
        with (
            ChangeWatch({s.path: s.fingerprint for s in job.sources}) as watch,
            self._ranks.watching(watch.check),
        ):
            yield

    def run(
        self,
        work: Distribution,
        destinations: Sequence[Destination],
        progress: ProgressFactory | None,
        phases: Phases,
    ) -> RankResult:
        with self._ranks.together("merging"):
            return run_rank(work.job, self._ranks, work.rank_plan, destinations, progress, phases)

    def verify(self, job: Job, result: RankResult) -> None:
        of_ranks = self._ranks.gather(result.ledgers)
        with self._ranks.together("checking the sources"):
            for j, source in enumerate(job.sources if self._ranks.rank == 0 else ()):
                check_source(source, [ledgers[j] for ledgers in of_ranks])

    def abandon(self) -> None:
        pass
