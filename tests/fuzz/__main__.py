"""The command: many seeds, each in a process of its own; what became of them, a line a kind."""

from __future__ import annotations

import argparse
import os
import select
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.fuzz import child, entries, files, metadata, oracle, shards
from tests.fuzz.case import BASES
from tests.fuzz.guard import SECONDS

MUTATIONS = (entries, files, metadata, shards)
"""The modules that register the kinds."""


@dataclass(frozen=True)
class Result:
    seed: int
    kinds: tuple[str, ...]
    outcome: str
    detail: str
    seconds: float

    @property
    def is_violation(self) -> bool:
        return self.outcome.isupper()


def fuzz(seeds: Iterable[int], folder: Path, only: str = "") -> Iterator[Result]:
    """Run seeds, one after another. The process forks: call it before threads are started."""
    torch.set_num_threads(1)
    oracle.prepare(BASES)
    for seed in seeds:
        yield _run(seed, folder / str(seed), only)


def _run(seed: int, folder: Path, only: str) -> Result:
    folder.mkdir(parents=True)
    started = time.monotonic()
    reading, writing = os.pipe()
    sys.stdout.flush()
    process = os.fork()
    if process == 0:
        os.close(reading)
        child.in_fork(seed, folder, only, writing)
    os.close(writing)
    text, ended = b"", False
    while not ended and time.monotonic() - started < SECONDS:
        if select.select([reading], [], [], 0.5)[0]:
            piece = os.read(reading, 1 << 16)
            text, ended = text + piece, not piece
    if not ended:
        os.kill(process, signal.SIGKILL)
    os.close(reading)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    kinds, outcome, detail = _parsed(text, status, ended)
    return Result(seed, kinds, outcome, detail, time.monotonic() - started)


def _parsed(text: bytes, status: int, ended: bool) -> tuple[tuple[str, ...], str, str]:
    if not ended:
        return (), "HANGS", f"more than {SECONDS} s"
    if status or b"\0" not in text:
        return (), "CRASHED", f"exit status {status}"
    kinds, outcome, detail = text.decode().split("\0", 2)
    return tuple(kinds.split(",")), outcome, detail


def table(results: Iterable[Result]) -> str:
    """Outcomes of each kind, and the violations."""
    by_kind: dict[str, Counter[str]] = {}
    total: Counter[str] = Counter()
    for result in results:
        total[result.outcome] += 1
        for kind in result.kinds or ("unknown",):
            by_kind.setdefault(kind, Counter())[result.outcome] += 1
    outcomes = sorted(total, key=lambda name: (name.isupper(), name))
    lines = [f"{'':34}" + "".join(f"{name:>18}" for name in outcomes)]
    for kind, found in [*sorted(by_kind.items()), ("all inputs", total)]:
        lines.append(f"{kind:34}" + "".join(f"{found[name]:18,}" for name in outcomes))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seeds", type=int, default=300, help="how many (300)")
    parser.add_argument("--first", type=int, default=0, help="the first seed (0)")
    parser.add_argument("--only", default="", help="kinds whose name contains this")
    parser.add_argument("--keep", type=Path, help="leave the inputs of violations here")
    given = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory(prefix="wsm-fuzz-") as folder:
        seeds = range(given.first, given.first + given.seeds)
        for result in fuzz(seeds, Path(folder), given.only):
            results.append(result)
            if result.is_violation:
                kinds = ", ".join(result.kinds)
                print(
                    f"seed {result.seed} ({kinds}): {result.outcome}\n    {result.detail}",
                    flush=True,
                )
                if given.keep:
                    given.keep.mkdir(parents=True, exist_ok=True)
                    shutil.rmtree(given.keep / str(result.seed), ignore_errors=True)
                    shutil.move(Path(folder, str(result.seed)), given.keep / str(result.seed))
            shutil.rmtree(Path(folder, str(result.seed)), ignore_errors=True)
    print(table(results))
    return int(any(result.is_violation for result in results))


if __name__ == "__main__":
    sys.exit(main())
