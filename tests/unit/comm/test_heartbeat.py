"""Ranks that hear of each other's failures, and of each other's silence; here as threads."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from wsm_megatron import MergeError, UsageError
from wsm_megatron.access.node_local.access import check_shared
from wsm_megatron.cli.main import _Log
from wsm_megatron.comm import heartbeat
from wsm_megatron.comm.communicator import Ranks
from wsm_megatron.comm.heartbeat import Heartbeat
from wsm_megatron.errors import StoppedError, exit_code
from wsm_megatron.process.signals import ENDING, Stop
from wsm_megatron.process.timeouts import timeouts
from wsm_megatron.process.worker_threads import in_background


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeouts, "beat", 0.05)
    monkeypatch.setattr(timeouts, "lost_after", 3.0)


@pytest.fixture
def ranks() -> Iterator[list[Ranks]]:
    store = dist.HashStore()
    lines = [Heartbeat(store, rank, 3) for rank in range(3)]
    yield [Ranks(rank, 3, one) for rank, one in enumerate(lines)]
    leaving = [threading.Thread(target=one.leave) for one in lines]
    for thread in leaving:
        thread.start()
    for thread in leaving:
        thread.join()


def on_all(ranks: list[Ranks], call: Callable[[Ranks], Any]) -> list[Any]:
    """What the call returns on every rank, or the exception that it raises."""
    outcomes: list[Any] = [None] * len(ranks)

    def run(one: Ranks) -> None:
        try:
            outcomes[one.rank] = call(one)
        except Exception as error:
            outcomes[one.rank] = error

    threads = [threading.Thread(target=run, args=(o,), name=f"rank {o.rank}") for o in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return outcomes


def test_gather_and_from_first(ranks: list[Ranks]) -> None:
    def talk(one: Ranks) -> list[Any]:
        numbers = [one.all_gather((turn, one.rank)) for turn in range(3)]
        return [*numbers, one.broadcast(lambda: f"by {one.rank}", "telling"), one.all_gather(None)]

    expected = [[(turn, rank) for rank in range(3)] for turn in range(3)]
    assert on_all(ranks, talk) == [[*expected, "by 0", [None] * 3]] * 3


def test_values_larger_than_the_store_takes(
    ranks: list[Ranks], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat, "_PART_BYTES", 1000)
    values = [bytes([rank]) * 12345 for rank in range(3)]
    assert on_all(ranks, lambda one: one.all_gather(values[one.rank])) == [values] * 3


@pytest.mark.parametrize("kind", [MergeError, UsageError])
@pytest.mark.parametrize("failing", [0, 2])
def test_a_failure_reaches_ranks_that_wait(
    ranks: list[Ranks], kind: type[Exception], failing: int
) -> None:
    def work(one: Ranks) -> None:
        with one.together("the test"):
            if one.rank == failing:
                raise kind("no luck")

    outcomes = on_all(ranks, work)
    for rank, outcome in enumerate(outcomes):
        assert type(outcome) is kind
        told = f"rank {failing} failed in the test: no luck"
        assert str(outcome) == ("no luck" if rank == failing else told)


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 waits for the others to stop, and they for its report, however busy the machine."""
    monkeypatch.setattr(timeouts, "stop_beats", 600)
    monkeypatch.setattr(timeouts, "report_beats", 600)


def reported(ranks: list[Ranks], work: Callable[[Ranks], None], log: Any) -> list[str]:
    """What is logged at ERROR, by all ranks together, of a job in which ``work`` fails on each."""

    def end(one: Ranks) -> None:
        try:
            work(one)
        except Exception as error:
            assert one._heartbeat is not None
            one.failed(error)
            one._heartbeat.report()

    on_all(ranks, end)
    return [one.getMessage() for one in log.records if one.levelno == logging.ERROR]


def test_rank_0_logs_why_each_rank_failed(
    ranks: list[Ranks], patient: None, caplog: pytest.LogCaptureFixture
) -> None:
    both = threading.Barrier(2)

    def work(one: Ranks) -> None:
        with one.together("the test"):
            if one.rank > 0:
                both.wait(30)
                raise MergeError("no luck") if one.rank == 1 else KeyError("a defect")
            one.all_gather(None)

    one, other = sorted(reported(ranks, work, caplog))
    assert one == "rank 1 failed in the test: no luck"
    first, _, *frames, last = other.splitlines()
    assert first == "rank 2 failed in the test:" and last == "KeyError: 'a defect'"
    assert any("in work" in frame for frame in frames)
    assert {record.threadName for record in caplog.records} == {"rank 0"}


def test_ranks_that_fail_alike_are_logged_together(
    ranks: list[Ranks], patient: None, caplog: pytest.LogCaptureFixture
) -> None:
    together = threading.Barrier(3)

    def work(one: Ranks) -> None:
        together.wait(30)
        raise UsageError("--last 1: too few")

    expected = ["ranks 0, 1, 2 failed in starting: --last 1: too few"]
    assert reported(ranks, work, caplog) == expected


def test_where_rank_0_is_gone_another_rank_logs_why(
    ranks: list[Ranks], caplog: pytest.LogCaptureFixture
) -> None:
    def work(one: Ranks) -> None:
        one.all_gather(None)
        if one.rank != 0:
            one.all_gather(None)
        assert one._heartbeat is not None
        one._heartbeat._leaving.set()

    (message,) = reported(ranks, work, caplog)
    assert message.startswith("rank 0 (") and "is lost" in message


def test_a_failure_reaches_ranks_that_work(ranks: list[Ranks]) -> None:
    def work(one: Ranks) -> None:
        with one.together("the test"):
            if one.rank == 1:
                raise MergeError("no luck")
            for _ in range(1000):
                one.check()
                time.sleep(0.01)

    assert [str(outcome) for outcome in on_all(ranks, work)] == [
        "rank 1 failed in the test: no luck",
        "no luck",
        "rank 1 failed in the test: no luck",
    ]


def test_a_failure_that_follows_from_another_gives_way_to_it(ranks: list[Ranks]) -> None:
    def work(one: Ranks) -> None:
        with one.together("the test"):
            if one.rank == 1:
                raise MergeError("no luck")
            with pytest.raises(MergeError, match="no luck"):
                while True:
                    one.check()
                    time.sleep(0.01)
            raise OSError("the directory is gone")

    assert "rank 1 failed in the test: no luck" in str(on_all(ranks, work)[2])


@pytest.mark.parametrize("dead", [0, 2])
def test_a_silent_rank_is_named(ranks: list[Ranks], dead: int) -> None:
    def work(one: Ranks) -> None:
        one.all_gather(None)
        if one.rank == dead:
            assert one._heartbeat is not None
            one._heartbeat._leaving.set()  # its thread ends without a word
            return
        one.all_gather(None)

    outcomes = on_all(ranks, work)
    for rank in {0, 1, 2} - {dead}:
        assert isinstance(outcomes[rank], MergeError)
        assert str(outcomes[rank]).startswith(f"rank {dead} (") and "lost" in str(outcomes[rank])


def test_a_target_that_not_all_ranks_see_is_refused(
    ranks: list[Ranks], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timeouts, "visible_within", 0.1)
    for name in ("shared", "local"):
        (tmp_path / name).mkdir()

    def check(one: Ranks) -> None:
        check_shared(tmp_path / ("local" if one.rank == 2 else "shared"), one)

    for outcome in on_all(ranks, check):
        assert isinstance(outcome, MergeError)
        assert "do all nodes see the same --save" in str(outcome)


def test_rank_0_hears_what_others_tell_and_count(ranks: list[Ranks]) -> None:
    heard: list[Any] = []
    ranks[0].hear(heard.append)
    for one in ranks:
        one.count(10 ** (one.rank + 1))
        for number in range(3):
            one.tell((one.rank, number))
    for one in reversed(ranks):
        one.exchange()
    assert sorted(heard) == [(rank, number) for rank in range(3) for number in range(3)]
    assert [told for told in heard if told[0] == 2] == [(2, 0), (2, 1), (2, 2)]
    assert ranks[0].counted() == 10 + 100 + 1000


def test_a_rank_that_tells_too_much_is_not_heard_out(
    ranks: list[Ranks], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A source that fails at every read must not fill the store."""
    heard: list[int] = []
    ranks[0].hear(heard.append)
    blocked, go_on = threading.Event(), threading.Event()

    def wait() -> int:
        blocked.set()
        go_on.wait(30)
        return 0

    monkeypatch.setattr(ranks[1]._heartbeat, "count", wait)
    assert blocked.wait(30)
    for number in range(1000):
        ranks[1].tell(number)
    go_on.set()
    ranks[1].exchange()
    ranks[0].exchange()
    assert heard == list(range(900, 1000))


def test_rank_0_says_which_ranks_have_not_come_and_does_not_wait_for_them_to_stop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(timeouts, "stop_beats", 10**6)
    store = dist.HashStore()
    first, second = (Heartbeat(store, rank, 4) for rank in (0, 1))
    told: list[list[int]] = []

    def tell(missing: list[int]) -> None:
        told.append(missing)
        if missing == [2, 3]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as stopped:
        first.meet(tell)
    second.meet(tell)  # only rank 0 waits

    def stop(one: Heartbeat) -> None:
        one.fail(stopped.value, "starting")
        one.leave()

    for thread in (stopping := [threading.Thread(target=stop, args=(o,)) for o in (first, second)]):
        thread.start()
    for thread in stopping:
        thread.join(30)
        assert not thread.is_alive()


def test_a_rank_that_dies_before_all_have_come_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeouts, "lost_after", 0.5)
    store = dist.HashStore()
    first, second = (Heartbeat(store, rank, 3) for rank in (0, 1))
    second._leaving.set()
    with pytest.raises(MergeError, match="rank 1 .* is lost"):
        first.meet(lambda _: None)
    first.leave()


def test_all_have_come(ranks: list[Ranks]) -> None:
    def meet(one: Ranks) -> None:
        assert one._heartbeat is not None
        one._heartbeat.meet(lambda _: None)

    assert on_all(ranks, meet) == [None] * 3


def test_a_rank_lost_while_rank_0_plans(ranks: list[Ranks]) -> None:
    """Planning calls nothing of the line; a thread does it, and rank 0 looks after the job."""
    planned = threading.Event()

    def plan(one: Ranks) -> None:
        if one.rank == 2:
            assert one._heartbeat is not None
            one._heartbeat._leaving.set()
            return
        one.broadcast(lambda: in_background(lambda: planned.wait(60), one.check), "planning")

    outcomes = on_all(ranks, plan)
    assert not planned.is_set()
    planned.set()
    for rank in (0, 1):
        assert "rank 2" in str(outcomes[rank]) and "lost" in str(outcomes[rank])


def test_a_signal_that_was_swallowed_ends_the_job(ranks: list[Ranks]) -> None:
    """Its error may come up in a finalizer, which Python ignores."""

    def work(one: Ranks) -> None:
        stop = Stop()
        with one.watching(stop.check), one.together("the test"):
            if one.rank == 1:
                with contextlib.suppress(StoppedError):
                    stop(signal.SIGTERM, None)
            for _ in range(1000):
                one.check()
                time.sleep(0.01)

    before = [signal.getsignal(one) for one in ENDING]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(signal, "signal", lambda *_: None)  # not in a thread
        outcomes = on_all(ranks, work)
    assert [signal.getsignal(one) for one in ENDING] == before
    assert isinstance(outcomes[1], StoppedError)
    for rank in (0, 2):
        assert "rank 1 failed in the test: stopped by SIGTERM" in str(outcomes[rank])
        assert exit_code(outcomes[rank]) == 128 + signal.SIGTERM


def test_logging_does_not_swallow_a_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stderr:
        def write(self, _: str) -> None:
            raise StoppedError("stopped", signal.SIGTERM)

    handler = _Log(Stderr())
    with pytest.raises(StoppedError):
        handler.handle(logging.makeLogRecord({"msg": "waiting"}))
