"""Where in flat buckets (``dp_reshardable``) the main param of each model chunk lies.

The buckets have no keys, but the main params round to the model: that is how they are found. Then a
merge can round the model from the merged main params, as Megatron does in the first step after a
load, and the check that main params belong to the model holds for flat buckets too.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from wsm_megatron.checkpoint.box import Box
from wsm_megatron.checkpoint.layout import Layout
from wsm_megatron.checkpoint.reader import CheckpointReader
from wsm_megatron.checkpoint.roles import Role, is_flat_bucket
from wsm_megatron.engine.mains import ModelChunk, find_in_bucket

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FlatMain:
    """A main param in a flat bucket: from element ``start`` on, row-major as its model chunk."""

    bucket: str
    start: int


@dataclass(frozen=True)
class FlatMains:
    """Main params in flat buckets, by model chunk."""

    places: dict[ModelChunk, FlatMain] = field(default_factory=dict)

    def rest(self, bucket: str, box: Box) -> Iterator[Box]:
        """What of a bucket's chunk is no main param of ``places``: copies, padding, unknown."""
        position, end = box.offsets[0], box.offsets[0] + box.sizes[0]
        for start, stop in self._spans.get(bucket, ()):
            if stop <= position or start >= end:
                continue
            if position < start:
                yield Box((position,), (start - position,))
            position = stop
        if position < end:
            yield Box((position,), (end - position,))

    @cached_property
    def _spans(self) -> dict[str, list[tuple[int, int]]]:
        spans: dict[str, list[tuple[int, int]]] = {}
        for (_, box), main in self.places.items():
            spans.setdefault(main.bucket, []).append((main.start, main.start + box.numel))
        return {bucket: sorted(found) for bucket, found in spans.items()}


def find_flat_mains(layout: Layout) -> FlatMains:
    """Find the main params of a checkpoint's flat buckets by the beginning of their content.

    Reads a few hundred bytes a chunk. A main param that fits several model chunks (equal weights)
    is left out, and so is a chunk that fits several places of one bucket.

    Raises:
        MergeError: a tensor cannot be read.
    """
    buckets = [k for k, e in layout.tensors.items() if e.role is Role.MAIN and is_flat_bucket(k)]
    chunks = [
        (key, Box(chunk.offsets, chunk.sizes))
        for key, entry in layout.tensors.items()
        if entry.role is Role.MODEL
        for chunk in entry.chunks
    ]
    places: dict[ModelChunk, FlatMain] = {}
    if not buckets:
        return FlatMains()
    reader = CheckpointReader(layout)
    try:
        for bucket in buckets:
            for chunk, start in _unambiguous(reader, bucket, chunks):
                places.setdefault(chunk, FlatMain(bucket, start))
    finally:
        reader.close()
    if missing := len(chunks) - len(places):
        logger.warning(
            "%s: the main params of %d of %d model chunks were not found in the flat buckets; "
            "these chunks are merged from the model's own dtype, and move by a rounding in the "
            "first step after a load",
            layout.path, missing, len(chunks),
        )  # fmt: skip
    return FlatMains(places)


def _unambiguous(
    reader: CheckpointReader, bucket: str, chunks: list[ModelChunk]
) -> Iterator[tuple[ModelChunk, int]]:
    found = list(find_in_bucket(reader, bucket, chunks, whole=False))
    chunks_at = Counter(start for start, _ in found)
    places_of = Counter(chunk for _, chunk in found)
    for start, chunk in found:
        if chunks_at[start] == 1 and places_of[chunk] == 1:
            yield chunk, start
