"""Why a rank failed reaches the user: from rank 0, for every rank that did, once."""

from __future__ import annotations

from multiprocessing.context import ForkServerContext
from pathlib import Path

from tests.faults.job import Run, make_folder, run_all
from tests.faults.rank import Case

SIZE = 3


def run_once(server: ForkServerContext, folder: Path, case: Case | None) -> Run:
    (run,) = run_all(server, [folder], [case], SIZE)
    return run


def test_an_internal_error_of_another_rank(server: ForkServerContext, tmp_path: Path) -> None:
    folder = make_folder(tmp_path, "case")
    run = run_once(server, folder, Case("rank exception", "reduce", 2))
    assert run.status == [1, 1, 1] and run.files is None
    assert run.errors(1) == run.errors(2) == []
    first, second, *frames, last = run.errors(0)
    assert first == "ERROR: rank 2 failed in merging:"
    assert second == "Traceback (most recent call last):"
    assert any("in _break" in frame for frame in frames)
    assert last == "RuntimeError: injected" and run.said[0].count(last) == 1
    failed = run.events[-1]
    assert (failed["event"], failed["rank"], failed["exit_code"]) == ("failed", 2, 1)
    (failure,) = failed["failures"]
    assert (failure["rank"], failure["exception"]) == (2, "RuntimeError")
    assert failure["message"] == "injected" and failure["traceback"].endswith(last + "\n")
    assert any(name.startswith(".iter_0000008") for name in run.left), "the work is kept"
    assert run_once(server, folder, None).status == [0, 0, 0]


def test_a_failed_merge_of_another_rank(server: ForkServerContext, tmp_path: Path) -> None:
    run = run_once(server, make_folder(tmp_path, "case"), Case("ENOSPC", "write", 1))
    assert run.status == [1, 1, 1] and run.files is None
    assert run.errors(1) == run.errors(2) == []
    (line,) = run.errors(0)
    assert line.startswith("ERROR: rank 1 failed in merging: ") and "No space left" in line
    (failure,) = run.events[-1]["failures"]
    assert "traceback" not in failure


def test_where_rank_0_was_killed_the_others_say_so(
    server: ForkServerContext, tmp_path: Path
) -> None:
    """It took along the store at which they would have settled who does."""
    run = run_once(server, make_folder(tmp_path, "case"), Case("SIGKILL", "reduce", 0))
    assert run.status == [-9, 1, 1] and run.said[0] == ""
    for rank in (1, 2):
        (line,) = run.errors(rank)
        assert line.startswith("ERROR: rank 0 (") and "is lost" in line
