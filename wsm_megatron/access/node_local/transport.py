"""Float64 sums from rank to rank, point to point: gloo, or NCCL for sums on a GPU."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from wsm_megatron.comm.communicator import Ranks
from wsm_megatron.errors import LostError, MergeError
from wsm_megatron.process.timeouts import timeouts
from wsm_megatron.process.worker_threads import run_workers

_PATIENCE = timedelta(days=7)
"""Heartbeats find ranks that are lost. A rank may well compute for hours between two messages."""
_LOOK = 0.2


class Transport:
    """Connections between the ranks of a job. Safe to share between threads.

    Neither NCCL nor this class labels messages: two ranks exchange theirs in one order, which
    both know. Every message between them, either way, has a ticket, counted from 0; a thread waits
    until it is its ticket's turn.

    A transfer cannot be cancelled. Call from threads that may be left behind
    (:mod:`.worker_threads`).
    """

    def __init__(self, group: Any, check: Callable[[], None], device: torch.device):
        self._group, self._check, self._device = group, check, device
        self._turns: dict[int, int] = {}
        self._changed = threading.Condition()

    def send(
        self, peer: int, ticket: int, rows: Sequence[torch.Tensor], stop: threading.Event
    ) -> None:
        """Send float64 tensors; returns when they may be changed again."""
        with self._turn(peer, ticket, stop):
            for row in rows:
                self._wait(self._group.send([row.to(self._device)], peer, 0))

    def receive(
        self, peer: int, ticket: int, rows: Sequence[torch.Tensor], stop: threading.Event
    ) -> None:
        """Fill float64 tensors with what the peer sends under the same ticket."""
        with self._turn(peer, ticket, stop):
            for row in rows:
                there = row if row.device == self._device else row.to(self._device)
                self._wait(self._group.recv([there], peer, 0))
                if there is not row:
                    row.copy_(there)

    def abandon(self) -> None:
        """After a failure: NCCL's transfers, which wait on the GPU, would keep the process."""
        if self._device.type == "cuda":
            self._group.abort()

    def _wait(self, work: Any) -> None:
        work.wait()
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    @contextmanager
    def _turn(self, peer: int, ticket: int, stop: threading.Event) -> Iterator[None]:
        with self._changed:
            while self._turns.get(peer, 0) != ticket:
                self._changed.wait(_LOOK)
                if stop.is_set():
                    raise MergeError("stopped by a failure elsewhere")
        try:
            yield
        except RuntimeError as error:
            self._await_cause()
            raise LostError(f"the connection to rank {peer} broke: {error}") from error
        with self._changed:
            self._turns[peer] = ticket + 1
            self._changed.notify_all()

    def _await_cause(self) -> None:
        """A connection breaks before a heartbeat tells why: wait for which rank failed, and how."""
        until = time.monotonic() + timeouts.lost_after + 5 * timeouts.beat
        while time.monotonic() < until:
            self._check()
            time.sleep(_LOOK)


def open_transport(ranks: Ranks, device: torch.device | str = "cpu") -> Transport:
    """Connect all ranks with each other. Collective.

    Args:
        device: where the sums go through: ``cpu`` takes gloo, a CUDA device of this rank NCCL.

    Raises:
        MergeError: they cannot be connected, or a rank has failed meanwhile.
    """
    store, groups, device = ranks.meeting(), [], torch.device(device)

    def connect(_: None) -> None:
        try:
            groups.append(_group(store, ranks, device))
        except RuntimeError as error:
            raise MergeError(
                f"rank {ranks.rank} cannot be connected with the others ({error}); "
                "GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME names the network to use"
            ) from error

    run_workers([None], connect, 1, threading.Event(), ranks.check)
    return Transport(groups[0], ranks.check, device)


def _group(store: dist.Store, ranks: Ranks, device: torch.device) -> Any:
    """A process group of its own: a caller's may be busy, or of another kind."""
    if device.type == "cuda":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = _PATIENCE
        return dist.ProcessGroupNCCL(store, ranks.rank, ranks.size, options)
    return dist.ProcessGroupGloo(store, ranks.rank, ranks.size, _PATIENCE)
