"""Integer tensors cannot be averaged: do those that are copied fit what is merged beside them?

Quantised weights are integers with float scales. Scales that are merged beside the newest source's
integers make other weights than any source has.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from math import prod

import torch

from wsm_megatron.checkpoint.keys import Role
from wsm_megatron.checkpoint.reader import CheckpointReader
from wsm_megatron.checkpoint.region import Region
from wsm_megatron.errors import UsageError, some
from wsm_megatron.planning.job import Job
from wsm_megatron.planning.patterns import matches, pattern_for
from wsm_megatron.planning.tasks import Rule

logger = logging.getLogger(__name__)

_TILE = 2**20
_PARTNER = re.compile(r"scale|zero|quant|a(bs)?max|codebook|lut|scb", re.IGNORECASE)

Checksums = dict[tuple[int, str, tuple], int]
"""CRC-32 of chunks, by source, key, and the chunk's offsets and sizes."""


def copied_integers(job: Job) -> list[str]:
    """Tensors that are copied because they are no floats, and not because ``--copy`` says so."""
    return [
        recipe.key
        for recipe in job.plan.recipes
        if recipe.rule is Rule.COPY and recipe.role is Role.COPY
        if not matches(recipe.key, job.config.copy)
    ]


def check_integers(job: Job) -> None:
    """Compare integer tensors between the sources, by their containers' CRC-32 where these are cut
    alike.

    Raises:
        UsageError: one differs, and floats that scale it are merged. MergeError: a source cannot be
            read.
    """
    keys = copied_integers(job)
    readers = [CheckpointReader(one.layout, job.execution.retries) for one in job.sources if keys]
    try:
        _judge(job, [key for key in keys if any(_differ(readers[-1], r, key) for r in readers)])
    finally:
        for reader in readers:
            reader.close()


def checksums(job: Job, rank: int) -> Checksums:
    """CRC-32 of the chunks of integer tensors that a rank sees, where ranks see different files."""
    found: Checksums = {}
    keys = copied_integers(job)
    for j, source in enumerate(job.sources if keys else ()):
        files = {name for name, *_ in source.fingerprints[rank]}
        reader = CheckpointReader(source.layout, job.execution.retries)
        for key in keys:
            entry = source.layout.tensors.get(key)
            for chunk in entry.chunks if entry is not None else ():
                if chunk.location.file in files:
                    found[j, key, chunk[:2]] = reader.checksum(key, chunk)
        reader.close()
    return found


def compare_checksums(job: Job, told: Iterable[Checksums]) -> None:
    """:func:`check_integers` with what all ranks have told; tensors that are cut differently count
    as different."""
    of_sources: dict[str, list[dict[tuple, int]]] = {}
    for one in told:
        for (j, key, place), crc in one.items():
            sources = of_sources.setdefault(key, [{} for _ in job.sources])
            sources[j][place] = crc
    _judge(
        job, [key for key, sources in of_sources.items() if any(s != sources[-1] for s in sources)]
    )


def _differ(newest: CheckpointReader, other: CheckpointReader, key: str) -> bool:
    entry, theirs = newest.layout.tensors[key], other.layout.tensors.get(key)
    if newest is other:
        return False
    if theirs is None or (theirs.dtype, theirs.shape) != (entry.dtype, entry.shape):
        return True
    pairs = list(zip(entry.chunks, theirs.chunks, strict=False))
    if len(entry.chunks) == len(theirs.chunks) and all(a[:2] == b[:2] for a, b in pairs):
        return any(newest.checksum(key, a) != other.checksum(key, b) for a, b in pairs)
    return not all(
        torch.equal(newest.read(key, tile), other.read(key, tile))
        for chunk in entry.chunks
        for tile in Region(chunk.offsets, chunk.sizes).split(_TILE)
    )


def _judge(job: Job, differing: Sequence[str]) -> None:
    if not differing:
        return
    newest = job.sources[-1].layout
    summed = [recipe.key for recipe in job.plan.recipes if recipe.rule is not Rule.COPY]
    beside = _by_parent(summed)
    for key in differing:
        partners = _partners(key, beside)
        if partners and prod(newest.tensors[key].shape) > 1:  # a single one is a counter
            both = [key, *partners]
            pattern = pattern_for(both, (other for other in newest.tensors if other not in both))
            patterns = [pattern] if pattern != "PATTERN" else both
            raise UsageError(
                f"{newest.path}: {key} is {newest.tensors[key].dtype} and differs between the "
                f"sources: integers are copied from the newest one, and {some(partners)} would be "
                "merged, which together are the weights of none. Merge before quantising, or take "
                f"both from the newest: {' '.join(f'--copy {one!r}' for one in patterns)}"
            )
    logger.warning(
        "%s: integer tensors differ between the sources and are copied from the newest: %s",
        newest.path, some(sorted(differing)),
    )  # fmt: skip


def _by_parent(keys: Iterable[str]) -> dict[str, list[str]]:
    """Keys by what comes before their last and before their last two parts."""
    found: dict[str, list[str]] = {}
    for key in keys:
        parent = key.rpartition(".")[0]
        for place in {parent, parent.rpartition(".")[0]}:
            found.setdefault(place, []).append(key)
    return found


def _partners(key: str, beside: dict[str, list[str]]) -> list[str]:
    """Floats that scale an integer tensor, by their names: ``x.weight`` has ``x.weight_scale``,
    ``x.scales``, ``x.weight.absmax``."""
    parent = key.rpartition(".")[0]
    return [
        other
        for other in dict.fromkeys((*beside.get(parent, ()), *beside.get(key, ())))
        if other.startswith((f"{key}.", f"{key}_"))
        or (other.rpartition(".")[0] == parent and _PARTNER.search(other.rpartition(".")[2]))
    ]
