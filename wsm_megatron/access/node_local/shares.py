"""The ranks' shares of a job whose sources are assignment over nodes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from wsm_megatron.access.node_local.assignment import PeerStage, TaskAssignment, peer_stages_of
from wsm_megatron.access.node_local.schedule import check_bytes, scope_of
from wsm_megatron.checkpoint.run_directory import checkpoint_path
from wsm_megatron.planning.job import Job, RankPlan
from wsm_megatron.planning.sources import Source
from wsm_megatron.planning.tasks import Merge, Stage, Task
from wsm_megatron.storage.fingerprint import Fingerprint


@dataclass(frozen=True)
class Assignment:
    """Which rank reads what.

    Attributes:
        held: every task, in the plan's order.
        objects: for every source, the rank that copies a byte entry, by key.
        reporters: for every source, the rank that has what lies beside its tensors.
        fingerprints: ``[source][rank]``: what each rank sees of it.
    """

    held: tuple[TaskAssignment, ...]
    objects: tuple[dict[str, int], ...]
    reporters: tuple[int, ...]
    fingerprints: tuple[tuple[Fingerprint, ...], ...]

    @property
    def ranks(self) -> int:
        return len(self.fingerprints[0])

    def only(self, sources: Sequence[int], newest: Collection[int]) -> Assignment:
        """The same for some of the sources, of which ``newest`` are copied from."""
        return Assignment(
            tuple(held.only(sources, newest) for held in self.held),
            tuple(self.objects[j] for j in sources),
            tuple(self.reporters[j] for j in sources),
            tuple(self.fingerprints[j] for j in sources),
        )

    def alone(self) -> list[list[Task]]:
        """For every rank, the tasks that it does by itself."""
        tasks: list[list[Task]] = [[] for _ in range(self.ranks)]
        for held in self.held:
            if held.alone is not None:
                tasks[held.alone].append(held.task)
        return tasks

    def written(self, newest: int) -> list[list[Task]]:
        """For every rank, the tasks whose chunks it stores for a merge that ends with a source."""
        tasks: list[list[Task]] = [[] for _ in range(self.ranks)]
        for held in self.held:
            rank = held.holders[newest]
            assert rank is not None
            tasks[rank].append(held.task)
        return tasks

    def steps(self, rank: int) -> list[PeerStage]:
        """A rank's turns in tasks that it does with others, in the order of all ranks."""
        together = [(n, held) for n, held in enumerate(self.held) if held.alone is None]
        return [
            step for n, held in together for step in peer_stages_of(n, held) if step.rank == rank
        ]

    def checks(self, rank: int) -> list[tuple[int, int]]:
        """Task and source of the model tensors that a rank reads to check another's main params."""
        return [
            (number, j)
            for number, held in enumerate(self.held)
            for j, checker in enumerate(held.checkers)
            if checker == rank and held.holders[j] != rank
        ]

    def seen_from(self, rank: int, root: Path, sources: Sequence[Source]) -> tuple[Source, ...]:
        """The sources as one rank, to which ``root`` is the run's directory, sees them."""
        local = []
        for source, fingerprints in zip(sources, self.fingerprints, strict=True):
            path = checkpoint_path(root, source.iteration)
            layout = replace(source.layout, path=path)
            own = replace(source, path=path, layout=layout, fingerprint=fingerprints[rank])
            local.append(replace(own, fingerprints=fingerprints))
        return tuple(local)


def rank_plans_of(job: Job, assignment: Assignment) -> tuple[RankPlan, ...]:
    """What every rank does of a job."""
    newest, merges = [output.newest for output in job.outputs], job.merges
    written = {j: assignment.written(j) for j in set(newest)}
    rank_plans = []
    for rank, tasks in enumerate(assignment.alone()):
        steps = (_stage_bytes(step, assignment, merges) for step in assignment.steps(rank))
        rank_plan = job.rank_plan(
            rank,
            tasks,
            [written[j][rank] for j in newest],
            [
                [key for key in output.objects if assignment.objects[j][key] == rank]
                for output, j in zip(job.outputs, newest, strict=True)
            ],
            [k for k, j in enumerate(newest) if assignment.reporters[j] == rank],
            sum(steps) + check_bytes(assignment.held, assignment.checks(rank)),
        )
        rank_plans.append(rank_plan)
    return tuple(rank_plans)


def _stage_bytes(step: PeerStage, assignment: Assignment, merges: Sequence[Merge]) -> int:
    held = assignment.held[step.number]
    return Stage(held.task, scope_of(step, held, merges)).nbytes
