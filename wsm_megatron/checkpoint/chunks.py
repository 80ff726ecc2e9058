"""Finding the chunks of a tensor that overlap a box."""

from __future__ import annotations

from wsm_megatron.checkpoint.box import Box
from wsm_megatron.checkpoint.layout import Chunk, TensorEntry


class ChunkIndex:
    """Finds the chunks of one tensor that overlap a box without looking at all of them.

    Megatron stacks layers and experts in the first two axes: chunks are grouped by both.
    """

    def __init__(self, entry: TensorEntry):
        self._exact = {Box(chunk.offsets, chunk.sizes): chunk for chunk in entry.chunks}
        self._groups: dict[tuple, dict[tuple, list[Chunk]]] = {}
        for chunk in entry.chunks:
            first = (chunk.offsets[:1], chunk.sizes[:1])
            second = (chunk.offsets[:2], chunk.sizes[:2])
            self._groups.setdefault(first, {}).setdefault(second, []).append(chunk)

    def overlapping(self, box: Box) -> list[Chunk]:
        if box in self._exact:
            return [self._exact[box]]
        found = []
        for first, inner in self._groups.items():
            if not _overlaps(first, box):
                continue
            for second, chunks in inner.items():
                if _overlaps(second, box):
                    found += [c for c in chunks if _overlaps((c.offsets, c.sizes), box)]
        return found


def _overlaps(part: tuple[tuple[int, ...], tuple[int, ...]], box: Box) -> bool:
    """Whether a region given by its leading axes can meet ``box``."""
    offsets, sizes = part
    return all(
        a < b + n and b < a + m
        for a, m, b, n in zip(offsets, sizes, box.offsets, box.sizes, strict=False)
    )
