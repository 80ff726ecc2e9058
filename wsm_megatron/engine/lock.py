"""One merge at a time for a target: a lock file beside it, kept fresh by who holds it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import socket
import threading
import time
from pathlib import Path
from typing import Any

from wsm_megatron.errors import MergeError

logger = logging.getLogger(__name__)

FRESHEN = 5.0
"""Seconds between two touches of the lock file."""
STALE_AFTER = 30.0
"""Seconds without a touch after which its holder counts as dead."""


class Lock:
    """A file created exclusively, as also NFS does it; taken over from a holder that is dead.

    Dead is a process that this host no longer has, an earlier start of the same Slurm job, and
    whoever has not touched the file for :data:`STALE_AFTER` seconds, by its own clock.
    """

    def __init__(self, path: Path):
        self.path = path
        self._mine = _myself()
        self._released = threading.Event()

    def acquire(self) -> None:
        """Raises ``MergeError`` where another merge holds the lock; ``OSError``."""
        while True:
            with contextlib.suppress(FileExistsError), self.path.open("x") as stream:
                json.dump(self._mine, stream)
                break
            with contextlib.suppress(FileNotFoundError):  # released meanwhile
                self._take_over()
                break
        threading.Thread(target=self._freshen, name="wsm-lock", daemon=True).start()

    def check(self) -> None:
        """Raise ``MergeError`` where another merge has taken the lock over."""
        if _read(self.path) != self._mine:
            raise MergeError(f"{self.path}: another merge has taken over this target")

    def release(self) -> None:
        """Remove the file; does nothing where it is not this process's."""
        self._released.set()
        with contextlib.suppress(OSError):
            if _read(self.path) == self._mine:
                self.path.unlink()

    def _take_over(self) -> None:
        holder = _read(self.path)
        if not (_is_dead(holder) or self._is_stale()):
            raise MergeError(
                f"{self.path}: another merge is making this checkpoint: pid {holder.get('pid')} on "
                f"{holder.get('host')}; wait for it, or give another --save or --output-iteration"
            )
        logger.warning("%s is of a merge that died; taking over", self.path)
        mine = self.path.with_name(f"{self.path.name}-{self._mine['token']}")
        mine.write_text(json.dumps(self._mine))
        os.replace(mine, self.path)
        time.sleep(0.1)  # of two that take over, the later one has it
        self.check()

    def _is_stale(self) -> bool:
        logger.warning("%s: is its merge still running? Watching it for 30 s", self.path)
        touched = self.path.stat().st_mtime_ns
        until = time.monotonic() + STALE_AFTER
        while time.monotonic() < until:
            time.sleep(STALE_AFTER / 30)
            if self.path.stat().st_mtime_ns != touched:
                return False
        return True

    def _freshen(self) -> None:
        while not self._released.wait(FRESHEN):
            with contextlib.suppress(OSError):
                os.utime(self.path)


def _myself() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "token": secrets.token_hex(8),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "slurm_restarts": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
    }


def _read(path: Path) -> dict[str, Any]:
    """Who holds a lock; empty where the file is half written, or no longer there."""
    with contextlib.suppress(ValueError, FileNotFoundError):
        return json.loads(path.read_text())
    return {}


def _is_dead(holder: dict[str, Any]) -> bool:
    me = _myself()
    if me["slurm_job"] and holder.get("slurm_job") == me["slurm_job"]:
        return holder["slurm_restarts"] < me["slurm_restarts"]
    if holder.get("host") != me["host"]:
        return False
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # of another user
        return False
    return False
