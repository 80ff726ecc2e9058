"""A file of known size, written by position by any thread of any rank, whose CRC-32 is known at the
end.

CRC-32 is linear: that of a file is the XOR of its parts' shares, each part's CRC-32 followed by as
many zeros as there are bytes behind it. So no list of parts is kept, and every rank's share of a
file that several ranks write is one number.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path

from isal.isal_zlib import crc32, crc32_combine

from wsm_megatron.errors import MergeError, StorageError
from wsm_megatron.storage.positioned import write_runs
from wsm_megatron.storage.retry import watched


class ShardFile:
    """One exported file. Safe to share between threads.

    It is opened for writing only, and has its size before a second process opens it: network file
    systems then send exactly the bytes that were written, also of a page that others write to.

    Args:
        made: the file is there already, of its size.

    Raises ``MergeError`` where it cannot be created, ``StorageError`` where it cannot be written.
    """

    def __init__(self, path: Path, size: int, *, made: bool = False):
        self.path, self._size = path, size
        self.bytes_written = 0
        self._crc = 0
        self._lock = threading.Lock()
        try:
            flags = os.O_WRONLY | (0 if made else os.O_CREAT | os.O_EXCL)
            with watched(lambda: f"{path}: opening"):
                self._descriptor = os.open(path, flags, 0o666)
                if not made:
                    os.truncate(self._descriptor, size)
        except OSError as error:
            raise MergeError(f"{path}: cannot create: {error.strerror}") from error

    def write(self, offset: int, data: memoryview) -> None:
        """Write bytes that no other call writes."""
        self.write_runs([offset], data)

    def write_runs(self, offsets: Sequence[int], data: memoryview, *, counts: bool = True) -> None:
        """Write parts of ``data``, all of one length, each from its own byte on, in order.

        Args:
            counts: false for what will be written anew.
        """
        write_runs(self._descriptor, data, offsets, self.path)
        if not counts:
            return
        nbytes, crc, before = len(data) // len(offsets), 0, offsets[0]
        for n, offset in enumerate(offsets):
            run = crc32(data[n * nbytes : (n + 1) * nbytes])
            crc, before = crc32_combine(crc, run, offset - before), offset
        share = crc32_combine(crc, 0, self._size - before - nbytes)
        with self._lock:
            self._crc ^= share
            self.bytes_written += len(data)

    def close(self) -> tuple[int, int]:
        """Make the file durable; how many bytes count, and their share of the file's CRC-32."""
        try:
            with watched(lambda: f"{self.path}: syncing"):
                os.fsync(self._descriptor)
        except OSError as error:
            raise StorageError(f"{self.path}: cannot write: {error.strerror}") from error
        finally:
            os.close(self._descriptor)
        return self.bytes_written, self._crc

    def abandon(self) -> None:
        """Close after a failure."""
        os.close(self._descriptor)
