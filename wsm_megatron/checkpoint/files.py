"""The files of one checkpoint, open for reading: by position, with patience, from any thread."""

from __future__ import annotations

import contextlib
import os
import threading
from functools import partial
from pathlib import Path

from wsm_megatron.checkpoint.patience import RETRIES, patiently
from wsm_megatron.errors import MergeError


class SourceFiles:
    """Descriptors of a checkpoint's files, each opened when it is first read.

    Args:
        path: the checkpoint's directory.
        retries: how often an operation that failed is tried again.
    """

    flags = os.O_RDONLY | os.O_CLOEXEC

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
            partial(os.preadv, self._descriptor(name), [out], position),
            partial(self._place, name, position, what),
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
        with contextlib.suppress(OSError):  # advice that this file system does not take
            os.posix_fadvise(self._descriptor(name), position, length, os.POSIX_FADV_WILLNEED)

    def _descriptor(self, name: str) -> int:
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

    def _place(self, name: str, position: int, what: str) -> str:
        return f"{self.path}: reading {what} from {name} at byte {position}"
