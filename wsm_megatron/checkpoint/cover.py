"""Reading a region of one tensor from the chunks that hold it."""

from __future__ import annotations

from dataclasses import dataclass, field
from operator import mul
from typing import Protocol

import torch
from isal.isal_zlib import crc32

from wsm_megatron.checkpoint.box import Box, span_of, strides_of
from wsm_megatron.checkpoint.buffer import Buffer
from wsm_megatron.checkpoint.container import Record
from wsm_megatron.checkpoint.layout import Chunk, Location

Segment = tuple[int, int, int]
"""Bytes ``start .. end`` of a record and their CRC-32."""


class Source(Protocol):
    """What a cover reads through."""

    def read_record(self, location: Location, start: int, out: memoryview, key: str) -> None:
        """Fill ``out`` from a location's bytes, ``start`` counted from its beginning."""

    def prefetch(self, location: Location, start: int, length: int) -> None:
        """Say what will be read soon."""

    def settle(self, location: Location, record: Record, parts: list[Segment], nbytes: int) -> None:
        """Take in the checksums of ``nbytes`` bytes that were read of a record."""


@dataclass
class Piece:
    """One chunk that a cover reads from, and the parts of its record read so far."""

    chunk: Chunk
    box: Box
    record: Record
    parts: list[Segment] = field(default_factory=list)
    advised: int = 0
    """Up to here the kernel was told to read."""


class Cover:
    """The chunks of one checkpoint that hold one region of a tensor. For one thread.

    Call :meth:`read` for row-major parts of the region (:meth:`Box.split`), in order for the
    longest reads, then :meth:`settle`.

    Args:
        ahead: bytes of each chunk that the kernel is told to read in advance.
    """

    def __init__(self, source: Source, key: str, region: Box, pieces: list[Piece], ahead: int = 0):
        self._source, self._key, self._pieces, self._ahead = source, key, pieces, ahead
        # A region that is a run of one chunk's elements, as with equal layouts: no geometry then.
        self._strides: tuple[int, ...] | None = None
        if len(pieces) == 1:
            (piece,) = pieces
            if span_of(region.within(piece.box), piece.box.sizes).contiguous:
                self._strides = strides_of(piece.box.sizes)
                self._corner = sum(map(mul, piece.box.offsets, self._strides))

    def read(self, box: Box, out: Buffer) -> None:
        """Read a box into ``out``: ``box.numel`` elements of the entry's dtype."""
        if self._strides is not None:
            start = sum(map(mul, box.offsets, self._strides)) - self._corner
            self._read_elements(self._pieces[0], start, out)
            return
        for piece in self._pieces:
            region = box.intersect(piece.box)
            if region is not None:
                self._read_region(piece, region, box, out)

    def leave_out(self, box: Box) -> None:
        """An earlier merge has read a box: check once more what it could only check in parts."""
        for piece in self._pieces:
            if piece.box.intersect(box) != piece.box:
                self._source.settle(piece.chunk.location, piece.record, [], 0)

    def settle(self) -> None:
        """Hand in what was read: a damaged record that was read whole raises ``MergeError``."""
        for piece in self._pieces:
            nbytes = sum(end - start for start, end, _ in piece.parts)
            self._source.settle(piece.chunk.location, piece.record, piece.parts, nbytes)

    def _read_region(self, piece: Piece, region: Box, box: Box, out: Buffer) -> None:
        """Read the part of ``box`` that lies in one chunk into its place in ``out``."""
        target = span_of(region.within(box), box.sizes)
        span = span_of(region.within(piece.box), piece.box.sizes)
        if span.contiguous and target.contiguous:
            self._read_elements(piece, span.start, out.part(target.start, span.length))
            return
        # One read of the whole span, then the wanted elements: fewer, longer reads.
        raw = Buffer.empty(span.length, out.elements.dtype)
        self._read_elements(piece, span.start, raw)
        _view(out.elements, region.within(box), box.sizes).copy_(
            raw.elements.as_strided(region.sizes, strides_of(piece.box.sizes))
        )

    def _read_elements(self, piece: Piece, start: int, out: Buffer) -> None:
        location, record = piece.chunk.location, piece.record
        begin = start * record.dtype.itemsize
        end = begin + len(out.data)
        if self._ahead:
            self._prefetch(piece, end)
        self._source.read_record(location, record.start + begin, out.data, self._key)
        if piece.parts and piece.parts[-1][1] == begin:
            first, _, crc = piece.parts[-1]
            piece.parts[-1] = (first, end, crc32(out.data, crc))
        else:
            piece.parts.append((begin, end, crc32(out.data)))

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


def _view(flat: torch.Tensor, region: Box, shape: tuple[int, ...]) -> torch.Tensor:
    full = flat.view(shape)
    for axis, (offset, size) in enumerate(zip(region.offsets, region.sizes, strict=True)):
        full = full.narrow(axis, offset, size)
    return full
