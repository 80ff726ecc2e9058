"""Reading a region of one tensor from the chunks that hold it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import mul
from typing import Protocol

import torch
from isal.isal_zlib import crc32

from wsm_megatron.checkpoint.container import Record
from wsm_megatron.checkpoint.layout import Chunk, Location
from wsm_megatron.checkpoint.region import Region, span_of, strides_of
from wsm_megatron.storage.buffer import Buffer
from wsm_megatron.storage.files import Read, read_all

Segment = tuple[int, int, int]
"""Bytes ``start .. end`` of a record and their CRC-32."""


class Source(Protocol):
    """What a region reader reads through."""

    def request(self, location: Location, start: int, out: Buffer, key: str) -> Read:
        """How to fill ``out`` from a location's bytes, ``start`` counted from its beginning."""

    def prefetch(self, location: Location, start: int, length: int) -> None:
        """Say what will be read soon."""

    def finish(self, location: Location, record: Record, parts: list[Segment], nbytes: int) -> None:
        """Take in the checksums of ``nbytes`` bytes that were read of a record."""


@dataclass
class Piece:
    """One chunk that a region reader reads from, and the parts of its record read so far."""

    chunk: Chunk
    region: Region
    record: Record
    parts: list[Segment] = field(default_factory=list)
    advised: int = 0
    """Up to here the kernel was told to read."""


@dataclass(slots=True)
class Run:
    """Consecutive elements of one chunk, from byte ``begin`` of its record, to be read."""

    piece: Piece
    begin: int
    read: Read

    def enter(self) -> None:
        """Take what was read into the record's CRC-32."""
        parts, data = self.piece.parts, self.read.out.data
        end = self.begin + len(data)
        if parts and parts[-1][1] == self.begin:
            first, _, crc = parts[-1]
            parts[-1] = (first, end, crc32(data, crc))
        else:
            parts.append((self.begin, end, crc32(data)))


class RegionReader:
    """The chunks of one checkpoint that hold one region of a tensor. For one thread.

    Call :meth:`read` for row-major parts of the region (:meth:`Region.split`), in order for the
    longest reads, then :meth:`finish`.

    Args:
        ahead: bytes of each chunk that the kernel is told to read in advance.
    """

    def __init__(
        self, source: Source, key: str, region: Region, pieces: list[Piece], ahead: int = 0
    ):
        self._source, self._key, self._pieces, self._ahead = source, key, pieces, ahead
        # A region that is a run of one chunk's elements, as with equal layouts: no geometry then.
        self._strides: tuple[int, ...] | None = None
        if len(pieces) == 1:
            (piece,) = pieces
            if span_of(region.within(piece.region), piece.region.sizes).contiguous:
                self._strides = strides_of(piece.region.sizes)
                self._corner = sum(map(mul, piece.region.offsets, self._strides))

    def read(self, region: Region, out: Buffer) -> None:
        """Read a region into ``out``: ``region.numel`` elements of the entry's dtype."""
        run = self.run(region, out)
        if run is not None:
            self._read_run(run)
            return
        for piece in self._pieces:
            overlap = region.intersect(piece.region)
            if overlap is not None:
                self._read_overlap(piece, overlap, region, out)

    def run(self, region: Region, out: Buffer) -> Run | None:
        """What :meth:`read` would do, where it is a single read."""
        if self._strides is None:
            return None
        start = sum(map(mul, region.offsets, self._strides)) - self._corner
        return self._run(self._pieces[0], start, out)

    def leave_out(self, region: Region) -> None:
        """An earlier merge has read a region: check once more what it could only check in parts."""
        for piece in self._pieces:
            if piece.region.intersect(region) != piece.region:
                self._source.finish(piece.chunk.location, piece.record, [], 0)

    def finish(self) -> None:
        """Hand in what was read: a damaged record that was read whole raises ``MergeError``."""
        for piece in self._pieces:
            nbytes = sum(end - start for start, end, _ in piece.parts)
            self._source.finish(piece.chunk.location, piece.record, piece.parts, nbytes)

    def _read_overlap(self, piece: Piece, overlap: Region, region: Region, out: Buffer) -> None:
        """Read the part of ``region`` that lies in one chunk into its place in ``out``."""
        target = span_of(overlap.within(region), region.sizes)
        span = span_of(overlap.within(piece.region), piece.region.sizes)
        if span.contiguous and target.contiguous:
            self._read_run(self._run(piece, span.start, out.part(target.start, span.length)))
            return
        # One read of the whole span, then the wanted elements: fewer, longer reads.
        raw = Buffer.empty(span.length, out.elements.dtype)
        self._read_run(self._run(piece, span.start, raw))
        _view(out.elements, overlap.within(region), region.sizes).copy_(
            raw.elements.as_strided(overlap.sizes, strides_of(piece.region.sizes))
        )

    def _run(self, piece: Piece, start: int, out: Buffer) -> Run:
        record = piece.record
        begin = start * record.dtype.itemsize
        if self._ahead:
            self._prefetch(piece, begin + len(out.data))
        where = record.start + begin
        return Run(piece, begin, self._source.request(piece.chunk.location, where, out, self._key))

    def _read_run(self, run: Run) -> None:
        read_all([run.read])
        run.enter()

    def _prefetch(self, piece: Piece, end: int) -> None:
        """Keep the kernel half a window to a whole one ahead."""
        whole = piece.record.nbytes
        if piece.advised == whole or piece.advised - end >= self._ahead // 2:
            return
        start = max(piece.advised, end)
        piece.advised = min(end + self._ahead, whole)
        if start < piece.advised:
            begin = piece.record.start + start
            self._source.prefetch(piece.chunk.location, begin, piece.advised - start)


def read_together(wanted: Sequence[tuple[RegionReader, Region, Buffer]]) -> None:
    """:meth:`RegionReader.read` of several, of one checkpoint or many, in few calls."""
    runs = []
    for region_reader, region, out in wanted:
        run = region_reader.run(region, out)
        if run is None:
            region_reader.read(region, out)
        else:
            runs.append(run)
    read_all([run.read for run in runs])
    for run in runs:
        run.enter()


def _view(flat: torch.Tensor, region: Region, shape: tuple[int, ...]) -> torch.Tensor:
    full = flat.view(shape)
    for axis, (offset, size) in enumerate(zip(region.offsets, region.sizes, strict=True)):
        full = full.narrow(axis, offset, size)
    return full
