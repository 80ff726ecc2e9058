"""Progress on rank 0: few and whole lines where standard error is a file."""

from __future__ import annotations

import pytest

from wsm_megatron.cli import progress
from wsm_megatron.cli.progress import progress_bar


class Clock:
    """``time`` for a module: moves only when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def go(clock: Clock, rank: int, steps: int) -> None:
    """A thousandth of 8 GB a step, ten steps a second."""
    with progress_bar(rank, 8 * 10**9) as update:
        for _ in range(steps):
            clock.now += 0.1
            update(8 * 10**6)


def test_a_line_every_half_minute(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    go(clock, rank=0, steps=999)
    assert capsys.readouterr().err.splitlines(keepends=True) == [
        "merging: 30% of 8.00GB, 80.0MB/s, 01:10 left\n",
        "merging: 60% of 8.00GB, 80.0MB/s, 00:40 left\n",
        "merging: 90% of 8.00GB, 80.0MB/s, 00:09 left\n",
    ]


def test_short_merges_and_other_ranks_are_quiet(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    go(clock, rank=0, steps=290)
    go(clock, rank=1, steps=999)
    captured = capsys.readouterr()
    assert captured.err == captured.out == ""
