"""The files of one checkpoint, open for reading: by position, with patience, from any thread."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from wsm_megatron.errors import MergeError
from wsm_megatron.storage.buffer import Buffer
from wsm_megatron.storage.descriptors import Descriptor, Opened, pool
from wsm_megatron.storage.retry import RETRIES, watched, with_retries

try:
    from wsm_megatron.storage import _reads  # type: ignore[attr-defined]
except ImportError:  # not built: one read at a time
    _reads = None

_FLAGS = os.O_RDONLY | os.O_CLOEXEC


class SourceFiles:
    """A checkpoint's files, each opened when it is read, and again where it had to be closed.

    Args:
        path: the checkpoint's directory.
        retries: how often an operation that failed is tried again.
    """

    def __init__(self, path: Path, retries: int = RETRIES):
        self.path, self._retries = path, retries
        self._opened: Opened = {}
        self._lock = threading.Lock()

    def close(self) -> None:
        pool.release(self._opened)

    def read_some(self, name: str, position: int, out: memoryview, what: str) -> int:
        """One read of at most ``len(out)`` bytes; 0 at the end of the file.

        Args:
            what: what is read, for messages.
        """
        descriptor = self.descriptor(name)  # kept until the read is over
        return with_retries(
            partial(os.preadv, descriptor.number, [out], position),
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
            if is_cached(descriptor.number, position + length - 1):
                return  # it would look at every page
            with contextlib.suppress(OSError):  # advice that this file system does not take
                os.posix_fadvise(descriptor.number, position, length, os.POSIX_FADV_WILLNEED)

    def descriptor(self, name: str) -> Descriptor:
        """Of a file, opened; it stays so as long as the caller refers to it."""
        descriptor = self._opened.get(name)
        if descriptor is None:
            return self._open(name)
        descriptor.touched = True
        return descriptor

    def _open(self, name: str) -> Descriptor:
        path = self.path / name
        with self._lock:
            descriptor = self._opened.get(name)
            if descriptor is None:
                number = with_retries(
                    partial(_open_file, path), lambda: f"{path}: opening", self._retries
                )
                descriptor = Descriptor(number)
                pool.keep(self._opened, name, descriptor)
            return descriptor

    def place(self, name: str, position: int, what: str) -> str:
        """A read's checkpoint, file and position, for messages."""
        return f"{self.path}: reading {what} from {name} at byte {position}"


def _open_file(path: Path) -> int:
    try:
        return os.open(path, _FLAGS)
    except OSError as error:
        if error.errno not in (errno.EMFILE, errno.ENFILE) or not pool.shrink():
            raise
    return os.open(path, _FLAGS)


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
    if _reads is not None:
        while done < len(reads):
            some = reads[done : done + pool.share]
            filled = _fill(some)
            done += filled
            if filled < len(some):
                break
    for read in reads[done:]:  # what failed is tried again, and named
        read.files.read(read.name, read.position, read.out.data, read.what)


def _fill(reads: Sequence[Read]) -> int:
    """How many of the reads were made, before one failed."""
    descriptors = [read.files.descriptor(read.name) for read in reads]  # kept until all are read
    numbers: list[int] = []
    for read, descriptor in zip(reads, descriptors, strict=True):
        numbers += (descriptor.number, read.position)
        numbers += (read.out.address, len(read.out.data))
    current = ctypes.c_int64()
    with watched(lambda: reads[min(current.value, len(reads) - 1)].place):
        return _reads.fill(tuple(numbers), ctypes.addressof(current))
