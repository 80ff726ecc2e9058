"""Finding the chunks of a tensor that overlap a region."""

from __future__ import annotations

from functools import cached_property

from wsm_megatron.checkpoint.layout import Chunk, TensorEntry
from wsm_megatron.checkpoint.region import Region

_Part = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes along the leading axes."""


class ChunkIndex:
    """Finds the chunks of one tensor that overlap a region without looking at all of them.

    Megatron stacks layers and experts in the first two axes: chunks are grouped by both.
    """

    def __init__(self, entry: TensorEntry):
        self._entry = entry
        self._at = {chunk.offsets: chunk for chunk in entry.chunks}

    def overlapping(self, region: Region) -> list[Chunk]:
        found = self._at.get(region.offsets)
        if found is not None and found.sizes == region.sizes:
            return [found]
        return [
            chunk
            for first, inner in self._groups.items()
            if _overlaps(first, region)
            for second, chunks in inner.items()
            if _overlaps(second, region)
            for chunk in chunks
            if _overlaps((chunk.offsets, chunk.sizes), region)
        ]

    @cached_property
    def _groups(self) -> dict[_Part, dict[_Part, list[Chunk]]]:
        """Only looked at where layouts differ."""
        groups: dict[_Part, dict[_Part, list[Chunk]]] = {}
        for chunk in self._entry.chunks:
            first = (chunk.offsets[:1], chunk.sizes[:1])
            second = (chunk.offsets[:2], chunk.sizes[:2])
            groups.setdefault(first, {}).setdefault(second, []).append(chunk)
        return groups


def _overlaps(part: _Part, region: Region) -> bool:
    """Whether a region given by its leading axes can meet ``region``."""
    offsets, sizes = part
    return all(
        a < b + n and b < a + m
        for a, m, b, n in zip(offsets, sizes, region.offsets, region.sizes, strict=False)
    )
