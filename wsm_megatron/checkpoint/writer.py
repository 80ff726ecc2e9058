"""Writing a torch_dist checkpoint: a layout known in advance, filled by any thread in any order.

Containers of fixed size follow each other in one file a rank, so every chunk's place is known
before the first byte is. PyTorch's ``FileSystemWriter`` is not used: it holds one tensor of every
key until its file is finished, which for unstacked layers is the model, and it computes CRC-32 at a
fraction of the storage's speed. The result is the same format.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from isal.isal_zlib import crc32, crc32_combine

from wsm_megatron.checkpoint.container import Frame
from wsm_megatron.checkpoint.region import Region
from wsm_megatron.errors import MergeError, StorageError
from wsm_megatron.storage.buffer import Buffer
from wsm_megatron.storage.journal import Journal, JournalEntry
from wsm_megatron.storage.positioned import whole_of, write_at
from wsm_megatron.storage.retry import watched, with_retries

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Item:
    """One thing to store: a chunk of a tensor (``region``), or bytes (``nbytes``) without one."""

    key: str
    region: Region | None = None
    dtype: torch.dtype | None = None
    shape: tuple[int, ...] = ()
    nbytes: int = 0

    @property
    def stored_bytes(self) -> int:
        if self.region is None:
            return self.nbytes
        assert self.dtype is not None
        return frame(self.dtype, self.region.sizes).total_bytes

    @property
    def identity(self) -> str:
        """16 hexadecimal digits that no other item has: of key, region, dtype, shape and size."""
        region = None if self.region is None else (self.region.offsets, self.region.sizes)
        text = repr((self.key, region, str(self.dtype), self.shape, self.nbytes))
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


@dataclass(frozen=True, slots=True)
class Placed:
    """An item and where it is stored."""

    item: Item
    file: str
    offset: int

    @property
    def end(self) -> int:
        return self.offset + self.item.stored_bytes


def file_name(rank: int) -> str:
    """Megatron's and PyTorch's name for a rank's first file."""
    return f"__{rank}_0.distcp"


def place(items: Iterable[Item], rank: int) -> list[Placed]:
    """Lay items end to end in one rank's file."""
    placed, offset = [], 0
    for item in items:
        placed.append(Placed(item, file_name(rank), offset))
        offset += item.stored_bytes
    return placed


@lru_cache(maxsize=4096)
def frame(dtype: torch.dtype, sizes: tuple[int, ...]) -> Frame:
    """The container for a chunk; chunks of one size share it."""
    return Frame(dtype, sizes)


class CheckpointFile:
    """One rank's ``.distcp`` file, written by position. Safe to share between threads.

    Args:
        journal: where to keep one, until the checkpoint is published; a file that is there already,
            of a merge that died, is gone on with.
        size: bytes that the file will have, where that is known. A longer one is cut.
    """

    def __init__(self, path: Path, journal: Path | None = None, size: int | None = None):
        self.path, self._size = path, size
        self.bytes_written = 0
        self._parts: dict[int, tuple[int, int]] = {}
        self._lock = threading.Lock()
        try:
            flags = os.O_RDWR | os.O_CREAT | (0 if journal else os.O_EXCL)
            with watched(lambda: f"{path}: opening"):
                self._descriptor = os.open(path, flags, 0o666)  # the umask decides
                if size is not None and os.fstat(self._descriptor).st_size > size:
                    os.ftruncate(self._descriptor, size)
                self._journal = Journal(journal, path, self._descriptor) if journal else None
        except OSError as error:
            raise MergeError(f"{path}: cannot create: {error.strerror}") from error

    def has(self, placed: Placed) -> bool:
        """Whether an earlier merge finished an item, and its bytes still have their CRC-32."""
        if self._journal is None:
            return False
        item = placed.item
        part = self._journal.holds(placed.offset, item.stored_bytes, item.identity)
        if part is not None:
            with self._lock:
                self._parts[part.offset] = part.length, part.crc
        return part is not None

    def write_bytes(self, placed: Placed, data: bytes) -> None:
        """Write an object entry."""
        assert len(data) == placed.item.nbytes, placed.item.key
        self._write(memoryview(data), placed.offset)
        self._enter(placed, crc32(data))

    def chunk(self, placed: Placed) -> ChunkWriter:
        """Open one chunk for writing, row-major from its first element."""
        item = placed.item
        assert item.dtype is not None and item.region is not None
        return ChunkWriter(self, placed, frame(item.dtype, item.region.sizes))

    def read(self, placed: Placed, first: int, out: Buffer) -> None:
        """Read elements of a finished chunk back, from number ``first`` of it on."""
        item = placed.item
        assert item.dtype is not None and item.region is not None
        offset = placed.offset + frame(item.dtype, item.region.sizes).prefix_bytes
        offset += first * item.dtype.itemsize
        count = with_retries(
            lambda: os.preadv(self._descriptor, [out.data], offset),
            lambda: f"{self.path}: reading at byte {offset}",
        )
        if count != len(out.data):
            raise MergeError(f"{self.path} is shorter than it was written")

    def close(self) -> tuple[int, int]:
        """Make the file durable; its size in bytes and its CRC-32."""
        try:
            if self._journal is not None:
                self._journal.end()
            with watched(lambda: f"{self.path}: syncing"):
                os.fsync(self._descriptor)
        except OSError as error:
            raise StorageError(f"{self.path}: cannot write: {error.strerror}") from error
        finally:
            os.close(self._descriptor)
        parts = ((offset, length, crc) for offset, (length, crc) in self._parts.items())
        position, crc = whole_of(parts, self.path)
        assert self._size in (None, position), f"{position} of {self._size} bytes of {self.path}"
        return position, crc

    def abandon(self) -> None:
        """Close after a failure; what is finished is kept in mind."""
        try:
            if self._journal is not None:
                self._journal.end()
        except OSError as error:
            logger.warning("%s: %s; what it holds is lost", self.path, error.strerror)
        os.close(self._descriptor)

    def _enter(self, placed: Placed, crc: int) -> None:
        length = placed.item.stored_bytes
        with self._lock:
            self._parts[placed.offset] = (length, crc)
            self.bytes_written += length
        if self._journal is None:
            return
        try:
            self._journal.add(JournalEntry(placed.offset, length, crc, placed.item.identity))
        except OSError as error:
            raise StorageError(f"{self.path}: cannot write: {error.strerror}") from error

    def _write(self, data: memoryview, offset: int) -> None:
        write_at(self._descriptor, data, offset, self.path)


class ChunkWriter:
    """Streams one chunk's elements into its container. For one thread."""

    def __init__(self, file: CheckpointFile, placed: Placed, container: Frame):
        self._file, self._placed, self._frame = file, placed, container
        self._position = placed.offset + container.prefix_bytes
        self._crc = 0

    def append(self, elements: Buffer) -> None:
        """Write the next elements, of the chunk's dtype."""
        data = elements.data
        self._crc = crc32(data, self._crc)
        self._file._write(data, self._position)
        self._position += len(data)

    def finish(self) -> None:
        """Write what surrounds the elements, once all of them are in."""
        container, offset = self._frame, self._placed.offset
        assert self._position == offset + container.prefix_bytes + container.nbytes
        prefix, suffix = container.around(self._crc)
        self._file._write(memoryview(prefix), offset)
        self._file._write(memoryview(suffix), self._position)
        crc = crc32_combine(crc32(prefix), self._crc, container.nbytes)
        crc = crc32_combine(crc, crc32(suffix), len(suffix))
        self._file._enter(self._placed, crc)


def write_file(path: Path, data: bytes) -> tuple[int, int]:
    """Write a small file durably; its size and CRC-32."""
    try:
        with watched(lambda: f"{path}: writing"), path.open("xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise MergeError(f"{path}: cannot write: {error.strerror}") from error
    return len(data), crc32(data)
