"""``wsm merge`` slow enough to be killed while it writes, and rounds in which that happens.

Runs in processes forked from a server that has imported this module.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

from tests.reference import RUNS
from tests.runs import FP32_PARAM
from wsm_megatron import cli
from wsm_megatron.checkpoint import journal

DECAYS = ("mean", "ema")
PAUSE = 0.004
"""Seconds of every write."""
WITHIN = 120.0
"""Seconds after which a merge counts as hanging."""


@dataclass(frozen=True)
class Round:
    """What happened.

    Attributes:
        killed_at: seconds after its start. status: of the merge that was not killed. said: by it.
        written: bytes that it wrote. files: everything below ``--save``, by name.
    """

    seed: int
    killed_at: float
    first_was_killed: bool
    status: int | None
    said: str
    written: int
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
    sys.exit(cli.main(argv))


def merge_alone(server: ForkServerContext, folder: Path) -> tuple[Round, float]:
    """A merge that nothing disturbs, and the seconds that it takes."""
    began = time.monotonic()
    process = _start(server, folder, "alone", 2)
    process.join(WITHIN)
    took = time.monotonic() - began
    return _end(folder, "alone", process, Round(0, 0.0, False, None, "", 0, {})), took


def kill_one_of_two(server: ForkServerContext, folder: Path, seed: int, when: float) -> Round:
    """Two fresh processes with one command, of which one is killed after ``when`` seconds.

    The one to be killed is mostly the first, which has the lock.
    """
    chance = random.Random(seed)
    first_is_killed = chance.random() < 0.75
    names = ("killed", "survivor") if first_is_killed else ("survivor", "killed")
    processes: dict[str, ForkServerProcess] = {}
    began = time.monotonic()
    for name in names:
        processes[name] = _start(server, folder, name, chance.randint(1, 3))
        time.sleep(chance.uniform(0.0, 0.1))
    time.sleep(max(0.0, began + when - time.monotonic()))
    pid = processes["killed"].pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    processes["survivor"].join(WITHIN)
    processes["killed"].join(WITHIN)
    done = Round(seed, when, first_is_killed, None, "", 0, {})
    return _end(folder, "survivor", processes["survivor"], done)


def _start(server: ForkServerContext, folder: Path, name: str, threads: int) -> ForkServerProcess:
    argv = ["merge", "--load", str(RUNS / FP32_PARAM), "--save", str(folder / "out")]
    argv += ["--decay", ",".join(DECAYS), "--optimizer-state", "merge"]
    argv += ["--threads", str(threads), "--log-json", str(folder / f"{name}.jsonl")]
    process = server.Process(target=run_slowly, args=(folder / f"{name}.log", argv))
    process.start()
    return process


def _end(folder: Path, name: str, process: ForkServerProcess, done: Round) -> Round:
    """What is left of a round, and is then removed: every one has the same ``--save``."""
    status = process.exitcode
    process.kill()
    process.join()
    events = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
    found = [path for path in (folder / "out").rglob("*") if path.is_file()]
    files = {str(path.relative_to(folder)): path.read_bytes() for path in found}
    said = (folder / f"{name}.log").read_text()
    written = events[-1].get("bytes_written", 0)
    shutil.rmtree(folder)
    folder.mkdir()
    return Round(done.seed, done.killed_at, done.first_was_killed, status, said, written, files)
