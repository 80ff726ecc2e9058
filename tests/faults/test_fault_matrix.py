"""Every fault, in every stage, on rank 0 and on another: nothing half published, nothing lost."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

import pytest

from tests.faults.rank import FAULTS, STAGES, Case, run_rank
from tests.reference import RUNS
from tests.runs import DENSE

RANKS = 2
AT_ONCE = 4
WITHIN = 60.0
"""Seconds after which a rank counts as hanging. A lost rank is noticed after 2 here."""
CASES = [Case(f, s, r) for f in FAULTS for s in STAGES for r in range(RANKS)]
CASES.append(Case("SIGKILL", "track", 0))
CASES += [Case("stalled write", "sync", r) for r in range(RANKS)]
CASES.append(Case("stalled write", "rename", 0))
NOT_THERE = {
    Case("stalled read", "publish", 0): "reads nothing",
    Case("stalled read", "publish", 1): "reads nothing",
    Case("stalled read", "plan", 1): "reads nothing",
    Case("stalled write", "plan", 0): "writes nothing",
    Case("stalled write", "plan", 1): "writes nothing",
    Case("stalled write", "publish", 1): "writes nothing",
}
"""Cases that do not exist: there the rank does not read, or does not write."""
REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Run:
    """Exit statuses of the ranks, what they said, and what is under ``--save``."""

    status: list[int | None]
    said: list[str]
    left: list[str]
    files: dict[str, str] | None


@pytest.fixture(scope="module")
def server() -> ForkServerContext:
    """Processes forked from one that has imported torch and the package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{REPOSITORY}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("TORCH_CPP_LOG_LEVEL", "ERROR")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.faults.rank"])
        first = context.Process(target=int)
        first.start()
        first.join()
    return context


def run_all(
    server: ForkServerContext, folders: list[Path], cases: Sequence[Case | None]
) -> list[Run]:
    """A ``wsm merge`` of two ranks in every folder, side by side; killed when it hangs."""
    started = [_start(server, folder, case) for folder, case in zip(folders, cases, strict=True)]
    deadline = time.monotonic() + WITHIN
    return [_end(ranks, folder, deadline) for ranks, folder in zip(started, folders, strict=True)]


def _start(server: ForkServerContext, folder: Path, case: Case | None) -> list[ForkServerProcess]:
    argv = ["merge", "--load", str(RUNS / DENSE), "--save", str(folder / "out"), "--threads", "2"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [
        server.Process(
            target=run_rank, args=(case, rank, RANKS, port, folder / f"rank{rank}.log", argv)
        )
        for rank in range(RANKS)
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
    logs = [folder / f"rank{rank}.log" for rank in range(RANKS)]
    said = [log.read_text() if log.exists() else "" for log in logs]
    return Run(status, said, left, _files(folder / "out" / "iter_0000008"))


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


def test_fault_matrix(server: ForkServerContext, tmp_path: Path) -> None:
    (clean,) = run_all(server, [_folder(tmp_path, "clean")], [None])
    assert clean.status == [0, 0] and clean.files, clean
    cases = [case for case in CASES if case not in NOT_THERE]
    outcomes: dict[Case, tuple[Run, Run]] = {}
    for k in range(0, len(cases), AT_ONCE):
        some = cases[k : k + AT_ONCE]
        folders = [_folder(tmp_path, f"{c.fault}-{c.stage}-{c.rank}") for c in some]
        first = run_all(server, folders, some)
        second = run_all(server, folders, [None] * len(some))
        outcomes.update(zip(some, zip(first, second, strict=True), strict=True))
    print(_table(outcomes))
    for case, (first, second) in outcomes.items():
        assert None not in first.status, f"a rank hangs: {case} {first}"
        assert any(first.status), f"no rank noticed: {case} {first}"
        assert first.files in (None, clean.files), case
        if first.files is None:
            assert all(first.status), f"a rank takes the merge for done: {case} {first}"
            assert "latest_checkpointed_iteration.txt" not in first.left, case
            assert f"rank {case.rank}" in first.said[1 - case.rank], (case, first)
        if case.fault.startswith("stalled") and case.stage != "plan":
            assert "the storage hangs" in first.said[1 - case.rank], (case, first)
        assert second.status == [0, 0] and second.files == clean.files, (case, first, second)
        assert second.left == clean.left, (case, second)


def _folder(parent: Path, name: str) -> Path:
    folder = parent / name.replace(" ", "-")
    folder.mkdir()
    return folder


def _table(outcomes: dict[Case, tuple[Run, Run]]) -> str:
    lines = ["", f"{'fault':15}{'stage':9}{'rank':5}{'ended with':14}{'left':22}second run"]
    for case in CASES:
        start = f"{case.fault:15}{case.stage:9}{case.rank:<5}"
        if case in NOT_THERE:
            lines.append(f"{start}– ({NOT_THERE[case]})")
            continue
        first, second = outcomes[case]
        hidden = sum(name.startswith(".") for name in first.left)
        left = "published, whole" if first.files else f"{hidden} hidden" if hidden else "nothing"
        ended = " ".join(str(status) for status in first.status)
        again = "same bits" if second.status == [0, 0] else f"ended with {second.status}"
        lines.append(f"{start}{ended:14}{left:22}{again}")
    return "\n".join(lines)
