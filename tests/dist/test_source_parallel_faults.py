"""A rank that is killed or fails in a merge of node-local sources ends it on all, and no later."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests import runs
from tests.dist.test_source_parallel import assert_equal, ordinary, spread, whole_checkpoints
from tests.faults.node_local_rank import run_rank
from tests.faults.rank import Case
from tests.ports import reserved_ports

RANKS = 3
WITHIN = 60.0
CASES = [
    Case(fault, stage, rank)
    for fault in ("SIGKILL", "SIGTERM", "EIO", "rank exception")
    for stage in ("look", "read", "transfer")
    for rank in range(RANKS)
]
CASES += [Case(fault, "write", 0) for fault in ("SIGKILL", "ENOSPC")]  # it has the newest source
AT_ONCE = 4


class Merge:
    """A ``wsm merge`` of all ranks, each with the sources of its own node."""

    def __init__(self, folder: Path, case: Case | None, port: int):
        self.folder = folder
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.faults.node_local_rank"])
        self.processes = []
        for rank in range(RANKS):
            argv = ["merge", "--load", str(folder / f"node{rank}" / "run"), "--node-local"]
            argv += ["--save", str(folder / "out"), "--threads", "2"]
            arguments = (case, rank, RANKS, port, folder / f"rank{rank}.log", argv)
            self.processes.append(context.Process(target=run_rank, args=arguments))
        for process in self.processes:
            process.start()

    def end(self) -> tuple[list[int | None], list[str]]:
        """Exit statuses, None for a rank that hangs, and what the ranks said."""
        deadline = time.monotonic() + WITHIN
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        status = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
            process.join()
        return status, [(self.folder / f"rank{r}.log").read_text() for r in range(RANKS)]


def merge_all(
    folders: list[Path], cases: Sequence[Case | None]
) -> list[tuple[list[int | None], list[str]]]:
    """A merge in every folder, side by side: how its ranks end, and what they say."""
    with reserved_ports(len(folders)) as ports:
        merges = [Merge(*one) for one in zip(folders, cases, ports, strict=True)]
        return [merge.end() for merge in merges]


def test_no_fault_hangs_a_rank_and_the_second_run_merges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    expected = ordinary(runs.DENSE, tmp_path / "alone", weights=None).output
    for k in range(0, len(CASES), AT_ONCE):
        some = CASES[k : k + AT_ONCE]
        folders = [tmp_path / f"{c.fault}-{c.stage}-{c.rank}".replace(" ", "-") for c in some]
        for folder in folders:
            spread(runs.DENSE, folder, RANKS, whole_checkpoints(0, 1, 2, 0))
        first = merge_all(folders, some)
        second = merge_all(folders, [None] * len(some))
        for case, folder, (status, said), again in zip(some, folders, first, second, strict=True):
            assert None not in status, f"a rank hangs: {case} {said}"
            assert all(status), f"a rank takes the merge for done: {case} {status} {said}"
            killed = (case.fault, case.rank) == ("SIGKILL", 0)
            for rank, text in enumerate(said):
                tells = rank > 0 if killed else rank == 0
                errors = [line for line in text.splitlines() if not line.startswith("WARNING")]
                assert any(f"rank {case.rank} " in line for line in errors) == tells, (case, said)
            assert again[0] == [0] * RANKS, (case, said, again)
            assert_equal(folder / "out" / "iter_0000008", expected)
            left = sorted(path.name for path in (folder / "out").iterdir())
            assert left == ["iter_0000008", "latest_checkpointed_iteration.txt"], (case, left)
