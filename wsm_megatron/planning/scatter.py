"""What each rank is given of a job that rank 0 has planned: its tasks, and the chunks they touch.

A run of a trillion parameters has 10^5 chunks in every checkpoint. Only rank 0 holds all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from wsm_megatron.checkpoint.chunk_index import ChunkIndex
from wsm_megatron.checkpoint.layout import Chunk, Layout
from wsm_megatron.planning.job import Job, RankPlan
from wsm_megatron.planning.plan import MergePlan
from wsm_megatron.planning.tasks import Task, sources_read


class JobSlices:
    """A job cut along its ranks' plans: what each rank is sent."""

    def __init__(self, job: Job, rank_plans: Sequence[RankPlan]):
        self._job, self._rank_plans = job, rank_plans
        self._sources = sources_read(job.merges)
        self._indices: list[dict[str, ChunkIndex]] = [{} for _ in job.sources]

    def of(self, rank: int) -> tuple[Job, RankPlan]:
        """The job as a rank needs it to do its part. Rank 0, which publishes, gets all."""
        rank_plan = self._rank_plans[rank]
        if rank == 0:
            return self._job, rank_plan
        sources = [
            replace(source, layout=self._only(j, source.layout, rank_plan.tasks))
            for j, source in enumerate(self._job.sources)
        ]
        plan = replace(self._job.plan, tasks=tuple(rank_plan.tasks))
        return replace(self._job, sources=tuple(sources), plan=plan), rank_plan

    def _only(self, j: int, layout: Layout, tasks: Sequence[Task]) -> Layout:
        """A source's layout with the chunks that tasks read."""
        chunks: dict[str, dict[int, Chunk]] = {}
        rules = [rule for rule, sources in self._sources.items() if j in sources]
        for task in tasks:
            if task.recipe.rule not in rules:
                continue  # what is copied need not be in older sources
            for key in task.recipe.inputs:
                found = self._index(j, layout, key).overlapping(task.part(key, task.region))
                chunks.setdefault(key, {}).update((id(chunk), chunk) for chunk in found)
        tensors = {
            key: replace(layout.tensors[key], chunks=tuple(found.values()))
            for key, found in chunks.items()
        }
        return replace(layout, tensors=tensors, objects={})

    def _index(self, j: int, layout: Layout, key: str) -> ChunkIndex:
        index = self._indices[j].get(key)
        if index is None:
            index = self._indices[j][key] = ChunkIndex(layout.tensors[key])
        return index


def outline(job: Job) -> Job:
    """A job without what its sources hold and what is done with it."""
    sources = [
        replace(source, layout=replace(source.layout, tensors={}, objects={}))
        for source in job.sources
    ]
    plan = MergePlan((), (), job.plan.left_out, job.plan.rebuilds_main_params)
    return replace(job, sources=tuple(sources), plan=plan)
