"""What a merge asks of the files that its ranks see."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from wsm_megatron.execution.rank import ProgressFactory, RankResult
from wsm_megatron.execution.targets import Destination
from wsm_megatron.execution.timing import Phases
from wsm_megatron.planning.job import Job, RankPlan


@dataclass(frozen=True)
class Estimate:
    """Bytes that a job will move, over all ranks.

    Attributes:
        read: of tensors and objects. written: of these and side files.
        sent: of sums, from rank to rank.
    """

    read: int
    written: int
    sent: int


@dataclass(frozen=True)
class Distribution:
    """A job cut along its ranks' plans.

    Attributes:
        job: as far as this rank needs it; on rank 0 all of it.
        rank_plan: this rank's.
        rank_plans: all ranks', on rank 0; elsewhere they may be missing.
    """

    job: Job
    rank_plan: RankPlan
    rank_plans: Sequence[RankPlan]


class Access(Protocol):
    """Which rank reads which files. Every method is collective; errors are raised on all ranks."""

    def check_options(self) -> None:
        """Look at where the job writes, before any file is opened for writing.

        Raises:
            ValueError: that is where it reads from.
        """

    def prepare(self) -> Job:
        """The job; on other ranks than 0 it may be an outline.

        Raises:
            ValueError: the options do not fit the run. MergeError: a checkpoint is damaged.
        """

    def only(self, job: Job, outputs: Sequence[int]) -> Job:
        """The same job for some of its outputs."""

    def estimate(self, job: Job) -> Estimate:
        """What the job moves. On rank 0, not collective."""

    def distribute(self, job: Job) -> Distribution:
        """Cut the job along the ranks."""

    def watching(self, job: Job) -> AbstractContextManager[None]:
        """Notice sources that change while they are read."""

    def run(
        self,
        work: Distribution,
        destinations: Sequence[Destination],
        progress: ProgressFactory | None,
        phases: Phases,
    ) -> RankResult:
        """Do what this rank's plan says; its files are on disk when it returns."""

    def verify(self, job: Job, result: RankResult) -> None:
        """Complete the checks that no rank could make alone.

        Raises:
            MergeError: a source is damaged, or has changed while it was read.
        """

    def abandon(self) -> None:
        """After a failure: let go of what would keep the process. Not collective."""
