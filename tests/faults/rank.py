"""One rank of a merge in which something goes wrong at a chosen stage.

Runs in processes forked from a server that has imported this module, so that a rank costs no start
of Python.
"""

from __future__ import annotations

import errno
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wsm_megatron import publication
from wsm_megatron.checkpoint import staging_dir
from wsm_megatron.checkpoint.staging_dir import StagingDirectory
from wsm_megatron.checkpoint.writer import CheckpointFile
from wsm_megatron.cli import main, merge  # noqa: F401 - the command, before ranks are forked
from wsm_megatron.comm import heartbeat
from wsm_megatron.execution.tiles import Tile
from wsm_megatron.process.timeouts import timeouts
from wsm_megatron.storage import visibility

FAULTS = ("SIGKILL", "SIGTERM", "ENOSPC", "EIO", "stalled read", "stalled write", "rank exception")
STAGES = ("plan", "read", "reduce", "write", "publish")
LOST_AFTER, STALLED_AFTER, SEEN_WITHIN = 4.0, 3.0, 4.0
"""Seconds: nobody on a busy machine is that slow, and a test may wait for them."""

_run: Path


@dataclass(frozen=True)
class Case:
    fault: str
    stage: str
    rank: int


def run_rank(
    case: Case | None, rank: int, size: int, port: int, log: Path, argv: list[str]
) -> None:
    """Be one rank of ``wsm ARGV``; never returns."""
    with log.open("wb") as stream:
        for descriptor in (1, 2):
            os.dup2(stream.fileno(), descriptor)
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    timeouts.beat, timeouts.lost_after = 0.2, LOST_AFTER
    timeouts.stalled_after, timeouts.first_pause = STALLED_AFTER, 0.01
    timeouts.exit_grace, timeouts.worker_grace = 2.0, 0.2
    global _run
    _run = Path(argv[argv.index("--load") + 1])
    timeouts.visible_within, timeouts.look_every = SEEN_WITHIN, 0.1
    if case is not None and case.rank == rank:
        _UNSEEN.get((case.fault, case.stage), lambda: _inject(case))()
    sys.exit(main.main(argv))


_PLACES: dict[str, tuple[Any, str]] = {
    "plan": (Path, "read_bytes"),
    "read": (os, "preadv"),
    "reduce": (Tile, "start"),
    "write": (os, "pwrite"),
    "publish": (publication, "complete"),
    "track": (
        staging_dir,
        "write_tracker",
    ),  # the checkpoint has its name, the tracker has not moved
    "sync": (CheckpointFile, "close"),
    "rename": (StagingDirectory, "commit"),
}
"""What is called in a stage. Only rank 0 plans and publishes; another one waits for it."""


def _inject(case: Case) -> None:
    """Let the third call in the stage go wrong, and, of an error of storage, all that follow."""
    owner, name = _PLACES[case.stage]
    third = 3 if case.stage in ("plan", "read", "reduce", "write") else 1
    if case.rank != 0 and case.stage in _WAITS:
        phase, ever = _WAITS[case.stage], case.fault in ("EIO", "ENOSPC")
        _when(
            heartbeat.Heartbeat,
            "take",
            1,
            _FAULTS[case.fault],
            ever,
            lambda own, _: own.phase == phase,
        )
        return
    call = _STALLS.get((case.fault, case.stage))
    if call is not None:
        _when(owner, name, third, lambda: _when(os, call, 1, _FAULTS[case.fault]))
        return
    _when(owner, name, third, _FAULTS[case.fault], ever=case.fault in ("EIO", "ENOSPC"))


_WAITS = {"plan": "planning", "publish": "publishing"}
"""The phase in which a rank waits for rank 0 in a stage."""

_STALLS = {
    ("stalled read", "reduce"): "preadv",
    ("stalled read", "write"): "preadv",
    ("stalled write", "read"): "pwrite",
    ("stalled write", "reduce"): "pwrite",
    ("stalled write", "sync"): "fsync",
    ("stalled write", "publish"): "fsync",
    ("stalled write", "rename"): "rename",
}
"""The call that hangs, where it is not the one that the stage is told by but the next after it."""


def _when(
    owner: Any,
    name: str,
    call: int,
    then: Callable[[], None],
    ever: bool = False,
    counts: Callable[..., bool] = lambda *_: True,
) -> None:
    original = getattr(owner, name)
    lock, count = threading.Lock(), 0

    def faulty(*arguments: Any, **options: Any) -> Any:
        nonlocal count
        if not counts(*arguments):
            return original(*arguments, **options)
        with lock:
            count += 1
            now = count >= call if ever else count == call
        if now:
            then()
        return original(*arguments, **options)

    setattr(owner, name, faulty)


def _kill(number: int) -> Callable[[], None]:
    def kill() -> None:
        os.kill(os.getpid(), number)
        time.sleep(0.5)  # a handler runs in the main thread

    return kill


def _fail(code: int) -> Callable[[], None]:
    def fail() -> None:
        raise OSError(code, os.strerror(code))

    return fail


def _change(change: Callable[[Path], None]) -> Callable[[], None]:
    """Change a file of a source that nobody reads any more, then be busy."""

    def then() -> None:
        change(_run / "iter_0000004" / "common.pt")
        time.sleep(60)

    return then


def _break() -> None:
    raise RuntimeError("injected")


_FAULTS: dict[str, Callable[[], None]] = {
    "SIGKILL": _kill(signal.SIGKILL),
    "SIGTERM": _kill(signal.SIGTERM),
    "ENOSPC": _fail(errno.ENOSPC),
    "EIO": _fail(errno.EIO),
    "stalled read": lambda: time.sleep(60),
    "stalled write": lambda: time.sleep(60),
    "rank exception": _break,
    "source deleted": _change(Path.unlink),
    "source rewritten": _change(os.utime),
}


def _hide_directory(looks: float) -> Callable[[], None]:
    """Let the first looks for the staging directory find nothing, as with NFS."""

    def hide() -> None:
        sees, count = visibility._sees, 0

        def late(path: Path) -> bool:
            nonlocal count
            count += 1
            return count > looks and sees(path)

        visibility._sees = late

    return hide


def _shorten_file() -> None:
    """Let the first look at another rank's file find only a part of it."""
    size, seen = visibility._size, set()

    def late(path: Path) -> int | None:
        if path in seen:
            return size(path)
        seen.add(path)
        return 100

    visibility._size = late


def _truncate_file() -> None:
    close = CheckpointFile.close

    def cut(file: CheckpointFile) -> tuple[int, int]:
        closed = close(file)
        os.truncate(file.path, 100)
        return closed

    CheckpointFile.close = cut  # type: ignore[method-assign]


_UNSEEN: dict[tuple[str, str], Callable[[], None]] = {
    ("seen late", "directory"): _hide_directory(3),
    ("never seen", "directory"): _hide_directory(math.inf),
    ("seen late", "file"): _shorten_file,
    ("cut short", "file"): _truncate_file,
}
"""What goes wrong between two ranks."""
