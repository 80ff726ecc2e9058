"""One merge at a time for a target: a lock file beside it, kept fresh by who holds it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wsm_megatron.errors import MergeError
from wsm_megatron.process.signals import ending_later
from wsm_megatron.process.timeouts import timeouts
from wsm_megatron.storage.json_file import parse_json
from wsm_megatron.storage.retry import watched

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Holder:
    """What a lock file says.

    Attributes:
        token: of one acquisition, no other has it. touched: when the file was, in ns, by the clock
            of the storage. says: who holds it, and what for.
    """

    path: Path
    token: str
    touched: int
    says: dict[str, Any]

    def __str__(self) -> str:
        return f"pid {self.says.get('pid')} on {self.says.get('host')}"


class Lock:
    """A file created exclusively, as also NFS does it; taken over from a holder that is dead.

    Dead is a process that this machine no longer has, an earlier start of the same Slurm job, and
    whoever has not touched the file for ``stale_after`` seconds while it was watched.

    The successor of a dead holder is whoever first creates a file named after the dead one's token,
    the *claim*: of any number of processes only one can. Its own successor, should it die too, is
    told the same way. Who holds the lock is therefore the end of a chain that begins at the lock
    file, and whoever is not the end of it touches nothing. A claim is moved over the lock file at
    once, so the chain is long only where a process was killed in between.

    Args:
        makes: tells what is done under the lock. Another process that does the same is waited for.
    """

    def __init__(self, path: Path, makes: str):
        self.path = path
        self._mine = _myself() | {"makes": makes}
        self._thread: threading.Thread | None = None
        self._over, self._lost = threading.Event(), False
        self._seen: tuple[str, int] | None = None
        self._since, self._touches = 0.0, False

    def acquire(self, check: Callable[[], None] = lambda: None) -> None:
        """Hold the lock; where another process does the very same, once that one is done.

        Args:
            check: called while this waits; what it raises ends the wait.

        Raises:
            MergeError: a process that lives holds it for something else. OSError.
        """
        pause = 0.02
        said = (
            time.monotonic() - timeouts.say_waiting_every + 1.0
        )  # a wait of a second is not worth a word
        while (other := self.try_acquire()) is not None:
            alive, same = self._is_alive(other), other.says.get("makes") == self._mine["makes"]
            if alive and not same:
                raise MergeError(
                    f"{self.path}: another merge is making this checkpoint: {other}; wait for it, "
                    "or give another --save or --output-iteration"
                )
            if time.monotonic() - said >= timeouts.say_waiting_every:
                said = time.monotonic()
                doing = "is doing the same; waiting for it" if same else "holds it; does it live?"
                logger.warning("%s: %s %s", self.path, other, doing)
            check()
            time.sleep(pause)
            pause = min(2 * pause, timeouts.stale_after / 30)

    def try_acquire(self) -> _Holder | None:
        """Hold the lock now, or say who does. Raises ``OSError``."""
        while True:
            chain = self._chain()
            if chain and self._is_alive(chain[-1]) is not False:
                return chain[-1]
            with ending_later():
                if self._claim(chain):
                    return None

    def holds(self) -> bool:
        """Whether this process still has the lock. Raises ``OSError``."""
        if self._thread is None or self._lost:
            return False
        chain = self._chain()
        self._lost = not chain or chain[-1].token != self._mine["token"]
        return not self._lost

    def check(self, look: bool = True) -> None:
        """Raise ``MergeError`` where another merge has taken the lock over.

        Args:
            look: now; otherwise what was found within the last ``freshen_every`` seconds.
        """
        if self._lost or (look and not self.holds()):
            raise MergeError(
                f"{self.path}: another merge has taken over this target; it is left to that one"
            )

    def release(self) -> None:
        """Remove the file, unless another has taken it over."""
        self._over.set()
        if self._thread is not None:
            self._thread.join(1.0)
        with contextlib.suppress(OSError), watched(lambda: f"{self.path}: unlocking"):
            if self.holds():
                self.path.unlink()
                for claim in self.path.parent.glob(f"{self.path.name}-*"):  # of who gave up
                    claim.unlink(missing_ok=True)

    def _chain(self) -> list[_Holder]:
        """From who made the lock file to who holds the lock; nothing where nobody does."""
        chain: list[_Holder] = []
        path = self.path
        with watched(lambda: f"{self.path}: reading"):
            while (holder := _read(path)) is not None:
                chain.append(holder)
                path = self._claim_on(holder)
        return chain

    def _claim_on(self, holder: _Holder) -> Path:
        return self.path.with_name(f"{self.path.name}-{holder.token}")

    def _claim(self, chain: list[_Holder]) -> bool:
        """Succeed the dead holder at the end of a chain; False where another was faster."""
        path = self._claim_on(chain[-1]) if chain else self.path
        with watched(lambda: f"{path}: locking"):
            try:
                descriptor = _create(path, self._mine)
            except FileExistsError:
                return False
            now = self._chain()  # it may have begun anew meanwhile, and no longer lead here
            if not now or now[-1].token != self._mine["token"]:
                path.unlink(missing_ok=True)
                os.close(descriptor)
                return False
            if chain:
                logger.warning("%s is of a merge that died; taking over", self.path)
                os.replace(path, self.path)
                for dead in chain[1:]:
                    dead.path.unlink(missing_ok=True)
        self._thread = threading.Thread(
            target=self._freshen, args=(descriptor,), name="wsm-lock", daemon=True
        )
        self._thread.start()
        return True

    def _is_alive(self, holder: _Holder) -> bool | None:
        """As far as it can be told by now; None: it must be watched."""
        seen, now = (holder.token, holder.touched), time.monotonic()
        if seen != self._seen:
            self._touches = self._seen is not None and self._seen[0] == holder.token
            self._seen, self._since = seen, now
        alive = _lives(holder.says)
        if alive is False or now - self._since > timeouts.stale_after:
            return False
        lately = abs(time.time() - holder.touched / 1e9) < timeouts.stale_after
        return True if self._touches or (alive and lately) else None

    def _freshen(self, descriptor: int) -> None:
        """Touch the file, wherever it has been moved; never another's."""
        try:
            while not (self._over.wait(timeouts.freshen_every) or self._lost):
                with contextlib.suppress(OSError):  # the next time may go well
                    if self.holds():
                        os.utime(descriptor)
        finally:
            os.close(descriptor)


def _create(path: Path, says: dict[str, Any]) -> int:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        os.write(descriptor, json.dumps(says).encode())
    except OSError:
        os.close(descriptor)
        path.unlink(missing_ok=True)
        raise
    return descriptor


def _read(path: Path) -> _Holder | None:
    """Who a lock file is of. Opening it lets an NFS client ask the server how it is by now."""
    try:
        with path.open("rb") as stream:
            text, stat = stream.read(), os.fstat(stream.fileno())
    except FileNotFoundError:
        return None
    says: Any = None
    with contextlib.suppress(ValueError):
        says = parse_json(text)
    if isinstance(says, dict) and re.fullmatch("[0-9a-f]{16}", str(says.get("token"))):
        return _Holder(path, says["token"], stat.st_mtime_ns, says)
    cut = f"cut-{stat.st_ino}-{stat.st_mtime_ns}"  # its process died, or is just writing it
    return _Holder(path, cut, stat.st_mtime_ns, {})


def _myself() -> dict[str, Any]:
    """This process, so that a later one can say whether it is still there.

    A host's name may be that of many containers; its boot and the namespace of process ids tell
    where a pid means something. A pid may be used again; not at the same time of start.
    """
    environ = os.environ
    return {
        "host": socket.gethostname(),
        "boot": _read_line("/proc/sys/kernel/random/boot_id"),
        "pids": _pid_namespace(),
        "pid": os.getpid(),
        "start": _state_and_start(os.getpid())[1],
        "token": secrets.token_hex(8),
        "slurm_cluster": environ.get("SLURM_CLUSTER_NAME"),
        "slurm_job": environ.get("SLURM_JOB_ID"),
        "slurm_restarts": int(environ.get("SLURM_RESTART_COUNT", "0")),
    }


def _lives(holder: dict[str, Any]) -> bool | None:
    """Whether a holder's process lives, by what Slurm and this machine say; None: they do not."""
    me = _myself()
    job = ("slurm_cluster", "slurm_job")
    same_job = me["slurm_job"] and all(holder.get(name) == me[name] for name in job)
    if same_job and holder.get("slurm_restarts", 0) < me["slurm_restarts"]:
        return False
    if not all(me[k] and holder.get(k) == me[k] for k in ("host", "boot", "pids")):
        return None
    pid, started = holder.get("pid"), holder.get("start")
    if not isinstance(pid, int) or pid < 1:
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        pass
    state, start = _state_and_start(pid)
    if state is None:  # hidden from this user
        return None
    return state not in "ZX" and start == started


def _state_and_start(pid: int) -> tuple[str | None, int | None]:
    """State and start time of a process, in ticks since boot; ``Z``: dead, but not waited for."""
    line = _read_line(f"/proc/{pid}/stat")
    if line is None:
        return None, None
    words = line.rpartition(")")[2].split()  # a program's name may hold anything
    return words[0], int(words[19])


def _pid_namespace() -> str | None:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def _read_line(path: str) -> str | None:
    """None where this system has no such file."""
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None
