"""What of a file is finished and on disk, so that a merge that died can go on from it."""

from __future__ import annotations

import logging
import os
import threading
import time
from functools import partial
from pathlib import Path

from isal.isal_zlib import crc32

from wsm_megatron.checkpoint.patience import patiently, watched

logger = logging.getLogger(__name__)

SYNC_EVERY = 30.0
"""Seconds between two syncs: what a killed merge does at most again."""
SYNC_BYTES = 4 * 2**30
"""Bytes between two syncs at most: no single sync has so much to do that it looks like hanging."""
SUFFIX = ".journal"
_READ_BYTES = 4 * 2**20

Part = tuple[int, int, int]
"""Offset, length and CRC-32 of a finished part of the file."""


class Journal:
    """The finished parts of a file, beside it: a line each, written once the part is on disk.

    Safe to share between threads. Nothing in it is believed before the part's CRC-32 was computed
    again from the file.
    """

    def __init__(self, path: Path, descriptor: int):
        self._descriptor, self._file = descriptor, path
        self._path = path.with_name(path.name + SUFFIX)
        self._lock, self._syncing = threading.Lock(), threading.Lock()
        self._new: list[Part] = []
        self._synced, self._unsynced = time.monotonic(), 0
        self._old = {offset: (length, crc) for offset, length, crc in _read(self._path)}

    def holds(self, offset: int, length: int) -> Part | None:
        """The part at an offset, where an earlier merge finished it and it is still as it was."""
        found, crc = self._old.get(offset), 0
        if found is None or found[0] != length:
            return None
        for start in range(offset, offset + length, _READ_BYTES):
            count = min(_READ_BYTES, offset + length - start)
            data = patiently(
                partial(os.pread, self._descriptor, count, start), partial(self._place, start)
            )
            crc = crc32(data, crc)
        return (offset, length, crc) if crc == found[1] else None

    def add(self, part: Part) -> None:
        """A part has been written; now and then, everything new goes to disk."""
        with self._lock:
            self._new.append(part)
            self._unsynced += part[1]
            due = time.monotonic() - self._synced > SYNC_EVERY or self._unsynced > SYNC_BYTES
            if due:
                self._synced, self._unsynced = time.monotonic(), 0
        if due:
            self.sync()

    def sync(self) -> None:
        """Put the parts on disk, then the lines that say so."""
        with self._syncing:
            with self._lock:
                new, self._new = self._new, []
            if not new:
                return
            with watched(lambda: f"{self._file}: syncing"):
                os.fsync(self._descriptor)
            with watched(lambda: f"{self._path}: writing"), self._path.open("a") as stream:
                stream.writelines(f"{offset} {length} {crc:08x}\n" for offset, length, crc in new)
                stream.flush()
                os.fsync(stream.fileno())

    def _place(self, position: int) -> str:
        return f"{self._file}: reading at byte {position}"


def _read(path: Path) -> list[Part]:
    """Lines of a journal; a last one cut short by a crash does not count."""
    if not path.exists():
        return []
    parts = []
    for line in path.read_text().splitlines(keepends=True):
        words = line.split()
        if len(words) == 3 and line.endswith("\n"):
            parts.append((int(words[0]), int(words[1]), int(words[2], 16)))
    return parts
