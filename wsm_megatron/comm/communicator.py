"""Ranks of a merge job: who am I, and an error on one rank is raised on all of them.

Under ``torchrun`` or ``srun`` the ranks meet at a key-value store of rank 0 (or of torchrun's
agent); there is no process group unless the caller has one already. Alone, every call here is a
no-op of one rank.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist

from wsm_megatron.comm.heartbeat import Heartbeat
from wsm_megatron.comm.launcher import launched_as
from wsm_megatron.comm.messages import Failure
from wsm_megatron.comm.rendezvous import Waiting, connect, forget_stores
from wsm_megatron.errors import mark_told
from wsm_megatron.process.gc_paused import gc_paused

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Ranks:
    """This process among the ranks of the job.

    Methods marked *collective* must be called by all ranks, in the same order. Whoever waits in one
    of them raises when another rank fails: within seconds, or within ``LOST_AFTER`` seconds where
    that rank was killed.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        heartbeat: Heartbeat | None = None,
        store: dist.Store | None = None,
    ):
        assert (heartbeat is None) == (size == 1)
        self.rank, self.size, self._heartbeat, self._store = rank, size, heartbeat, store
        self.phase = "starting"
        self._turn = 0
        self._taken: list[str] = []
        self._checks: list[Callable[[], None]] = []
        self._count, self._counting = 0, threading.Lock()
        self._hear: Callable[[Any], None] = lambda _: None
        if heartbeat is not None:
            heartbeat.health, heartbeat.count = self._check_here, lambda: self._count

    def check(self) -> None:
        """Raise where the job has failed, on this rank or another. Not collective; cheap."""
        self._check_here()
        if self._heartbeat is not None:
            self._heartbeat.check()

    @contextmanager
    def watching(self, check: Callable[[], None]) -> Iterator[None]:
        """While the block runs, a ``MergeError`` of ``check`` fails the job on every rank.

        ``check`` is called in :meth:`check`, and every second from another thread, which finds what
        is wrong also while this rank is stuck in a call to the system. It must not block itself.
        """
        self._checks.append(check)
        try:
            yield
        finally:
            self._checks.remove(check)

    def _check_here(self) -> None:
        for check in tuple(self._checks):
            check()

    def count(self, number: int) -> None:
        """Add to what this rank has done; from any thread."""
        with self._counting:
            self._count += number

    def counted(self) -> int:
        """What all ranks have done by their last sign of life. On rank 0."""
        return self._count + (0 if self._heartbeat is None else self._heartbeat.counted())

    def tell(self, value: Any) -> None:
        """Let rank 0 hear a small picklable value, within seconds or never. Never waits."""
        if self.rank == 0 or self._heartbeat is None:
            self._hear(value)
        else:
            self._heartbeat.tell(value)

    def hear(self, listener: Callable[[Any], None]) -> None:
        """On rank 0: call ``listener``, which must not wait, with what any rank tells."""
        self._hear = listener
        if self._heartbeat is not None:
            self._heartbeat.hear = listener

    def exchange(self) -> None:
        """Give a sign of life now and, on rank 0, listen to the others'. Not collective."""
        if self._heartbeat is not None:
            self._heartbeat.exchange()

    def failed(self, error: BaseException) -> list[Failure]:
        """Tell the other ranks that this one ends with an error, unless they know it.

        Returns:
            on rank 0, once the others have stopped too, why each rank failed: the first one first.
        """
        if self._heartbeat is None:
            return [Failure.of(error, self.rank, self.phase)]
        self._heartbeat.fail(error, self.phase)
        return self._heartbeat.failures() if self.rank == 0 else []

    @contextmanager
    def together(self, phase: str) -> Iterator[None]:
        """Run a block on every rank and leave it together. Collective.

        Raises:
            the rank's own exception where the block failed; on every other rank a
            ``UsageError`` or ``MergeError`` that names this rank and the phase, also where that
            rank's failure led to one here.
        """
        self._enter(phase)
        try:
            yield
        except Exception as error:
            if self._heartbeat is not None and (first := self._heartbeat.fail(error, phase)):
                raise first from error
            raise
        self.all_gather(None)

    def all_gather(self, value: T) -> list[T]:
        """Every rank's ``value`` (picklable), in rank order. Collective."""
        values = self.gather(value)
        if self._heartbeat is None:
            return values
        key = self._next()
        if self.rank != 0:
            return self._heartbeat.take(key)
        self._taken.append(key)
        self._heartbeat.put(key, values)
        return values

    def gather(self, value: T) -> list[T]:
        """Every rank's ``value``, in rank order, on rank 0; nothing elsewhere. Collective."""
        if self._heartbeat is None:
            return [value]
        key = self._next()
        if self.rank != 0:
            self._heartbeat.put(f"{key}/{self.rank}", value)
            return []
        values = [value]
        for rank in range(1, self.size):
            values.append(self._heartbeat.take(f"{key}/{rank}"))
            self._heartbeat.forget(f"{key}/{rank}")
        for taken in self._taken:  # by every rank, before it came here
            self._heartbeat.forget(taken)
        self._taken = []
        return values

    def broadcast(self, compute: Callable[[], T], phase: str) -> T:
        """``compute()`` of rank 0, on every rank; its failure too. Collective."""
        values: list[T] = []
        with self.together(phase):
            if self.rank == 0:
                values.append(compute())
        if self._heartbeat is None:
            return values[0]
        key = self._next()
        if self.rank != 0:
            return self._heartbeat.take(key)
        self._heartbeat.put(key, values[0])
        self._taken.append(key)
        return values[0]

    def meeting(self) -> dist.Store:
        """A store for the ranks to meet at once more, of more than one rank. Collective.

        A connection of its own where torch can make one (2.5): whoever waits in it keeps no sign
        of life from the heartbeat.
        """
        assert self._store is not None
        store = self._store.clone() if hasattr(self._store, "clone") else self._store
        return dist.PrefixStore(self._next(), store)

    def _enter(self, phase: str) -> None:
        self.phase = phase
        if self._heartbeat is not None:
            self._heartbeat.phase = phase

    def scatter(self, compute: Callable[[int], T], phase: str) -> T:
        """``compute(rank)``, made for every rank on rank 0; its failure too. Collective."""
        key, values = self._next(), list[T]()
        with self.together(phase), gc_paused():
            if self.rank == 0:
                values.append(compute(0))
                for rank in range(1, self.size):
                    assert self._heartbeat is not None
                    self._heartbeat.put(f"{key}/{rank}", compute(rank))
        if self.rank != 0:
            assert self._heartbeat is not None
            values.append(self._heartbeat.take(f"{key}/{self.rank}"))
            self._heartbeat.forget(f"{key}/{self.rank}")
        return values[0]

    def _next(self) -> str:
        self._turn += 1
        return f"turn/{self._turn}"


_current: Ranks | None = None
_jobs = 0


@contextmanager
def job_ranks() -> Iterator[Ranks]:
    """The ranks of this job. Collective; within itself it gives the same ranks again.

    Where the block fails on one of several ranks, rank 0 logs why, at ERROR, for every rank that
    failed; an internal error with its traceback.

    Raises:
        UsageError: the environment speaks of several ranks, but not clearly.
        MergeError: they did not meet.
    """
    global _current
    if _current is not None:
        yield _current
        return
    rank, size, store, waiting = _meet()
    if store is None:
        yield Ranks()
        return
    logger.info("rank %d of %d", rank, size)
    heartbeat = Heartbeat(store, rank, size)
    _current = ranks = Ranks(rank, size, heartbeat, store)
    try:
        heartbeat.exchange()  # heard from now on: a rank killed at once is lost, not late
        if waiting is not None:
            heartbeat.meet(waiting.tell)
        yield ranks
    except BaseException as error:
        ranks.failed(error)
        heartbeat.report()
        mark_told(error)
        forget_stores()
        raise
    finally:
        _current = None
        heartbeat.leave()


def _meet() -> tuple[int, int, dist.Store | None, Waiting | None]:
    """Rank, world size, a store of this job alone; and, where ranks may still be missing, who says
    that they are."""
    global _jobs
    waiting = None
    if dist.is_available() and dist.is_initialized():
        rank, size = dist.get_rank(), dist.get_world_size()
        store = dist.distributed_c10d._get_default_store()
        if hasattr(store, "clone"):  # a connection of its own, from torch 2.5 on
            store = store.clone()
    elif launch := launched_as():
        rank, size, waiting = launch.rank, launch.size, Waiting(launch)
        store = connect(launch, waiting)
    else:
        return 0, 1, None, None
    if size == 1:
        return rank, size, None, None
    _jobs += 1
    return rank, size, dist.PrefixStore(f"wsm/{_jobs}", store), waiting
