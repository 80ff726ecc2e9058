"""The state machine of snapshots, with a store that holds no bytes."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from wsm_megatron.plugin.config import WSMConfig
from wsm_megatron.plugin.snapshots import Snapshots, State
from wsm_megatron.schedule.decay import coefficients
from wsm_megatron.schedule.window import Consumed


class TaskAssignment:
    """Which iterations a store holds; copies end as they are told to."""

    def __init__(self) -> None:
        self.iterations: set[int] = set()
        self.error: Exception | None = None

    def put(self, checkpoint: Consumed) -> Future[None]:
        self.iterations.add(checkpoint.iteration)
        copy: Future[None] = Future()
        if self.error is None:
            copy.set_result(None)
        else:
            copy.set_exception(self.error)
        return copy

    def drop(self, iteration: int) -> None:
        self.iterations.discard(iteration)


def snapshots_of(*taken: Consumed, **options: Any) -> Snapshots:
    """Taken one by one, with a store of their own."""
    snapshots = Snapshots(WSMConfig(**options), TaskAssignment())  # type: ignore[arg-type]
    for one in taken:
        snapshots.take(one)
        snapshots.settle()
    return snapshots


def at(*iterations: int) -> list[Consumed]:
    """100 tokens an iteration."""
    return [Consumed(iteration, iteration * 100, 1) for iteration in iterations]


def kept(snapshots: Snapshots) -> list[int]:
    return [c.iteration for c in snapshots.kept]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"num": 3}, [30, 40, 50]),
        ({"num": 9}, [10, 20, 30, 40, 50]),
        ({"window_iters": 20}, [30, 40, 50]),
        ({"window_iters": 25}, [30, 40, 50]),
        ({"window_tokens": 2000}, [30, 40, 50]),
        ({"window_tokens": 1999}, [40, 50]),
    ],
)
def test_the_window_moves_on(options: dict[str, Any], expected: list[int]) -> None:
    snapshots = snapshots_of(*at(10, 20, 30, 40, 50), **options)
    assert kept(snapshots) == expected
    assert snapshots._store.iterations == set(expected)  # type: ignore[attr-defined]


def test_a_snapshot_counts_once_every_rank_has_it() -> None:
    snapshots = snapshots_of(*at(10, 20), num=2)
    snapshots.take(*at(30))
    assert snapshots.state(30) is State.COPYING and kept(snapshots) == [10, 20]
    assert snapshots.settle() == (10,)
    assert snapshots.state(30) is State.KEPT and kept(snapshots) == [20, 30]
    assert snapshots.state(10) is None and 10 not in snapshots


def test_a_snapshot_of_an_asynchronous_save_counts_once_that_is_durable() -> None:
    snapshots = snapshots_of(*at(10, 20), num=2)
    snapshots.take(*at(30), durable=False)
    assert snapshots.settle() == () and snapshots.settle() == ()
    assert snapshots.state(30) is State.AWAITING and kept(snapshots) == [10, 20]
    snapshots.confirm(30)
    assert kept(snapshots) == [10, 20], "only ranks that agree move the window"
    assert snapshots.settle() == (10,) and kept(snapshots) == [20, 30]


def test_a_save_may_be_durable_before_the_copy_is_done() -> None:
    snapshots = snapshots_of(*at(10), num=2)
    snapshots.take(*at(20), durable=False)
    snapshots.confirm(20)
    assert snapshots.state(20) is State.COPYING
    snapshots.settle()
    assert snapshots.state(20) is State.KEPT


def test_a_failed_copy_pushes_nothing_out(caplog: pytest.LogCaptureFixture) -> None:
    snapshots = snapshots_of(*at(10, 20), num=2)
    snapshots._store.error = OSError("disk full")  # type: ignore[attr-defined]
    snapshots.take(*at(30))
    assert snapshots.settle() == () and kept(snapshots) == [10, 20] and 30 not in snapshots
    assert snapshots._store.iterations == {10, 20}  # type: ignore[attr-defined]
    assert caplog.messages == ["wsm: window without iteration 30: rank 0: OSError: disk full"]
    snapshots.confirm(30)  # the run's own save of it may still become durable
    assert snapshots.settle() == () and 30 not in snapshots


def test_what_an_earlier_job_left_counts_without_a_copy() -> None:
    snapshots = snapshots_of(num=2)
    snapshots.adopt(*at(20))
    assert kept(snapshots) == [] and snapshots.settle() == ()
    assert kept(snapshots) == [20]


def test_older_ones_may_enter_later_after_a_restart() -> None:
    snapshots = snapshots_of(*at(50, 40, 30), num=3)
    assert kept(snapshots) == [30, 40, 50]
    assert not snapshots.may_hold(20)
    assert snapshots_of(*at(50, 40), num=3).may_hold(30)


def test_nothing_before_the_start() -> None:
    snapshots = snapshots_of(*at(50), num=3, start_iter=30)
    assert snapshots.may_hold(30) and not snapshots.may_hold(20)


def test_a_merge_weighs_what_was_trained_in_between() -> None:
    merge = snapshots_of(*at(10, 40, 50), num=3, decay="1-sqrt", min_decay=0.1).coefficients()
    assert merge is not None and merge.unit == "tokens" and merge.iterations == (10, 40, 50)
    assert merge.coefficients == coefficients((1000, 4000, 5000), "1-sqrt", 0.1)


GROWS = [Consumed(*one) for one in ((10, 100, 16, 0), (20, 200, 16, 0), (30, 300, 128, 20))]
GROWS.append(Consumed(40, 400, 128, 20))


def test_positions_count_each_interval_at_its_own_sequence_length() -> None:
    merge = snapshots_of(*GROWS, num=4).coefficients()
    assert merge is not None and merge.unit == "tokens" and merge.why_iterations is None
    assert merge.positions == (1600, 3200, 16000, 28800)
    assert merge.coefficients == coefficients((1600, 3200, 16000, 28800), "linear", 0.0)


@pytest.mark.parametrize(("tokens", "expected"), [(12800, [30, 40]), (25600, [20, 30, 40])])
def test_a_window_in_tokens_counts_them_too(tokens: int, expected: list[int]) -> None:
    assert kept(snapshots_of(*GROWS, window_tokens=tokens)) == expected


def test_a_length_that_changed_in_between_cannot_be_counted() -> None:
    """In a job that began at 15, of which there is no snapshot."""
    changed = [Consumed(*one) for one in ((10, 100, 16, 0), (20, 200, 128, 15), (30, 300, 128, 15))]
    merge = snapshots_of(*changed, num=3).coefficients()
    assert merge is not None and merge.unit == "iterations"
    assert merge.positions == (10, 20, 30)
    assert "between iterations 10 and 20" in str(merge.why_iterations)
    assert kept(snapshots_of(*changed, window_tokens=10**9)) == [20, 30], "how far back 10 lies?"


def test_one_snapshot_is_no_merge() -> None:
    assert snapshots_of(*at(10), num=3).coefficients() is None


def test_the_size_of_a_full_window() -> None:
    assert WSMConfig(num=5).reach.size(10, None) == 5
    assert WSMConfig(window_iters=40).reach.size(10, None) == 5
    assert WSMConfig(window_tokens=4000).reach.size(10, 100) == 5
    assert WSMConfig(window_tokens=4000).reach.size(None, 100) is None


class AnyOrder(RuleBasedStateMachine):
    """Whatever happens in whatever order: the window is what a list of what counted says."""

    @initialize(
        options=st.one_of(
            st.fixed_dictionaries({"num": st.integers(2, 4)}),
            st.fixed_dictionaries({"window_iters": st.integers(1, 30)}),
            st.fixed_dictionaries({"window_tokens": st.integers(1, 3000)}),
        ),
        start=st.integers(0, 20),
    )
    def begin(self, options: dict[str, int], start: int) -> None:
        self.options, self.start = options, start
        self.held = TaskAssignment()
        self.snapshots = Snapshots(WSMConfig(**options, start_iter=start), self.held)  # type: ignore[arg-type]
        self.counted: set[int] = set()  # ever
        self.open: dict[int, tuple[bool, bool]] = {}  # not kept yet: is it copied, is it durable?
        self.window: set[int] = set()

    @rule(iteration=st.integers(0, 60), durable=st.booleans(), fails=st.booleans())
    def take(self, iteration: int, durable: bool, fails: bool) -> None:
        if iteration in self.counted or iteration in self.open:
            return
        self.held.error = OSError("full") if fails else None
        self.snapshots.take(*at(iteration), durable=durable)
        assert self.snapshots.state(iteration) is State.COPYING
        self.open[iteration] = (not fails, durable)

    @rule(iteration=st.integers(0, 60))
    def adopt(self, iteration: int) -> None:
        if iteration in self.counted or iteration in self.open:
            return
        self.held.iterations.add(iteration)
        self.snapshots.adopt(*at(iteration))
        self.open[iteration] = (True, True)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def confirm(self, data: st.DataObject) -> None:
        iteration = data.draw(st.sampled_from(sorted(self.open)))
        self.snapshots.confirm(iteration)
        self.open[iteration] = (self.open[iteration][0], True)

    @rule()
    def settle(self) -> None:
        left = self.snapshots.settle()
        now = {i for i, (copied, durable) in self.open.items() if copied and durable}
        self.open = {i: (c, d) for i, (c, d) in self.open.items() if c and not d}
        self.counted |= now
        candidates = {i for i in self.counted if i >= self.start}
        before = self.window | now
        self.window = self._inside(candidates)
        assert sorted(left) == sorted(before - self.window)
        assert all(self.snapshots.state(i) is State.AWAITING for i in self.open)

    def _inside(self, counted: set[int]) -> set[int]:
        newest = max(counted, default=0)
        if "num" in self.options:
            return set(sorted(counted)[-self.options["num"] :])
        if "window_iters" in self.options:
            return {i for i in counted if i >= newest - self.options["window_iters"]}
        return {i for i in counted if 100 * i >= 100 * newest - self.options["window_tokens"]}

    @invariant()
    def the_window_is_what_counts(self) -> None:
        assert kept(self.snapshots) == sorted(self.window)
        assert all(self.snapshots.state(i) is State.KEPT for i in self.window)
        merge = self.snapshots.coefficients()
        assert (merge is None) == (len(self.window) < 2)
        if merge is not None:
            assert merge.iterations == tuple(sorted(self.window))

    @invariant()
    def the_store_holds_what_there_is(self) -> None:
        assert self.held.iterations == self.window | self.open.keys()
        assert all(i in self.snapshots for i in self.held.iterations)


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
