"""Whether a merge that was begun is the one that is wanted: digests of what it makes, and where."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from wsm_megatron.planning.job import Job, OutputCheckpoint, RankPlan


@dataclass(frozen=True)
class Placement:
    """Where everything of one output is stored.

    Attributes:
        digest: of every item's identity (key, region, dtype), file and offset.
        sizes: bytes of the ranks' files, by name.
    """

    digest: str
    sizes: dict[str, int]


def placement(job: Job, k: int, rank_plans: Sequence[RankPlan]) -> Placement:
    """The placement of output ``k`` in all ranks' files. Depends on nothing but the job."""
    digest, sizes = hashlib.sha256(), dict[str, int]()
    for rank, rank_plan in enumerate(rank_plans):
        for one in job.placed(k, rank, rank_plan):
            digest.update(f"{one.file} {one.offset} {one.item.identity}\n".encode())
            sizes[one.file] = one.end
    return Placement(digest.hexdigest(), sizes)


def merge_digest(job: Job, output: OutputCheckpoint) -> str:
    """Tells merges apart that differ in any value, or whose sources were written anew."""
    source_indices = [job.sources[j].identity for j in output.source_indices]
    text = json.dumps([output.provenance, source_indices])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def staging_key(job: Job, output: OutputCheckpoint, placed: Placement) -> str:
    """The same, and merges whose files differ in any byte: a merge goes on from what another with
    this key has finished.
    """
    text = json.dumps([merge_digest(job, output), placed.digest])
    return hashlib.sha256(text.encode()).hexdigest()[:12]
