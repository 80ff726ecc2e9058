"""Every fault, in every stage, on rank 0 and on another: nothing half published, nothing lost."""

from __future__ import annotations

from multiprocessing.context import ForkServerContext
from pathlib import Path

from tests.faults.job import RANKS, Run, make_folder, run_all
from tests.faults.rank import FAULTS, STAGES, Case

AT_ONCE = 6
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


def test_fault_matrix(server: ForkServerContext, tmp_path: Path) -> None:
    (clean,) = run_all(server, [make_folder(tmp_path, "clean")], [None])
    assert clean.status == [0, 0] and clean.files, clean
    cases = [case for case in CASES if case not in NOT_THERE]
    outcomes: dict[Case, tuple[Run, Run]] = {}
    for k in range(0, len(cases), AT_ONCE):
        some = cases[k : k + AT_ONCE]
        folders = [make_folder(tmp_path, f"{c.fault}-{c.stage}-{c.rank}") for c in some]
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
            assert_told_once(case, first)
        _check_events(case, first)
        assert second.events[-1]["event"] == "finished", case
        assert second.status == [0, 0] and second.files == clean.files, (case, first, second)
        assert second.left == clean.left, (case, second)


def assert_told_once(case: Case, first: Run) -> None:
    """Rank 0 says which rank failed; where it was killed or hangs, the other one does."""
    said = [f"rank {case.rank}" in "\n".join(first.errors(rank)) for rank in range(RANKS)]
    if case.rank == 0 and case.fault.startswith("stalled"):
        assert any(said), (case, first)
    else:
        other = case.rank == 0 and case.fault == "SIGKILL"
        assert said == [not other, other], (case, first)
    if case.fault.startswith("stalled") and case.stage != "plan":
        assert "the storage hangs" in "".join(first.said), (case, first)


def _check_events(case: Case, first: Run) -> None:
    """The log names the rank that failed, unless rank 0 could not write any more, or had published
    all before it noticed.
    """
    last = first.events[-1]
    if first.status[0] == 0:
        assert (last["event"], case.stage) == ("finished", "publish") and first.files, case
        return
    if case.rank == 0 and case.fault == "SIGKILL":
        assert last["event"] not in ("failed", "finished"), (case, last)
        return
    assert (last["event"], last["rank"]) == ("failed", case.rank), (case, last)
    assert last["exit_code"] == first.status[0], (case, last)
    if case.fault == "EIO" and case.stage == "read":
        retried = [one for one in first.events if one["event"] == "retried"]
        assert case.rank in [one["rank"] for one in retried], (case, first.events)


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
