"""``wsm merge`` slow enough to be killed while it writes, and rounds in which that happens.

Runs in processes forked from a server that has imported this module.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

from tests.reference import RUNS
from tests.runs import FP32_PARAM
from wsm_megatron.cli import main
from wsm_megatron.storage import journal

DECAYS = ("mean", "ema")
PAUSE = 0.004
"""Seconds of every write."""
WITHIN = 120.0
"""Seconds after which a merge counts as hanging."""


@dataclass(frozen=True)
class Done:
    """How a merge has ended, and what it has left.

    Attributes:
        written: bytes that it wrote. seconds: from where its log begins.
        files: everything below ``--save``, by name.
    """

    status: int | None
    said: str
    written: int
    seconds: float
    files: dict[str, bytes]


def run_slowly(log: Path, argv: list[str]) -> None:
    """Be ``wsm ARGV``, with a journal that is always up to date; never returns."""
    with log.open("wb") as stream:
        for descriptor in (1, 2):
            os.dup2(stream.fileno(), descriptor)
    journal.SYNC_BYTES = 1
    write = os.pwrite

    def write_slowly(*arguments: Any) -> int:
        time.sleep(PAUSE)
        return write(*arguments)

    os.pwrite = write_slowly
    sys.exit(main.main(argv))


def merge_alone(server: ForkServerContext, folder: Path) -> Done:
    """A merge that nothing disturbs."""
    process = _start(server, folder, "alone", 2)
    process.join(WITHIN)
    return _end(folder, "alone", process)


def kill_one_of_two(
    server: ForkServerContext, folder: Path, chance: random.Random, when: float
) -> tuple[bool, Done]:
    """Two fresh processes with one command, of which one is killed ``when`` seconds after their
    logs have begun; mostly the one that has the lock.

    Returns:
        whether that one had it; how the other has ended.
    """
    processes = {}
    for name in ("one", "two"):
        processes[name] = _start(server, folder, name, chance.randint(1, 3))
        time.sleep(chance.uniform(0.0, 0.1))
    until = time.monotonic() + WITHIN
    while not (folder / "one.jsonl").exists() and time.monotonic() < until:
        time.sleep(0.005)
    time.sleep(when)
    holders = {name for name, process in processes.items() if process.pid in _holders(folder)}
    holds = bool(holders) and chance.random() < 0.8
    victim = chance.choice(sorted(holders if holds else processes.keys() - holders or processes))
    processes[victim].kill()
    (survivor,) = processes.keys() - {victim}
    processes[survivor].join(WITHIN)
    processes[victim].join(WITHIN)
    return holds, _end(folder, survivor, processes[survivor])


def _holders(folder: Path) -> set[int]:
    """Who holds a lock."""
    pids = set()
    for lock in folder.glob("out/*/.iter_*.wsm.lock"):
        with suppress(OSError, ValueError):  # it may just come or go
            pids.add(json.loads(lock.read_text())["pid"])
    return pids


def _start(server: ForkServerContext, folder: Path, name: str, threads: int) -> ForkServerProcess:
    argv = ["merge", "--load", str(RUNS / FP32_PARAM), "--save", str(folder / "out")]
    argv += ["--decay", ",".join(DECAYS), "--optimizer-state", "merge"]
    argv += ["--threads", str(threads), "--log-json", str(folder / f"{name}.jsonl")]
    process = server.Process(target=run_slowly, args=(folder / f"{name}.log", argv))
    process.start()
    return process


def _end(folder: Path, name: str, process: ForkServerProcess) -> Done:
    """What is left, and is then removed: every merge has the same ``--save``."""
    status = process.exitcode
    process.kill()
    process.join()
    last = json.loads((folder / f"{name}.jsonl").read_text().splitlines()[-1])
    found = [path for path in (folder / "out").rglob("*") if path.is_file()]
    files = {str(path.relative_to(folder)): path.read_bytes() for path in found}
    said = (folder / f"{name}.log").read_text()
    shutil.rmtree(folder)
    folder.mkdir()
    return Done(status, said, last.get("bytes_written", 0), last["seconds"], files)
