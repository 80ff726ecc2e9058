"""The files of one checkpoint, open for reading: by position, with patience, from any thread."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from wsm_megatron.checkpoint.buffer import Buffer
from wsm_megatron.checkpoint.patience import RETRIES, patiently, watched
from wsm_megatron.errors import MergeError

try:
    from wsm_megatron.checkpoint import _reads  # type: ignore[attr-defined]
except ImportError:  # not built: one read at a time
    _reads = None


class SourceFiles:
    """Descriptors of a checkpoint's files, each opened when it is first read.

    Args:
        path: the checkpoint's directory.
        retries: how often an operation that failed is tried again.
    """

    flags = os.O_RDONLY | os.O_CLOEXEC
    by_position = True
    """Any position and length can be read at any address."""

    def __init__(self, path: Path, retries: int = RETRIES):
        self.path, self._retries = path, retries
        self._descriptors: dict[str, int] = {}
        self._lock = threading.Lock()

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def read_some(self, name: str, position: int, out: memoryview, what: str) -> int:
        """One read of at most ``len(out)`` bytes; 0 at the end of the file.

        Args:
            what: what is read, for messages.
        """
        return patiently(
            partial(os.preadv, self.descriptor(name), [out], position),
            partial(self.place, name, position, what),
            self._retries,
        )

    def read(self, name: str, position: int, out: memoryview, what: str) -> None:
        """Fill ``out`` from a file.

        Raises:
            MergeError: the file ends before, or cannot be read.
        """
        done = self.read_some(name, position, out, what)
        while done < len(out):
            count = self.read_some(name, position + done, out[done:], what)
            if count == 0:
                raise MergeError(
                    f"{self.path}: {name} ends at byte {position + done}, inside {what}; the file "
                    "is truncated"
                )
            done += count

    def prefetch(self, name: str, position: int, length: int) -> None:
        """Tell the kernel what will be read next; it reads ahead, or ignores it."""
        descriptor = self.descriptor(name)
        with watched(partial(self.place, name, position, "ahead")):
            if is_cached(descriptor, position + length - 1):
                return  # it would look at every page
            with contextlib.suppress(OSError):  # advice that this file system does not take
                os.posix_fadvise(descriptor, position, length, os.POSIX_FADV_WILLNEED)

    def descriptor(self, name: str) -> int:
        """Of a file, opened."""
        descriptor = self._descriptors.get(name)
        return self._open(name) if descriptor is None else descriptor

    def _open(self, name: str) -> int:
        path = self.path / name
        with self._lock:
            if name not in self._descriptors:
                opened = partial(os.open, path, self.flags)
                self._descriptors[name] = patiently(
                    opened, lambda: f"{path}: opening", self._retries
                )
            return self._descriptors[name]

    def place(self, name: str, position: int, what: str) -> str:
        """A read's checkpoint, file and position, for messages."""
        return f"{self.path}: reading {what} from {name} at byte {position}"


def is_cached(descriptor: int, position: int) -> bool:
    """Whether a byte is in the page cache, as far as the file system says."""
    try:
        return os.preadv(descriptor, [bytearray(1)], position, os.RWF_NOWAIT) == 1
    except (OSError, AttributeError):  # it is not; or the system has no such read
        return False


@dataclass(slots=True)
class Read:
    """Bytes of one file, and where to; ``what`` they are, for messages."""

    files: SourceFiles
    name: str
    position: int
    out: Buffer
    what: str

    @property
    def place(self) -> str:
        return self.files.place(self.name, self.position, self.what)


def read_all(reads: Sequence[Read]) -> None:
    """:meth:`SourceFiles.read` of every one, of one checkpoint or many.

    They are made by one call where they can be. Threads that read one file after another spend
    their time waking each other up to hand Python's global lock around.
    """
    done = 0
    if _reads is not None and all(read.files.by_position for read in reads):
        done = _fill(reads)
    for read in reads[done:]:  # what failed is tried again, and named
        read.files.read(read.name, read.position, read.out.data, read.what)


def _fill(reads: Sequence[Read]) -> int:
    """How many of the reads were made, before one failed."""
    numbers: list[int] = []
    for read in reads:
        numbers += (read.files.descriptor(read.name), read.position)
        numbers += (read.out.address, len(read.out.data))
    current = ctypes.c_int64()
    with watched(lambda: reads[min(current.value, len(reads) - 1)].place):
        return _reads.fill(tuple(numbers), ctypes.addressof(current))
