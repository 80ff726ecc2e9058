"""Storage that several nodes share: seen late, not seen at all, changed by others."""

from __future__ import annotations

from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest

from tests import runs
from tests.faults.job import Run, make_folder, run_all
from tests.faults.rank import Case


def run_both(server: ForkServerContext, parent: Path, cases: list[Case | None]) -> list[Run]:
    return run_all(server, [make_folder(parent, f"case {k}") for k in range(len(cases))], cases)


@pytest.mark.parametrize("stage, rank", [("directory", 1), ("file", 0)])
def test_what_is_seen_late_is_waited_for(
    server: ForkServerContext, tmp_path: Path, stage: str, rank: int
) -> None:
    clean, late = run_both(server, tmp_path, [None, Case("seen late", stage, rank)])
    assert late.status == clean.status == [0, 0], late
    assert late.files == clean.files and clean.files


def test_a_directory_that_a_rank_never_sees(server: ForkServerContext, tmp_path: Path) -> None:
    (run,) = run_both(server, tmp_path, [Case("never seen", "directory", 1)])
    assert run.status == [1, 1] and run.files is None
    (line,) = run.errors(0)
    assert "do all nodes see the same --save?" in line and run.errors(1) == []


def test_a_rank_whose_file_is_not_whole_for_rank_0(
    server: ForkServerContext, tmp_path: Path
) -> None:
    (run,) = run_both(server, tmp_path, [Case("cut short", "file", 1)])
    assert run.status == [1, 1] and run.files is None
    (line,) = run.errors(0)
    assert "__1_0.distcp: 100 bytes where its rank has written" in line and run.errors(1) == []


@pytest.mark.parametrize("fault", ["source deleted", "source rewritten"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_source_that_goes_while_others_still_read(
    server: ForkServerContext, tmp_path: Path, fault: str, rank: int
) -> None:
    """All ranks end at once, although the one that reads would be busy for another minute."""
    folder = make_folder(tmp_path, "case")
    runs.copy_run(runs.DENSE, folder / "run")
    (run,) = run_all(server, [folder], [Case(fault, "reduce", rank)])
    assert run.status == [1, 1] and run.files is None
    (line,) = run.errors(0)
    assert "iter_0000004 changed while it was read" in line and run.errors(1) == []
    assert run.left == [], "another merge would not go on from it"
