"""Limits of a child process, and a hook that sees what a hostile input makes it do."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path
from typing import Any

SECONDS = 20
MORE_ADDRESSES = 8 << 30
"""Bytes of address space beyond what the process has; a thread's arena alone reserves 64 MiB."""
MORE_MEMORY = 512 << 20
"""Bytes that it may really use beyond that."""

_RUN = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "pty.spawn")
_RUN += ("os.fork", "os.forkpty", "socket.connect", "ctypes.dlopen", "webbrowser.open")
_CHANGE = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.chmod")
_CHANGE += ("os.chown", "os.truncate", "os.utime", "shutil.rmtree", "shutil.move")


class ForbiddenError(BaseException):
    """Not an ``Exception``: nothing that is being tested may swallow it."""


class Guard:
    """Notes what is forbidden, and forbids it. It cannot be taken off: for a forked process."""

    def __init__(self, may_write: Path, more: tuple[Path, ...] = ()):
        self.seen: list[str] = []
        self.watching = True
        self._roots = [os.path.realpath(root) for root in (may_write, *more)]
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._allows(event, arguments):
            return
        if self.watching:
            self.seen.append(f"{event} {arguments!r}"[:300])
        raise ForbiddenError(event)

    def _allows(self, event: str, arguments: tuple[Any, ...]) -> bool:
        if event == "import":
            return not str(arguments[0]).startswith("tests.fuzz.evil")
        if event in _RUN:
            return False
        if event == "open":
            path, mode, flags = arguments
            writes = any(c in str(mode or "") for c in "wax+") or (
                isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            )
            return not writes or self._is_ours(path)
        if event in _CHANGE:
            paths = arguments[:2] if event in ("os.rename", "os.link") else arguments[:1]
            below = any(isinstance(one, int) and one > 2 for one in arguments[1:])
            return below or all(self._is_ours(path) for path in paths)
        return True

    def _is_ours(self, path: Any) -> bool:
        if isinstance(path, int):
            return True
        real = os.path.realpath(os.fsdecode(path))
        roots = ["/dev/null", *self._roots]
        return any(real == root or real.startswith(root + os.sep) for root in roots)


def limit() -> int:
    """Set the limits; what the process may have used at most when it is done, in bytes."""
    with open("/proc/self/statm", encoding="ascii") as file:
        addresses, used = (int(pages) * resource.getpagesize() for pages in file.read().split()[:2])
    most = addresses + MORE_ADDRESSES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    return used + MORE_MEMORY


def memory_used() -> int:
    """The most that the process had in use so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
