"""``wsm merge`` of two ranks, with a fault or without: how it ends, and what it leaves."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

from tests.faults.rank import Case, run_rank
from tests.ports import reserved_ports
from tests.reference import RUNS
from tests.runs import DENSE

RANKS = 2
WITHIN = 60.0
"""Seconds after which a rank counts as hanging. A lost rank is noticed after 4 here."""


@dataclass(frozen=True)
class Run:
    """Exit statuses of the ranks, what they said, what is under ``--save``, and all events."""

    status: list[int | None]
    said: list[str]
    left: list[str]
    files: dict[str, str] | None
    events: list[dict[str, Any]]

    def errors(self, rank: int) -> list[str]:
        """Lines of what a rank said that are no warnings."""
        return [one for one in self.said[rank].splitlines() if not one.startswith("WARNING: ")]


def run_all(
    server: ForkServerContext,
    folders: list[Path],
    cases: Sequence[Case | None],
    size: int = RANKS,
) -> list[Run]:
    """A ``wsm merge`` of ``size`` ranks in every folder, side by side; killed when it hangs.

    Of the folder's ``run``, where it has one. Saved to its ``out``.
    """
    with reserved_ports(len(folders)) as ports:
        started = [
            _start(server, folder, case, port, size)
            for folder, case, port in zip(folders, cases, ports, strict=True)
        ]
        deadline = time.monotonic() + WITHIN
        return [
            _end(ranks, folder, deadline) for ranks, folder in zip(started, folders, strict=True)
        ]


def _start(
    server: ForkServerContext, folder: Path, case: Case | None, port: int, size: int
) -> list[ForkServerProcess]:
    run = folder / "run" if (folder / "run").exists() else RUNS / DENSE
    argv = ["merge", "--load", str(run), "--save", str(folder / "out"), "--threads", "2"]
    argv += ["--log-json", str(folder / "events.jsonl")]
    ranks = [
        server.Process(
            target=run_rank, args=(case, rank, size, port, folder / f"rank{rank}.log", argv)
        )
        for rank in range(size)
    ]
    for process in ranks:
        process.start()
    return ranks


def _end(ranks: list[ForkServerProcess], folder: Path, deadline: float) -> Run:
    for process in ranks:
        process.join(max(0.0, deadline - time.monotonic()))
    status = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
        process.join()
    left = sorted(path.name for path in (folder / "out").glob("*"))
    logs = [folder / f"rank{rank}.log" for rank in range(len(ranks))]
    said = [log.read_text() if log.exists() else "" for log in logs]
    log = folder / "events.jsonl"
    events = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return Run(status, said, left, _files(folder / "out" / "iter_0000008"), events)


def _files(checkpoint: Path) -> dict[str, str] | None:
    """CRC-32 of the files of a published checkpoint."""
    if not checkpoint.exists():
        return None
    assert (checkpoint / "metadata.json").exists(), "a half checkpoint is published"
    listed = json.loads((checkpoint / "wsm_merge.json").read_text())["files"]
    for name, file in listed.items():
        assert (checkpoint / name).stat().st_size == file["bytes"], name
    # The common state names the --save directory, and so differs between cases.
    return {name: file["crc32"] for name, file in listed.items() if name != "common.pt"}


def make_folder(parent: Path, name: str) -> Path:
    folder = parent / name.replace(" ", "-")
    folder.mkdir()
    return folder
