"""Sums from rank to rank over gloo, here between threads of one process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from wsm_megatron.access.node_local.transport import Transport, open_transport
from wsm_megatron.comm.communicator import Ranks
from wsm_megatron.comm.heartbeat import Heartbeat
from wsm_megatron.errors import LostError, MergeError
from wsm_megatron.process.timeouts import timeouts


@pytest.fixture
def wires(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Transport]]:
    monkeypatch.setattr(timeouts, "beat", 0.05)
    monkeypatch.setattr(timeouts, "lost_after", 3.0)
    store = dist.HashStore()
    lines = [Heartbeat(store, rank, 2) for rank in range(2)]
    ranks = [Ranks(rank, 2, one, store) for rank, one in enumerate(lines)]
    opened: dict[int, Transport] = {}
    at_once([lambda r=r: opened.update({r.rank: open_transport(r)}) for r in ranks])  # type: ignore[misc]
    wires = [opened[rank] for rank in range(2)]
    opened.clear()
    yield wires
    at_once([one.leave for one in lines])


def at_once(calls: list[Callable[[], Any]]) -> list[BaseException | None]:
    """Run calls on a thread each; what each raised."""
    raised: list[BaseException | None] = [None] * len(calls)

    def run(i: int) -> None:
        try:
            calls[i]()
        except BaseException as error:
            raised[i] = error

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    return raised


def rows(*values: float) -> list[torch.Tensor]:
    return [torch.full((1000,), value, dtype=torch.float64) for value in values]


def test_messages_go_in_the_order_of_their_tickets(wires: list[Transport]) -> None:
    """Both ways between two ranks, whichever thread comes first."""
    stop = threading.Event()
    first, second, third = rows(0, 0), rows(0), rows(0)
    calls: list[Callable[[], Any]] = [
        lambda: wires[1].receive(0, 2, third, stop),
        lambda: wires[0].send(1, 2, rows(4), stop),
        lambda: wires[0].receive(1, 1, second, stop),
        lambda: wires[1].send(0, 1, rows(3), stop),
        lambda: wires[1].receive(0, 0, first, stop),
        lambda: wires[0].send(1, 0, rows(1, 2), stop),
    ]
    assert at_once(calls) == [None] * 6
    for row, value in zip([*first, *second, *third], (1, 2, 3, 4), strict=True):
        assert (row == value).all()


def test_a_thread_whose_turn_does_not_come_is_stopped(wires: list[Transport]) -> None:
    stop = threading.Event()
    calls: list[Callable[[], Any]] = [lambda: wires[0].send(1, 5, rows(1), stop), stop.set]
    waiting, _ = at_once(calls)
    assert isinstance(waiting, MergeError)


def test_a_broken_connection_names_the_rank(wires: list[Transport]) -> None:
    def leave() -> None:
        del wires[1]._group

    stop = threading.Event()
    broken, _ = at_once([lambda: wires[0].receive(1, 0, rows(0), stop), leave])
    assert isinstance(broken, LostError)
    assert "the connection to rank 1 broke" in str(broken)
