"""Whether a merge that was begun is the one that is wanted: digests of what it makes, and where."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from wsm_megatron.planning.job import Job, Part, Product


@dataclass(frozen=True)
class Placement:
    """Where everything of one product is stored.

    Attributes:
        digest: of every item's identity (key, region, dtype), file and offset.
        sizes: bytes of the ranks' files, by name.
    """

    digest: str
    sizes: dict[str, int]


def placement(job: Job, k: int, parts: Sequence[Part]) -> Placement:
    """The placement of product ``k`` in all ranks' files. Depends on nothing but the job."""
    digest, sizes = hashlib.sha256(), dict[str, int]()
    for rank, part in enumerate(parts):
        for one in job.placed(k, rank, part):
            digest.update(f"{one.file} {one.offset} {one.item.identity}\n".encode())
            sizes[one.file] = one.end
    return Placement(digest.hexdigest(), sizes)


def merge_digest(job: Job, product: Product) -> str:
    """Tells merges apart that differ in any value, or whose sources were written anew."""
    members = [job.sources[j].identity for j in product.members]
    text = json.dumps([product.provenance, members])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def staging_key(job: Job, product: Product, placed: Placement) -> str:
    """The same, and merges whose files differ in any byte: a merge goes on from what another with
    this key has finished.
    """
    text = json.dumps([merge_digest(job, product), placed.digest])
    return hashlib.sha256(text.encode()).hexdigest()[:12]
