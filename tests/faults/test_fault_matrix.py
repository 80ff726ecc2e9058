"""Every fault, in every stage, on rank 0 and on another: nothing half published, nothing lost."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest

from tests.faults.rank import FAULTS, STAGES, Case, run_rank
from tests.reference import RUNS
from tests.runs import DENSE

RANKS = 2
WITHIN = 60.0
"""Seconds after which a rank counts as hanging. A lost rank is noticed after 2 here."""
CASES = [Case(f, s, r) for f in FAULTS for s in STAGES for r in range(RANKS)]
CASES.append(Case("SIGKILL", "track", 0))
NOT_THERE = {
    Case("stalled read", "publish", 0): "reads nothing",
    Case("stalled read", "publish", 1): "reads nothing",
    Case("stalled read", "plan", 1): "reads nothing",
}
"""Cases that do not exist: there the rank does not read."""
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


def run_ranks(server: ForkServerContext, case: Case | None, folder: Path) -> Run:
    """``wsm merge`` on all ranks, killed when it hangs."""
    argv = ["merge", "--load", str(RUNS / DENSE), "--save", str(folder / "out"), "--threads", "2"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    logs = [folder / f"rank{rank}.{case is None}" for rank in range(RANKS)]
    ranks = [
        server.Process(target=run_rank, args=(case, rank, RANKS, port, logs[rank], argv))
        for rank in range(RANKS)
    ]
    for process in ranks:
        process.start()
    deadline = time.monotonic() + WITHIN
    for process in ranks:
        process.join(max(0.0, deadline - time.monotonic()))
    status = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
        process.join()
    left = sorted(path.name for path in (folder / "out").glob("*"))
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
    return {name: file["crc32"] for name, file in listed.items()}


def test_fault_matrix(server: ForkServerContext, tmp_path: Path) -> None:
    clean = run_ranks(server, None, _folder(tmp_path, "clean"))
    assert clean.status == [0, 0] and clean.files, clean

    def outcome(case: Case) -> tuple[Run, Run]:
        folder = _folder(tmp_path, f"{case.fault}-{case.stage}-{case.rank}")
        return run_ranks(server, case, folder), run_ranks(server, None, folder)

    cases = [case for case in CASES if case not in NOT_THERE]
    with ThreadPoolExecutor(4) as pool:
        outcomes = dict(zip(cases, pool.map(outcome, cases), strict=True))
    print(_table(outcomes))
    for case, (first, second) in outcomes.items():
        assert None not in first.status, f"a rank hangs: {case} {first}"
        assert any(first.status), f"no rank noticed: {case} {first}"
        assert first.files in (None, clean.files), case
        if first.files is None:
            assert all(first.status), f"a rank takes the merge for done: {case} {first}"
            assert "latest_checkpointed_iteration.txt" not in first.left, case
            assert f"rank {case.rank}" in first.said[1 - case.rank], (case, first)
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
