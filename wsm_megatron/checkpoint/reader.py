"""Reading a checkpoint: any box of any tensor, any byte range, every byte checked by CRC-32."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from isal.isal_zlib import crc32, crc32_combine

from wsm_megatron.checkpoint.box import Box, span_of
from wsm_megatron.checkpoint.container import Record, locate
from wsm_megatron.checkpoint.layout import Chunk, Layout, Location, ObjectEntry, TensorEntry
from wsm_megatron.checkpoint.patience import RETRIES, patiently
from wsm_megatron.errors import MergeError

_FILE_PIECE = 4 * 2**20

Segment = tuple[int, int, int]
"""Bytes ``start .. end`` of a record and their CRC-32."""

Ledger = dict[Location, list[Segment]]
"""Records read in parts only, each part with its CRC-32."""


class CheckpointReader:
    """Reads one checkpoint. Safe to share between threads.

    Tensors are read through :meth:`cover`. Every byte read enters a CRC-32; a record read from end
    to end is compared at once, the others wait in :attr:`ledger` for :meth:`verify`. A read that
    fails is tried ``retries`` times more.
    """

    def __init__(self, layout: Layout, retries: int = RETRIES):
        self.layout, self._retries = layout, retries
        self.bytes_read = 0
        self.ledger: Ledger = {}
        self._files: dict[str, int] = {}
        self._indices: dict[str, _ChunkIndex] = {}
        self._lock = threading.Lock()

    def close(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def read_object(self, entry: ObjectEntry) -> bytes:
        """The raw bytes of an object entry."""
        data = bytearray(entry.location.length)
        self.read_bytes(entry.location, 0, memoryview(data), entry.key)
        return bytes(data)

    def cover(self, key: str, box: Box) -> Cover:
        """Open the chunks that hold a region of a tensor.

        Raises:
            MergeError: a container is damaged, or the chunks do not cover the box.
        """
        with self._lock:
            index = self._indices.get(key)
            if index is None:
                index = self._indices[key] = _ChunkIndex(self.layout.tensors[key])
        pieces = [
            _Piece(chunk, Box(chunk.offsets, chunk.sizes), self._record(key, chunk))
            for chunk in index.overlapping(box)
        ]
        covered = sum(_common(box, piece.box).numel for piece in pieces)
        if covered != box.numel:
            raise MergeError(
                f"{self.layout.path}: the chunks of {key} cover {covered} of {box.numel} elements "
                f"at {box.offsets}; the checkpoint is incomplete, leave it out"
            )
        return Cover(self, key, pieces)

    def verify(self, ledgers: Iterable[Ledger] | None = None) -> None:
        """Compare the CRC-32 of records that were read in parts with their containers'.

        Args:
            ledgers: of all ranks, where several read one record; by default this reader's own.

        Raises:
            MergeError: naming the file and the record that changed.
        """
        merged: dict[Location, set[Segment]] = {}
        for ledger in [self.ledger] if ledgers is None else ledgers:
            for location, parts in ledger.items():
                merged.setdefault(location, set()).update(parts)
        for location, segments in merged.items():
            record = self._locate(location, "a tensor")
            crc = _joined(sorted(segments), record.nbytes)
            if crc is None:  # overlapping or strided pieces: once more, in one go
                crc = self._crc_of(location, record)
            self.compare(location, record, crc)

    def settle(self, location: Location, record: Record, parts: list[Segment]) -> None:
        """Compare a record read whole; keep the parts of any other for :meth:`verify`."""
        if len(parts) == 1 and parts[0][:2] == (0, record.nbytes):
            self.compare(location, record, parts[0][2])
            return
        with self._lock:
            self.ledger.setdefault(location, []).extend(parts)

    def compare(self, location: Location, record: Record, crc: int) -> None:
        if crc == record.crc:
            return
        keys = [
            key
            for key, entry in self.layout.tensors.items()
            if any(chunk.location == location for chunk in entry.chunks)
        ]
        raise MergeError(
            f"{self.layout.path}: CRC-32 of {', '.join(keys)} does not match in {location.file} at "
            f"byte {location.offset + record.start} ({record.nbytes} bytes): the file changed on "
            "disk since it was saved; restore it or leave the checkpoint out"
        )

    def read_bytes(self, location: Location, start: int, out: memoryview, key: str) -> None:
        """Fill ``out`` from a location's bytes, ``start`` counted from its beginning."""
        descriptor = self._file(location.file)
        done, position = 0, location.offset + start
        while done < len(out):
            count = patiently(
                partial(os.preadv, descriptor, [out[done:]], position + done),
                partial(self._place, key, location.file, position + done),
                self._retries,
            )
            if count == 0:
                raise MergeError(
                    f"{self.layout.path}: {location.file} ends at byte {position + done}, inside "
                    f"{key}; the file is truncated"
                )
            done += count
        with self._lock:
            self.bytes_read += done

    def _place(self, key: str, file: str, position: int) -> str:
        return f"{self.layout.path}: reading {key} from {file} at byte {position}"

    def _record(self, key: str, chunk: Chunk) -> Record:
        record = self._locate(chunk.location, key)
        entry = self.layout.tensors[key]
        if record.dtype != entry.dtype or record.shape != chunk.sizes:
            raise MergeError(
                f"{self.layout.path}: {key} at {chunk.offsets} is {record.dtype} {record.shape} in "
                f"{chunk.location.file} but {entry.dtype} {chunk.sizes} in .metadata"
            )
        return record

    def _locate(self, location: Location, key: str) -> Record:
        window = _Window(
            self._file(location.file),
            location.offset,
            location.length,
            lambda read, position: patiently(
                read, partial(self._place, key, location.file, position), self._retries
            ),
        )
        try:
            return locate(io.BufferedReader(window, 4096))
        except ValueError as error:
            raise MergeError(
                f"{self.layout.path}: {key} in {location.file} at byte {location.offset} is "
                f"damaged: {error}"
            ) from error

    def _crc_of(self, location: Location, record: Record) -> int:
        crc, buffer = 0, bytearray(min(record.nbytes, 4 << 20))
        for start in range(0, record.nbytes, len(buffer) or 1):
            part = memoryview(buffer)[: record.nbytes - start]
            self.read_bytes(location, record.start + start, part, "a tensor")
            crc = crc32(part, crc)
        return crc

    def _file(self, name: str) -> int:
        with self._lock:
            if name not in self._files:
                path = self.layout.path / name
                self._files[name] = patiently(
                    partial(os.open, path, os.O_RDONLY | os.O_CLOEXEC),
                    lambda: f"{path}: opening",
                    self._retries,
                )
            return self._files[name]


@dataclass
class _Piece:
    """One chunk that a cover reads from, and the parts of its record read so far."""

    chunk: Chunk
    box: Box
    record: Record
    parts: list[Segment] = field(default_factory=list)


class Cover:
    """The chunks of one checkpoint that hold one region of a tensor. For one thread.

    Call :meth:`read` for boxes inside the region, in row-major order for the longest reads, then
    :meth:`settle`.
    """

    def __init__(self, reader: CheckpointReader, key: str, pieces: list[_Piece]):
        self._reader, self._key, self._pieces = reader, key, pieces

    def read(self, box: Box, out: torch.Tensor) -> None:
        """Read a box into ``out``: 1-D CPU tensor of the entry's dtype, ``box.numel`` elements."""
        for piece in self._pieces:
            region = box.intersect(piece.box)
            if region is not None:
                self._read_region(piece, region, box, out)

    def leave_out(self, box: Box) -> None:
        """An earlier merge has read a box: check once more what it could only check in parts."""
        for piece in self._pieces:
            if piece.box.intersect(box) != piece.box:
                self._reader.settle(piece.chunk.location, piece.record, [])

    def settle(self) -> None:
        """Hand in what was read: a damaged record that was read whole raises ``MergeError``."""
        for piece in self._pieces:
            self._reader.settle(piece.chunk.location, piece.record, piece.parts)

    def _read_region(self, piece: _Piece, region: Box, box: Box, out: torch.Tensor) -> None:
        """Read the part of ``box`` that lies in one chunk into its place in ``out``."""
        target = span_of(region.within(box), box.sizes)
        span = span_of(region.within(piece.box), piece.box.sizes)
        if span.contiguous and target.contiguous:
            self._read_elements(piece, span.start, out.narrow(0, target.start, span.length))
            return
        # One read of the whole span, then the wanted elements: fewer, longer reads.
        raw = torch.empty(span.length, dtype=out.dtype)
        self._read_elements(piece, span.start, raw)
        _view(out, region.within(box), box.sizes).copy_(
            raw.as_strided(region.sizes, _stride(piece.box.sizes))
        )

    def _read_elements(self, piece: _Piece, start: int, out: torch.Tensor) -> None:
        data = as_bytes(out)
        offset = start * out.element_size()
        location, record = piece.chunk.location, piece.record
        self._reader.read_bytes(location, record.start + offset, data, self._key)
        end = offset + len(data)
        if piece.parts and piece.parts[-1][1] == offset:
            first, _, crc = piece.parts[-1]
            piece.parts[-1] = (first, end, crc32(data, crc))
        else:
            piece.parts.append((offset, end, crc32(data)))


class _ChunkIndex:
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


def _common(box: Box, other: Box) -> Box:
    region = box.intersect(other)
    assert region is not None
    return region


class _Window(io.RawIOBase):
    """A byte range of an open file as a seekable stream, by ``pread``.

    ``patiently(read, position)`` makes every read: ``zipfile`` would take an ``OSError`` for
    damage.
    """

    def __init__(
        self,
        descriptor: int,
        offset: int,
        length: int,
        patiently: Callable[[Callable[[], int], int], int],
    ):
        self._descriptor, self._offset, self._length, self._position = descriptor, offset, length, 0
        self._patiently = patiently

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        count = max(0, min(len(buffer), self._length - self._position))
        view = memoryview(buffer)[:count]
        position = self._offset + self._position
        read = partial(os.preadv, self._descriptor, [view], position)
        done = self._patiently(read, position) if count else 0
        self._position += done
        return done


def _joined(parts: list[Segment], nbytes: int) -> int | None:
    """CRC-32 of a whole record from its parts; None unless they tile it exactly."""
    crc, position = 0, 0
    for start, end, part in parts:
        if start != position:
            return None
        crc = crc32_combine(crc, part, end - start)
        position = end
    return crc if position == nbytes else None


def _stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()


def _view(flat: torch.Tensor, region: Box, shape: tuple[int, ...]) -> torch.Tensor:
    full = flat.view(shape)
    for axis, (offset, size) in enumerate(zip(region.offsets, region.sizes, strict=True)):
        full = full.narrow(axis, offset, size)
    return full


def as_bytes(flat: torch.Tensor) -> memoryview:
    """The memory of a contiguous 1-D CPU tensor."""
    return flat.view(torch.uint8).numpy().data


def read_file(path: Path) -> bytes:
    """A small file's bytes."""
    return patiently(path.read_bytes, lambda: f"{path}: reading")


def size_and_crc(path: Path) -> tuple[int, int]:
    """Size and CRC-32 of a whole file of any size."""
    size = crc = 0
    try:
        with path.open("rb") as stream:
            while piece := stream.read(_FILE_PIECE):
                size, crc = size + len(piece), crc32(piece, crc)
    except OSError as error:
        raise MergeError(f"{path}: cannot read: {error.strerror}") from error
    return size, crc
