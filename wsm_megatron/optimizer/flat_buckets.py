"""The main params in flat buckets (``dp_reshardable``), found by content: they round to the model.

A flat bucket has no keys. Params follow each other in it, each from a multiple of 64 elements, and
each starts a chunk of its own on disk; further chunks start where Megatron cut the bucket for its
data-parallel ranks. A param is one chunk of the model or several that follow each other without a
gap (SwiGLU's halves). It may be there several times: every TP rank has its own copy of a norm.
"""

from __future__ import annotations

import re
import threading
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch

from wsm_megatron.checkpoint.keys import (
    MERGEABLE,
    PARAM_ALIGNMENT,
    Role,
    is_flat_bucket,
    main_of,
    may_be_padding,
)
from wsm_megatron.checkpoint.layout import Chunk, Layout, TensorEntry
from wsm_megatron.checkpoint.reader import CheckpointReader
from wsm_megatron.checkpoint.region import Region
from wsm_megatron.optimizer.beginnings import BEGINNING, Beginning, Beginnings, ModelChunk, digest
from wsm_megatron.optimizer.representation import ROUNDED, Representation
from wsm_megatron.process.worker_threads import run_workers
from wsm_megatron.storage.retry import check_storage

THREADS = 8
"""Reads of a few kilobytes under way at once: they wait for storage, not for a core."""
_TILE = 2**20

Span = tuple[int, int]
"""Elements of a bucket, from the first up to the second."""
_T = TypeVar("_T")


@dataclass(frozen=True)
class FlatMainParam:
    """A main param in a flat bucket: from element ``start`` on, row-major as its model chunk.

    ``lead``: which fragment it lies in, where a tensor is a grid of flat ones (:mod:`.fragments`).
    """

    bucket: str
    start: int
    lead: tuple[int, ...] = ()

    def region(self, first: int, numel: int) -> Region:
        """``numel`` elements of it from the ``first`` on."""
        return Region((*self.lead, self.start + first), (*[1] * len(self.lead), numel))

    @property
    def order(self) -> tuple[tuple[int, ...], str, int]:
        """By the numbers in the bucket's key: of several TP ranks' copies the first one's is first,
        which is the one that the model is saved from."""
        return tuple(map(int, re.findall(r"_(\d+)", self.bucket))), self.bucket, self.start


@dataclass(frozen=True)
class Alike:
    """Model chunks of one size and dtype that begin alike, and where main params round to that.

    There are several chunks where weights are equal, and several places where a param is kept by
    several TP or PP ranks. Both are in order.
    """

    chunks: tuple[ModelChunk, ...]
    places: tuple[FlatMainParam, ...]

    @property
    def numel(self) -> int:
        return self.chunks[0][1].numel

    @property
    def unsure(self) -> bool:
        """Which place is whose can only be told by all elements."""
        once_a_bucket = len({place.bucket for place in self.places}) == len(self.places)
        return bool(self.places) and not (len(self.chunks) == 1 and once_a_bucket)


@dataclass(frozen=True)
class Search:
    """What was found in the flat buckets of one checkpoint, by the beginnings.

    Attributes:
        alike: every model chunk that has no keyed main param, with the places that may be its own.
        buckets: elements of each flat bucket of main params.
        padding: where in each there may be padding.
    """

    path: Path
    alike: tuple[Alike, ...] = ()
    buckets: dict[str, int] = field(default_factory=dict)
    padding: dict[str, list[Span]] = field(default_factory=dict)

    @property
    def unsure(self) -> tuple[Alike, ...]:
        return tuple(one for one in self.alike if one.unsure)

    def lies_in(self, layout: Layout) -> bool:
        """Whether another checkpoint has the chunks and places that are unsure."""
        tensors = layout.tensors
        chunks = {(key, region) for one in self.unsure for key, region in one.chunks}
        buckets = {place.bucket for one in self.unsure for place in one.places}
        return all(
            key in tensors and _fits(region, tensors[key].shape) for key, region in chunks
        ) and all(key in tensors and tensors[key].shape == (self.buckets[key],) for key in buckets)


Contents = dict[ModelChunk | FlatMainParam, bytes]
"""What a checkpoint holds in model chunks and, rounded, in places: equal bytes, equal contents."""


def flat_buckets(layout: Layout) -> dict[str, TensorEntry]:
    """A checkpoint's flat buckets of main params, by key; remainders cannot be told apart."""
    return {
        key: entry
        for key, entry in layout.tensors.items()
        if entry.role is Role.MAIN and is_flat_bucket(key) and entry.dtype in MERGEABLE
    }


def search(layout: Layout, usual: Representation = ROUNDED) -> Search:
    """Find what in a checkpoint's flat buckets rounds to the beginning of a model chunk.

    Reads the beginning of every model chunk once, and that of every param in a bucket.

    Args:
        usual: how main params stand to their model: rounded to it, or near it.

    Raises:
        MergeError: a tensor cannot be read.
    """
    buckets = flat_buckets(layout)
    if not buckets:
        return Search(layout.path)
    keyed = {main_of(key) for key, entry in layout.tensors.items() if entry.role is Role.MAIN}
    chunks = [
        (key, chunk)
        for key, entry in layout.tensors.items()
        if entry.role is Role.MODEL and key not in keyed
        for chunk in entry.chunks
    ]
    reader = CheckpointReader(layout)
    try:
        index = _index(reader, chunks, usual)
        found: list[tuple[Beginning, FlatMainParam]] = []

        def scan(bucket: str) -> None:
            for beginning, start in _Scan(reader, bucket, index).run():
                found.append((beginning, FlatMainParam(bucket, start)))

        in_threads(sorted(buckets), scan)
    finally:
        reader.close()
    places: dict[Beginning, list[FlatMainParam]] = defaultdict(list)
    for beginning, place in found:
        places[beginning].append(place)
    padding = {key: list(_padding(entry)) for key, entry in buckets.items()}
    alike = [
        Alike(tuple(sorted(chunks)), _likely(places[beginning], len(chunks), padding))
        for beginning, chunks in index.chunks.items()
    ]
    alike.sort(key=lambda one: one.chunks)
    return Search(
        layout.path,
        tuple(alike),
        {key: entry.shape[0] for key, entry in buckets.items()},
        padding,
    )


def _likely(
    places: Iterable[FlatMainParam], chunks: int, padding: dict[str, list[Span]]
) -> tuple[FlatMainParam, ...]:
    """Places in order; of what may be padding, which can hold old copies of a param, only where
    the others are too few."""
    found = sorted(places, key=lambda place: place.order)
    begins = {key: {start for start, _ in spans} for key, spans in padding.items()}
    aligned = [place for place in found if place.start not in begins[place.bucket]]
    return tuple(aligned if len(aligned) >= chunks else found)


def _padding(bucket: TensorEntry) -> Iterator[Span]:
    for chunk in bucket.chunks:
        start = chunk.offsets[0]
        if may_be_padding(bucket.key, start, chunk.numel):
            yield start, start + chunk.numel


def contents(layout: Layout, alike: Iterable[Alike], usual: Representation = ROUNDED) -> Contents:
    """What is in the chunks and places of ``alike``; every element is read.

    Args:
        usual: as for :func:`search`.

    Raises:
        MergeError: a tensor cannot be read.
    """
    found: Contents = {}
    reader = CheckpointReader(layout)

    def look(one: Alike) -> None:
        (key, _), *others = one.chunks
        dtype = layout.tensors[key].dtype
        if others:
            found.update({chunk: digest(_of_chunk(reader, chunk)) for chunk in one.chunks})
            for place in one.places:
                pieces = _of_place(reader, place, one.chunks[0])
                found[place] = digest(piece.to(dtype) for piece in pieces)
            return
        found[one.chunks[0]] = b"equal"
        for place in one.places:
            found[place] = b"equal" if _is_at(reader, one.chunks[0], place, usual) else b"not"

    try:
        in_threads(alike, look)
    finally:
        reader.close()
    return found


def in_threads(items: Iterable[_T], work: Callable[[_T], None]) -> None:
    """Call ``work`` for every item, on :data:`THREADS` threads; its first failure is raised."""
    run_workers(items, work, THREADS, threading.Event(), check_storage)


def _index(
    reader: CheckpointReader, chunks: Sequence[tuple[str, Chunk]], usual: Representation
) -> Beginnings:
    index, entering = Beginnings(usual), threading.Lock()

    def enter(item: tuple[str, Chunk]) -> None:
        key, chunk = item
        data = reader.read_run(key, chunk, 0, min(chunk.numel, BEGINNING))
        beginning = Beginning(data.dtype, chunk.numel, digest([data]))
        with entering:
            index.enter(beginning, (key, Region(chunk.offsets, chunk.sizes)), data)

    in_threads(sorted(chunks, key=lambda item: item[1].location), enter)
    return index


class _Scan:
    """One walk through a bucket, from param to param."""

    def __init__(self, reader: CheckpointReader, bucket: str, index: Beginnings):
        self._reader, self._bucket, self._index = reader, bucket, index
        entry = reader.layout.tensors[bucket]
        self._chunks, self._end = entry.chunks, entry.shape[0]
        self._starts = [chunk.offsets[0] for chunk in entry.chunks]
        self._lines = [start for start in self._starts if start % PARAM_ALIGNMENT == 0]
        named = re.search(r"\.dtype_\((torch\.\w+), ", bucket)
        self._param = named[1] if named else ""

    def run(self) -> Iterator[tuple[Beginning, int]]:
        """Beginnings of model chunks, and from which element of the bucket on each is found."""
        position = 0
        while position < self._end:
            found = self._at(position)
            if found is None:
                position = self._after(self._lines, position)
            else:
                yield found, position
                position += found.numel

    def _at(self, position: int) -> Beginning | None:
        """The chunk that begins here: rather one that ends with the param, or else the longest."""
        n = bisect_right(self._starts, position) - 1
        chunk = self._chunks[n]
        start = position - chunk.offsets[0]
        if n < 0 or start >= chunk.numel:
            return None  # a hole
        count = min(BEGINNING, chunk.numel - start)
        found = self._index.starting_with(
            self._reader.read_run(self._bucket, chunk, start, count),
            self._end - position,
            self._param,
        )
        if not found and self._goes_on(chunk, position):
            count = min(BEGINNING, self._end - position)
            main = self._reader.read(self._bucket, Region((position,), (count,)))
            found = self._index.starting_with(main, self._end - position, self._param)
        whole = [one for one in found if self._ends(position + one.numel)]
        if whole:
            return min(whole, key=lambda one: one.numel)
        return max(found, key=lambda one: one.numel, default=None)

    def _goes_on(self, chunk: Chunk, position: int) -> bool:
        """Whether a beginning may go on in the next chunk: a rank's part may end anywhere."""
        stop = chunk.offsets[0] + chunk.numel
        if stop == self._end or stop - position >= self._index.longest:
            return False
        return position != chunk.offsets[0] or not may_be_padding(
            self._bucket, position, chunk.numel
        )

    def _ends(self, position: int) -> bool:
        """Whether a chunk on disk ends here."""
        return position == self._after(self._starts, position - 1)

    def _after(self, starts: Sequence[int], position: int) -> int:
        """The next of some starts, or the bucket's end."""
        n = bisect_right(starts, position)
        return starts[n] if n < len(starts) else self._end


def _fits(region: Region, shape: tuple[int, ...]) -> bool:
    return (
        region.intersect(Region((0,) * len(shape), shape)) == region
        if len(region.sizes) == len(shape)
        else False
    )


def _of_chunk(reader: CheckpointReader, chunk: ModelChunk) -> Iterator[torch.Tensor]:
    key, region = chunk
    return (reader.read(key, part) for part in region.split(_TILE))


def _of_place(
    reader: CheckpointReader, place: FlatMainParam, chunk: ModelChunk
) -> Iterator[torch.Tensor]:
    """A main param, in the same pieces as the model chunk."""
    start = place.start
    for part in chunk[1].split(_TILE):
        yield reader.read(place.bucket, Region((start,), (part.numel,)))
        start += part.numel


def _is_at(
    reader: CheckpointReader, chunk: ModelChunk, place: FlatMainParam, usual: Representation
) -> bool:
    pieces = zip(_of_chunk(reader, chunk), _of_place(reader, place, chunk), strict=True)
    return not any(usual.differ(main, model) for model, main in pieces)
