"""Byte entries of the newest sources: each is read once, and written for every merge it ends."""

from __future__ import annotations

from wsm_megatron.execution.context import Context
from wsm_megatron.planning.job import Job, RankPlan


def copy_objects(job: Job, rank_plan: RankPlan, context: Context) -> None:
    """Copy the byte entries of a rank's plan."""
    for (j, key), consumers in job.consumers(rank_plan.objects).items():
        entry = context.readers[j].layout.objects[key]
        with context.phases("reading"):
            data = context.readers[j].read_object(entry)
        with context.phases("writing"):
            for k in consumers:
                context.targets[k].write_object(key, data)
        context.progress((1 + len(consumers)) * entry.nbytes)


def write_common(job: Job, context: Context) -> None:
    """Write every output's common state, as far as it is made of entries. On rank 0."""
    for output, target in zip(job.outputs, context.targets, strict=True):
        for key, data in output.common.entries.items():
            target.write_object(key, data)
            context.progress(len(data))
