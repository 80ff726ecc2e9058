"""Byte entries of the newest sources: each is read once, and written for every merge it ends."""

from __future__ import annotations

from wsm_megatron.execution.context import Context
from wsm_megatron.planning.job import Job, Part


def copy_objects(job: Job, part: Part, context: Context) -> None:
    """Copy the byte entries of a rank's part."""
    for (j, key), takers in job.takers(part.objects).items():
        entry = context.readers[j].layout.objects[key]
        with context.phases("reading"):
            data = context.readers[j].read_object(entry)
        with context.phases("writing"):
            for k in takers:
                context.targets[k].write_object(key, data)
        context.progress((1 + len(takers)) * entry.nbytes)


def write_common(job: Job, context: Context) -> None:
    """Write every product's common state, where that is an entry. On rank 0."""
    for product, target in zip(job.products, context.targets, strict=True):
        key = job.common_key(product)
        if key is not None:
            target.write_object(key, product.common)
            context.progress(len(product.common))
