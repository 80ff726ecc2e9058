"""A file of known size, written by position by any thread, whose CRC-32 is known at the end."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from isal.isal_zlib import crc32

from wsm_megatron.errors import MergeError, StorageError
from wsm_megatron.storage.positioned import whole_of, write_at
from wsm_megatron.storage.retry import watched


class ShardFile:
    """One exported file. Safe to share between threads.

    Raises ``MergeError`` where it cannot be created, ``StorageError`` where it cannot be written.
    """

    def __init__(self, path: Path, size: int):
        self.path, self._size = path, size
        self.bytes_written = 0
        self._parts: list[tuple[int, int, int]] = []
        self._lock = threading.Lock()
        try:
            with watched(lambda: f"{path}: opening"):
                self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except OSError as error:
            raise MergeError(f"{path}: cannot create: {error.strerror}") from error

    def write(self, offset: int, data: memoryview) -> None:
        """Write bytes that no other call writes."""
        write_at(self._descriptor, data, offset, self.path)
        with self._lock:
            self._parts.append((offset, len(data), crc32(data)))
            self.bytes_written += len(data)

    def close(self) -> tuple[int, int]:
        """Make the file durable; its size in bytes and its CRC-32. All of it must be written."""
        try:
            with watched(lambda: f"{self.path}: syncing"):
                os.fsync(self._descriptor)
        except OSError as error:
            raise StorageError(f"{self.path}: cannot write: {error.strerror}") from error
        finally:
            os.close(self._descriptor)
        position, crc = whole_of(self._parts, self.path)
        assert position == self._size, f"{position} of {self._size} bytes of {self.path}"
        return position, crc

    def abandon(self) -> None:
        """Close after a failure."""
        os.close(self._descriptor)
