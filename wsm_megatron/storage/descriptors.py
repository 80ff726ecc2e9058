"""Open files of all sources together: as many as the process may have, the others opened again.

A merge of 93 checkpoints of 512 files each would have 47,616 open on one rank.
"""

from __future__ import annotations

import os
import resource
import threading
from collections import deque
from collections.abc import Callable

from wsm_megatron.errors import UsageError

RESERVED = 8
"""Descriptors left to whatever else the process opens: metadata, sockets, syncs."""
_MANY = 2**20
_AT_ONCE = 32
"""A read call may hold this part of what is kept: twice as many threads do as there are at most."""


class Descriptor:
    """An open file. It is closed with its last reference, so whoever reads from it keeps one.

    Attributes:
        touched: it was used since it was last considered for closing.
    """

    __slots__ = ("number", "touched")

    def __init__(self, number: int):
        self.number, self.touched = number, True

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        close(self.number)


Opened = dict[str, Descriptor]
"""Of one checkpoint, by file name."""


class Pool:
    """The descriptors that are kept open, of all checkpoints. Safe to share between threads.

    Those that were not used for the longest time are closed first, roughly (the clock algorithm):
    a read only marks its descriptor, and takes no lock.

    Attributes:
        share: how many one call may use at once.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: deque[tuple[Opened, str]] = deque()
        self._capacity = 0
        self.share = 1

    def keep(self, opened: Opened, name: str, descriptor: Descriptor) -> None:
        """Keep a descriptor in ``opened``; close others where it is one too many."""
        with self._lock:
            if not self._kept:
                self._resize(room_left())
            opened[name] = descriptor
            self._kept.append((opened, name))
            while len(self._kept) > self._capacity:
                self._close_one()

    def release(self, opened: Opened) -> None:
        """Close all of one checkpoint."""
        with self._lock:
            if opened:
                self._kept = deque(one for one in self._kept if one[0] is not opened)
            opened.clear()

    def shrink(self) -> bool:
        """Close all, and keep fewer from now on; whether there were any."""
        with self._lock:
            found = bool(self._kept)
            self._resize(self._capacity // 2)
            while self._kept:
                opened, name = self._kept.popleft()
                del opened[name]
        return found

    def _resize(self, room: int) -> None:
        # A third is for descriptors that are closed here and still read from.
        self._capacity = max(1, room * 2 // 3)
        self.share = max(1, self._capacity // _AT_ONCE)

    def _close_one(self) -> None:
        while True:
            opened, name = self._kept.popleft()
            if not opened[name].touched:
                del opened[name]
                return
            opened[name].touched = False
            self._kept.append((opened, name))


pool = Pool()


def room_left() -> int:
    """Files that this process may still open. The soft limit, usually 1024, is raised for it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MANY if hard == resource.RLIM_INFINITY else min(hard, _MANY)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    limit = _MANY if soft == resource.RLIM_INFINITY else soft
    return limit - RESERVED - len(os.listdir("/proc/self/fd"))


def check_room(files: int) -> None:
    """Raise ``UsageError`` where this process cannot have ``files`` more open, and read beside."""
    left = room_left()
    if left < files + 2:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        raise UsageError(
            f"a rank may have {limit} files open (ulimit -n) and needs {files + 2 - left} more: "
            "raise the limit, or make fewer merges at once"
        )
