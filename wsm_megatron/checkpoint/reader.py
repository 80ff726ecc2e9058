"""Reading a checkpoint: any region of any tensor, any byte range, every byte checked by CRC-32."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Iterable
from pathlib import Path

import torch
from isal.isal_zlib import crc32, crc32_combine

from wsm_megatron.checkpoint.chunk_index import ChunkIndex
from wsm_megatron.checkpoint.container import Record, locate
from wsm_megatron.checkpoint.layout import Chunk, Layout, Location, ObjectEntry, check_size
from wsm_megatron.checkpoint.region import Region
from wsm_megatron.checkpoint.region_reader import Piece, RegionReader, Segment
from wsm_megatron.checkpoint.tiling import tiling_fault
from wsm_megatron.errors import MergeError
from wsm_megatron.safe_pickle.archive import check_archive
from wsm_megatron.storage.buffer import Buffer
from wsm_megatron.storage.files import Read, SourceFiles
from wsm_megatron.storage.retry import RETRIES, with_retries

_FILE_PIECE = 4 * 2**20
_ENDS = 2**11
"""Bytes at either end of a container that hold all of it but the storage."""
_SMALL_FILE = 2**32

Ledger = dict[Location, list[Segment]]
"""Records read in parts only, each part with its CRC-32."""


class CheckpointReader:
    """Reads one checkpoint. Safe to share between threads.

    Tensors are read through :meth:`read` and, in pieces, through :meth:`region_reader`. Every byte
    read enters a CRC-32; a record that is read from end to end is compared at once, other parts
    wait in :attr:`ledger` for :meth:`verify`.

    Args:
        retries: how often a read that failed is tried again.
        ahead: bytes of a chunk that are read in advance; 0: as the kernel decides.
    """

    def __init__(self, layout: Layout, retries: int = RETRIES, ahead: int = 0):
        self.layout = layout
        self.bytes_read = 0
        self.ledger: Ledger = {}
        self._files = SourceFiles(layout.path, retries)
        self._ahead = ahead
        self._indices: dict[str, ChunkIndex] = {}
        self._lock = threading.Lock()

    def close(self) -> None:
        self._files.close()

    def read_object(self, entry: ObjectEntry) -> bytes:
        """The raw bytes of an object entry, a ``torch.save`` archive.

        Raises:
            MergeError: it cannot be read, or it is not such an archive, sound to the last byte.
        """
        location = entry.location
        path = self.layout.path / location.file
        size = with_retries(path.stat, lambda: f"{path}: looking").st_size
        check_size(self.layout.path, location.file, size, location.offset + location.length)
        data = bytearray(location.length)
        self.read_record(location, 0, memoryview(data), entry.key)
        with self._lock:
            self.bytes_read += len(data)
        try:
            check_archive(data)
        except ValueError as error:
            raise MergeError(
                f"{self.layout.path}: {entry.key} in {location.file} at byte {location.offset} is "
                f"no sound torch.save archive ({error}): the file changed on disk since it was "
                "saved; restore it or leave the checkpoint out"
            ) from error
        return bytes(data)

    def read(self, key: str, region: Region) -> torch.Tensor:
        """A region of a tensor, as 1-D CPU tensor in row-major order. Its CRC-32 is not compared.

        Raises:
            MergeError: as for :meth:`region_reader`.
        """
        elements = torch.empty(region.numel, dtype=self.layout.tensors[key].dtype)
        self.region_reader(key, region).read(region, Buffer(elements))
        return elements

    def read_run(self, key: str, chunk: Chunk, start: int, numel: int) -> torch.Tensor:
        """Elements ``start .. start + numel`` of one chunk, counted in row-major order.

        As :meth:`read`, for a few elements: nothing is looked up but the chunk's container.
        """
        record, out = self.record(key, chunk), Buffer.empty(numel, self.layout.tensors[key].dtype)
        assert start + numel <= chunk.numel, "a run within the chunk"
        begin = record.start + start * record.dtype.itemsize
        self.read_record(chunk.location, begin, out.data, key)
        return out.elements

    def region_reader(self, key: str, region: Region) -> RegionReader:
        """Open the chunks that hold a region of a tensor.

        Raises:
            MergeError: a container is damaged, or the chunks do not tile the region.
        """
        with self._lock:
            index = self._indices.get(key)
            if index is None:
                index = self._indices[key] = ChunkIndex(self.layout.tensors[key])
        pieces = [
            Piece(chunk, Region(chunk.offsets, chunk.sizes), self.record(key, chunk))
            for chunk in index.overlapping(region)
        ]
        parts = [common for piece in pieces if (common := region.intersect(piece.region))]
        fault = tiling_fault(region.sizes, tuple(part.within(region) for part in parts))
        if fault is not None:
            raise MergeError(
                f"{self.layout.path}: {key} at {region.offsets} is not whole: {fault}, counted "
                "from there; the checkpoint is incomplete, leave it out"
            )
        return RegionReader(self, key, region, pieces, self._ahead)

    def record(self, key: str, chunk: Chunk) -> Record:
        """Where a chunk's elements are in its container.

        Raises:
            MergeError: the container is damaged, or holds something else.
        """
        record = self._locate(chunk.location, key)
        entry = self.layout.tensors[key]
        if record.dtype != entry.dtype or record.shape != chunk.sizes:
            raise MergeError(
                f"{self.layout.path}: {key} at {chunk.offsets} is {record.dtype} {record.shape} in "
                f"{chunk.location.file} but {entry.dtype} {chunk.sizes} in .metadata"
            )
        return record

    def checksum(self, key: str, chunk: Chunk) -> int:
        """CRC-32 of a chunk's elements, as its container records it; they are not read."""
        return self.record(key, chunk).crc

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

    def finish(self, location: Location, record: Record, parts: list[Segment], nbytes: int) -> None:
        """Compare a record read whole; keep the parts of any other for :meth:`verify`."""
        with self._lock:
            self.bytes_read += nbytes
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

    def read_record(self, location: Location, start: int, out: memoryview, key: str) -> None:
        """Fill ``out`` from a location's bytes, ``start`` counted from its beginning."""
        self._files.read(location.file, location.offset + start, out, key)

    def request(self, location: Location, start: int, out: Buffer, key: str) -> Read:
        """How to fill ``out`` from a location's bytes, ``start`` counted from its beginning."""
        return Read(self._files, location.file, location.offset + start, out, key)

    def prefetch(self, location: Location, start: int, length: int) -> None:
        """Have the kernel read some of a location's bytes in advance."""
        self._files.prefetch(location.file, location.offset + start, length)

    def _locate(self, location: Location, key: str) -> Record:
        window = _Window(self._files, location, key)
        try:
            return locate(io.BufferedReader(window, 4096))
        except ValueError as error:
            raise MergeError(
                f"{self.layout.path}: {key} in {location.file} at byte {location.offset} is "
                f"damaged: {error}"
            ) from error

    def crc_on(self, location: Location, crc: int, what: str) -> int:
        """A CRC-32 that goes on through the bytes of a location.

        Args:
            what: what is read, for messages.
        """
        buffer = bytearray(min(location.length, _FILE_PIECE))
        for start in range(0, location.length, len(buffer) or 1):
            part = memoryview(buffer)[: location.length - start]
            self.read_record(location, start, part, what)
            crc = crc32(part, crc)
        return crc

    def _crc_of(self, location: Location, record: Record) -> int:
        storage = Location(location.file, location.offset + record.start, record.nbytes)
        crc = self.crc_on(storage, 0, "a tensor")
        with self._lock:
            self.bytes_read += record.nbytes
        return crc


class _Window(io.RawIOBase):
    """A byte range of a file as a seekable stream, for ``zipfile``.

    Both ends, where all is that ``zipfile`` looks at, are read in advance once each.
    """

    def __init__(self, files: SourceFiles, location: Location, what: str):
        self._files, self._location, self._what = files, location, what
        self._position = 0
        length = location.length
        whole = length <= 2 * _ENDS
        spans = [(0, length)] if whole else [(0, _ENDS), (length - _ENDS, _ENDS)]
        self._ends = [(start, self._read(start, count)) for start, count in spans]

    def _read(self, start: int, count: int) -> memoryview:
        out = memoryview(bytearray(count))
        position = self._location.offset + start
        return out[: self._files.read_some(self._location.file, position, out, self._what)]

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        end = self._location.length
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: end}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        count = max(0, min(len(buffer), self._location.length - self._position))
        if count == 0:
            return 0
        for start, known in self._ends:
            if start <= self._position < start + len(known):
                part = known[self._position - start :][:count]
                buffer[: len(part)] = part
                self._position += len(part)
                return len(part)
        position = self._location.offset + self._position
        done = self._files.read_some(
            self._location.file, position, memoryview(buffer)[:count], self._what
        )
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


def read_file(path: Path) -> bytes:
    """A small file's bytes. Raises ``MergeError`` for one that is no small file."""
    size = with_retries(path.stat, lambda: f"{path}: looking").st_size
    if size > _SMALL_FILE:
        raise MergeError(f"{path}: {size} bytes are more than such a file has: damaged")
    return with_retries(path.read_bytes, lambda: f"{path}: reading")


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
