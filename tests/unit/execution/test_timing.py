"""Where each rank's time went, and how it is told."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from tests import runs
from tests.reference import RUNS
from wsm_megatron import ExecutionOptions, MergeConfig, merge
from wsm_megatron.cli.merge import merged as printed
from wsm_megatron.execution import timing
from wsm_megatron.execution.result import MergedCheckpoint, MergeReport
from wsm_megatron.execution.timing import PHASES, Phases, RankReport
from wsm_megatron.schedule.coefficients import MergeCoefficients
from wsm_megatron.schedule.window import Checkpoint


class Clock:
    """``time`` for a module: moves only when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    return clock


def spend(taken: Phases, clock: Clock, phase: str, seconds: float) -> None:
    with taken(phase):
        clock.now += seconds


def in_a_thread(call: Any, *arguments: Any) -> None:
    thread = threading.Thread(target=call, args=arguments)
    thread.start()
    thread.join()


def test_workers_count_by_their_mean(clock: Clock) -> None:
    taken = Phases()
    spend(taken, clock, "planning", 2.0)
    crew = taken.for_workers(4)
    for seconds in (1.0, 4.0):
        in_a_thread(spend, crew, clock, "reading", seconds)
    spend(taken, clock, "planning", 0.5)
    assert crew.seconds() == {"reading": 1.25}
    assert taken.seconds() == {"planning": 2.5, "reading": 1.25}


def test_of_every_crew_its_own_mean(clock: Clock) -> None:
    taken = Phases()
    for threads in (1, 2):
        in_a_thread(spend, taken.for_workers(threads), clock, "reading", 3.0)
    assert taken.seconds() == {"reading": 4.5}


def test_a_phase_that_fails_counts(clock: Clock) -> None:
    taken = Phases()
    with pytest.raises(RuntimeError), taken("reading"):
        clock.now += 3.0
        raise RuntimeError
    assert taken.seconds() == {"reading": 3.0}


def test_seconds_are_added_in_the_order_of_the_phases() -> None:
    one = RankReport(3, "node", "cpu", 1, 10, 20, 2.0, {"reading": 1.0}).with_seconds(
        "planning", 4.0
    )
    assert list(one.phases.items()) == [("planning", 4.0), ("reading", 1.0)]
    assert one.with_seconds("reading", 1.0).phases["reading"] == 2.0
    assert one.bytes_per_second == 15.0


def test_a_merge_reports_its_rank(tmp_path: Path) -> None:
    config = MergeConfig(load=RUNS / runs.DENSE, save=tmp_path / "out")
    done = merge(config, ExecutionOptions(threads=2))
    (one,) = done.ranks
    assert (one.rank, one.threads) == (0, 2)
    assert (one.bytes_read, one.bytes_written) == (done.bytes_read, done.bytes_written)
    needed = {"planning", "reading", "reducing", "writing", "syncing", "publishing"}
    assert needed <= set(one.phases) <= set(PHASES)
    assert merge(config).ranks == (), "published before"


def table(number: int) -> list[str]:
    ranks = tuple(
        RankReport(k, f"node{k // 8}", "cpu", 4, 10**9, 10**8, 10.0 + k, {"reading": 5.0 + k})
        for k in range(number)
    )
    resume = {"main_params": "dropped", "moments": "dropped", "launch": {}}
    mean = MergeCoefficients.over([Checkpoint(1), Checkpoint(2)], "mean")
    merged = MergedCheckpoint(Path("out/iter_8"), (1, 2), mean, resume)
    lines = list(printed(MergeReport((merged,), 1, 1, 1.0, ranks)))
    start = next(k for k, line in enumerate(lines) if line.split()[:1] == ["rank"])
    end = next(k for k, line in enumerate(lines) if line.startswith("merged checkpoint"))
    return lines[start - 1 : end]


def test_a_row_for_every_rank() -> None:
    _, head, *rows, mean = table(3)
    assert head.split() == ["rank", "host", "read", "written", "speed", "reading", "s"]
    assert [row.split()[:2] for row in rows] == [[f"{k}", "node0"] for k in range(3)]
    assert rows[0].split()[2:] == ["1", "GB", "100", "MB", "110", "MB/s", "5.00"]
    assert mean.split()[0] == "mean" and mean.split()[-1] == "6.00"


def test_of_many_ranks_the_slowest() -> None:
    said, _, *rows, mean = table(100)
    assert said == "the slowest 16 of 100 ranks, and the mean of all:"
    assert [row.split()[0] for row in rows] == [f"{k}" for k in range(99, 83, -1)]
    assert mean.split()[-1] == "54.50"
