"""Which checkpoints a merge takes, and what it says of those that do not belong together."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from wsm_megatron.access.node_local.inventory import JobInventory, SeenFile
from wsm_megatron.checkpoint.common_state import CommonSummary
from wsm_megatron.checkpoint.lr_schedule import CONSTANT, DECAY, LearningRate
from wsm_megatron.checkpoint.run_directory import RunDirectory
from wsm_megatron.planning.selection import Selector
from wsm_megatron.schedule.window import Checkpoint, Window, positions

RUN = Path("/run")


class Run:
    """A run of summaries; notes which ones are asked for."""

    def __init__(self, *said: CommonSummary, tracker: str | None = None) -> None:
        self.said = {one.iteration: one for one in said}
        self.asked: list[int] = []
        names = tuple(sorted(i for i in self.said if i is not None))
        self.directory = RunDirectory(RUN, names, tracker=tracker)

    def read(self, iteration: int) -> CommonSummary:
        self.asked.append(iteration)
        return self.said[iteration]

    def select(self, allow_lr_decay: bool = False, **window: Any) -> tuple[Checkpoint, ...]:
        (chosen,) = Selector(self.directory, self.read, allow_lr_decay).select(Window(**window))
        return chosen


def said(iteration: int, length: int = 64, began: int | None = None, **more: Any) -> CommonSummary:
    """100 samples an iteration."""
    samples = more.pop("samples", 100 * iteration)
    return CommonSummary(iteration, samples, length, began, **more)


def iterations(chosen: tuple[Checkpoint, ...]) -> list[int]:
    return [c.iteration for c in chosen]


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Any:
    caplog.set_level(logging.WARNING)
    return lambda: [record.getMessage() for record in caplog.records]


def test_tokens_count_at_the_lengths_of_the_checkpoints_between(warnings: Any) -> None:
    """The length changed at 30, which is not selected: by name, by thinning, by tokens."""
    run = Run(*(said(i, 64 if i <= 30 else 512) for i in (10, 20, 30, 40, 50)))
    true = {10: 64_000, 20: 128_000, 30: 192_000, 40: 704_000, 50: 1_216_000}
    for window in ({"iterations": (10, 50)}, {"every": 20}, {"window_tokens": 10**9}, {}):
        chosen = run.select(**window)
        assert [c.tokens for c in chosen] == [true[c.iteration] for c in chosen]
    assert positions(run.select(iterations=(10, 50)))[0] == (64_000, 1_216_000)
    assert warnings() == []


def test_a_length_that_comes_and_goes_between_two_chosen_ones_counts() -> None:
    lengths = {10: 64, 20: 512, 30: 512, 40: 64}
    chosen = Run(*(said(i, s) for i, s in lengths.items())).select(iterations=(10, 40))
    assert [c.tokens for c in chosen] == [64_000, 64_000 + 2 * 512_000 + 64_000]


def test_a_window_in_tokens_counts_each_interval_at_its_length() -> None:
    """Back from 40: 512,000 to 30, as much to 20, then 64,000 to 10."""
    run = Run(*(said(i, 64 if i <= 20 else 512) for i in (10, 20, 30, 40)))
    assert iterations(run.select(window_tokens=1_024_000)) == [20, 30, 40]
    assert iterations(run.select(window_tokens=1_023_999)) == [30, 40]
    assert iterations(run.select(window_tokens=1_088_000)) == [10, 20, 30, 40]
    assert iterations(run.select(window_tokens=512_000, to=30)) == [20, 30]


def test_only_what_matters_is_read() -> None:
    run = Run(*(said(i, began=0) for i in range(10, 20_010, 10)))
    run.select(last=3)
    assert sorted(run.asked) == [19_980, 19_990, 20_000]
    run.asked.clear()
    run.select(iterations=(10, 20_000))
    assert sorted(run.asked) == [10, 20_000], "one job saved both: at one length"
    run.asked.clear()
    run.select(window_tokens=64 * 100 * 35)
    assert len(set(run.asked)) <= 8


def test_restarts_lead_to_where_the_length_changed() -> None:
    """Three jobs: from 0, from 30 at another length, from 70."""
    began = {i: 0 if i <= 30 else 30 if i <= 70 else 70 for i in range(10, 110, 10)}
    run = Run(*(said(i, 64 if i <= 30 else 512, b) for i, b in began.items()))
    chosen = run.select(iterations=(10, 100))
    assert chosen[1].tokens == 30 * 6400 + 70 * 51_200
    assert sorted(run.asked) == [10, 30, 70, 100]


def test_a_change_of_length_that_lies_between_checkpoints_is_not_guessed(warnings: Any) -> None:
    run = Run(said(10, 64, 0), said(40, 512, 20))
    assert positions(run.select()) == ((10, 40), "iterations")
    (message,) = warnings()
    assert "from 64 to 512 between iterations 10 and 40" in message and str(RUN) in message


def test_samples_that_go_backwards_are_named_even_between_chosen_ones(warnings: Any) -> None:
    samples = {10: 1000, 20: 2000, 30: 500, 40: 1500}
    run = Run(*(said(i, samples=n) for i, n in samples.items()))
    assert positions(run.select(iterations=(10, 40)))[1] == "iterations"
    (message,) = warnings()
    assert "from iteration 20 (2,000) to 30 (500)" in message


def test_a_default_window_ends_at_the_tracker(warnings: Any) -> None:
    run = Run(*map(said, (10, 20, 30, 40, 50)), tracker="30")
    for window in ({}, {"last": 3}, {"window_iterations": 20}, {"from_": 10}):
        assert iterations(run.select(**window)) == [10, 20, 30]
    assert all("iter_0000040, iter_0000050 is newer and left out" in m for m in warnings())
    assert "--to 50 takes it" in warnings()[0]


@pytest.mark.parametrize("window", [{"to": 40}, {"iterations": (10, 20, 30, 40)}])
def test_what_is_newer_than_the_tracker_is_taken_when_it_is_named(
    window: dict[str, Any], warnings: Any
) -> None:
    run = Run(*map(said, (10, 20, 30, 40, 50)), tracker="30")
    assert iterations(run.select(**window)) == [10, 20, 30, 40]
    (message,) = warnings()
    assert "iter_0000040 was finished all the same" in message and "iter_0000050" not in message


@pytest.mark.parametrize("window", [{"to": 30}, {"iterations": (10, 20, 30)}])
def test_what_is_named_up_to_the_tracker_needs_no_warning(
    window: dict[str, Any], warnings: Any
) -> None:
    run = Run(*map(said, (10, 20, 30, 40)), tracker="30")
    assert iterations(run.select(**window)) == [10, 20, 30] and warnings() == []


@pytest.mark.parametrize("tracker", ["release", "garbage", "", "-3", "3O"])
def test_a_tracker_that_names_no_iteration_is_told(tracker: str, warnings: Any) -> None:
    assert iterations(Run(said(10), said(20), tracker=tracker).select()) == [10, 20]
    (message,) = warnings()
    assert "latest_checkpointed_iteration.txt" in message and (tracker or "empty") in message


def test_a_tracker_before_all_checkpoints_is_refused() -> None:
    with pytest.raises(ValueError, match="says 5, and all finished checkpoints are newer"):
        Run(said(10), said(20), tracker="5").select()


def test_a_folder_of_another_iterations_state_is_refused() -> None:
    run = Run(*map(said, (10, 20, 30)))
    run.said[20] = said(200)
    with pytest.raises(ValueError, match=r"iter_0000020 holds the state of iteration 200.*rename"):
        run.select()
    run.said[20] = said(10)
    with pytest.raises(ValueError, match=r"iter_0000020 holds .* 10: a copy of iter_0000010\?"):
        run.select()
    assert iterations(run.select(iterations=(10, 30))) == [10, 30]


def test_a_state_without_iteration_is_taken() -> None:
    run = Run(said(10), said(20))
    run.said[20] = CommonSummary(None, 2000, 64)
    assert positions(run.select())[1] == "tokens"


def test_a_branch_that_was_given_up_is_named(warnings: Any) -> None:
    """The job that saved 50 had gone back to 20; 40 is of the one before."""
    jobs = {10: 0, 20: 0, 40: 0, 50: 20}
    Run(*(said(i, began=b) for i, b in jobs.items())).select()
    (message,) = warnings()
    assert "iter_0000040 and iter_0000050 are of two branches" in message
    assert "from iteration 20" in message and "--iterations" in message


def test_one_job_has_one_length(warnings: Any) -> None:
    """What says otherwise is of two jobs that started from the same checkpoint."""
    run = Run(said(10, 64, 0), said(20, 64, 0), said(30, 512, 0), said(40, 512, 0))
    assert [c.tokens for c in run.select(iterations=(10, 40))] == [64_000, 1_152_000]
    (message,) = warnings()
    assert "iter_0000010 and iter_0000040 are of two branches" in message


def test_restarts_are_no_branches(warnings: Any) -> None:
    jobs = {10: 0, 20: 0, 30: 20, 40: 20, 50: 40}
    run = Run(*(said(i, began=b, finished=1e9 + i) for i, b in jobs.items()))
    assert len(run.select()) == 5 and warnings() == []


def test_checkpoints_finished_in_the_other_order_are_named(warnings: Any) -> None:
    Run(said(10, finished=100.0), said(20, finished=900.0), said(30, finished=300.0)).select()
    (message,) = warnings()
    assert "iter_0000020 and iter_0000030 were finished in the other order" in message


def test_a_decaying_learning_rate_is_refused_unless_it_is_allowed(warnings: Any) -> None:
    rates = {10: 1.0, 20: 0.5, 30: 0.1}
    run = Run(
        *(
            said(i, learning_rate=LearningRate(v, 1.0, CONSTANT if v == 1.0 else DECAY))
            for i, v in rates.items()
        )
    )
    with pytest.raises(
        ValueError, match=r"/run: the window reaches into a decay.*--allow-lr-decay"
    ):
        run.select()
    chosen = run.select(allow_lr_decay=True)
    assert [c.lr for c in chosen] == [1.0, 0.5, 0.1]
    (message,) = warnings()
    assert "0.1 at iteration 30 (10.0% of its peak)" in message


def test_ranks_that_see_other_trackers_go_by_the_newest() -> None:
    """Megatron's rank 0 writes the tracker of its node; another node may have an older copy."""
    files = {name: SeenFile(1, 1, 1, 1) for name in (".metadata", "metadata.json")}
    sights: list[Any] = [{2: files, 4: files}, {6: files, 8: {}}]
    directory = JobInventory(RUN, sights, ["4", None]).run()
    assert (directory.finished, directory.unfinished) == ((2, 4, 6), (8,))
    assert directory.tracked == 4
    assert JobInventory(RUN, sights, ["4", "6"]).run().tracked == 6
    assert JobInventory(RUN, sights, [None, "release"]).run().tracker == "release"
    assert JobInventory(RUN, sights, [None, None]).run().tracker is None


def test_a_warning_comes_once_however_many_windows_it_concerns(warnings: Any) -> None:
    run = Run(*map(said, (10, 20, 30, 40)), tracker="30")
    selector = Selector(run.directory, run.read)
    for last in (2, 3):
        selector.select(Window(last=last))
    assert len(warnings()) == 1
