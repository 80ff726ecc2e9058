"""What of a file is finished and on disk, so that a merge that died can go on from it."""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from isal.isal_zlib import crc32

from wsm_megatron.process.timeouts import timeouts
from wsm_megatron.storage.retry import watched, with_retries

logger = logging.getLogger(__name__)

SYNC_BYTES = 128 * 2**20
"""Bytes that start a sync: little is left to do at the file's end, and a killed merge loses little.
The kernel by itself would wait until a tenth of the memory is dirty."""
BEHIND_BYTES = 4 * 2**30
"""Bytes not synced at which writing waits: no sync has so much to do that it looks like hanging."""
SUFFIX = ".journal"
_READ_BYTES = 4 * 2**20
_LINE = re.compile(rb"(\d+) (\d+) ([0-9a-f]{8}) ([0-9a-f]{16})\n")


@dataclass(frozen=True, slots=True)
class JournalEntry:
    """A finished part of a file.

    Attributes:
        identity: 16 hexadecimal digits, of what is stored there and of nothing else.
    """

    offset: int
    length: int
    crc: int
    identity: str


class Journal:
    """The finished parts of a file, beside it: a line each, written once the part is on disk.

    Syncs go on in a thread of its own, beside the writing. Safe to share between threads. Nothing
    in it is believed that is of another identity than what is asked for, nor before the part's
    CRC-32 was computed again from the file. Of two lines of one offset the later one counts.

    Args:
        path: of the journal; it is gone on with where it is there. file, descriptor: of the file.
    """

    def __init__(self, path: Path, file: Path, descriptor: int):
        self._descriptor, self._file, self._path = descriptor, file, path
        self._lock, self._syncing = threading.Lock(), threading.Lock()
        self._new: list[JournalEntry] = []
        self._asked, self._since_asked, self._unsynced = time.monotonic(), 0, 0
        self._wake, self._ending = threading.Event(), False
        self._thread: threading.Thread | None = None
        self._failure: OSError | None = None
        self._old = {part.offset: part for part in _read(self._path)}

    def holds(self, offset: int, length: int, identity: str) -> JournalEntry | None:
        """The part at an offset, where an earlier merge finished it and it is still as it was."""
        found, crc = self._old.get(offset), 0
        if found is None or (found.length, found.identity) != (length, identity):
            return None
        for start in range(offset, offset + length, _READ_BYTES):
            count = min(_READ_BYTES, offset + length - start)
            data = with_retries(
                partial(os.pread, self._descriptor, count, start), partial(self._place, start)
            )
            if len(data) < count:
                return None
            crc = crc32(data, crc)
        return found if crc == found.crc else None

    def add(self, part: JournalEntry) -> None:
        """A part has been written; now and then, everything new goes to disk.

        Raises:
            OSError: a sync has failed.
        """
        with self._lock:
            self._new.append(part)
            self._unsynced += part.length
            self._since_asked += part.length
            due = (
                self._since_asked >= SYNC_BYTES
                or time.monotonic() - self._asked > timeouts.sync_every
            )
            if due:
                self._ask()
            behind = self._unsynced >= BEHIND_BYTES
        if behind:
            self.sync()
        self._raise()

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
                stream.writelines(map(_line, new))
                stream.flush()
                os.fsync(stream.fileno())
            with self._lock:
                self._unsynced -= sum(part.length for part in new)

    def end(self) -> None:
        """Sync the last parts and end the thread; then the file may be closed.

        Raises:
            OSError: a sync has failed, now or before.
        """
        if self._thread is not None:
            self._ending = True
            self._wake.set()
            self._thread.join()
        self._raise()
        self.sync()

    def _ask(self) -> None:
        """Have the thread sync."""
        self._asked, self._since_asked = time.monotonic(), 0
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name="wsm-sync", daemon=True)
            self._thread.start()
        self._wake.set()

    def _serve(self) -> None:
        while not self._ending:
            self._wake.wait()
            self._wake.clear()
            try:
                self.sync()
            except OSError as error:  # told once only, here: a later fsync may succeed
                self._failure = error
                return

    def _raise(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _place(self, position: int) -> str:
        return f"{self._file}: reading at byte {position}"


def _line(part: JournalEntry) -> str:
    return f"{part.offset} {part.length} {part.crc:08x} {part.identity}\n"


def _read(path: Path) -> list[JournalEntry]:
    """Lines of a journal. What a crash has cut short or garbled does not count; a last line of
    that kind is removed, so that no other is written behind it.
    """
    if not path.exists():
        return []
    data = path.read_bytes()
    if not data.endswith(b"\n"):
        os.truncate(path, data.rfind(b"\n") + 1)
    found = map(_LINE.fullmatch, data.splitlines(keepends=True))
    return [
        JournalEntry(int(line[1]), int(line[2]), int(line[3], 16), line[4].decode())
        for line in found
        if line is not None
    ]
