"""One rank's line to the others: a key-value store, and a thread that tells who is still there.

Nothing here blocks in a collective. A rank that waits looks at the store now and then; its thread
meanwhile leaves a sign of life every second, and learns of a rank that failed or has fallen silent.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import queue
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import torch.distributed as dist

from wsm_megatron.comm.messages import Failure, Sign, reports
from wsm_megatron.errors import LostError, MergeError
from wsm_megatron.process.gc_paused import gc_paused
from wsm_megatron.process.timeouts import timeouts

logger = logging.getLogger(__name__)

_PART_BYTES = 4 * 2**20
"""The TCP store takes values of up to 8 MiB."""
_FAILED = "failed"
_TOLD_A_BEAT = 100
"""Values that a rank tells rank 0 in one beat at most; of more, the newest."""


class Heartbeat:
    """Values to and from other ranks. Only this object's thread talks to the store.

    Args:
        store: of all ranks of this job, and of no other job.

    Attributes:
        phase: what this rank is doing, for messages.
        health: called at every beat, on the heartbeat's thread; what it raises fails the job, also
            while the rank's own thread is stuck in a call to the system.
        failure: why the job has failed first; None while it has not.
        count: what this rank has done, in any unit; told with every beat.
        hear: called on rank 0, on the heartbeat's thread, with what other ranks tell.
    """

    def __init__(self, store: dist.Store, rank: int, size: int):
        self._store: Any = store  # its stubs know of no bytes
        self.rank, self.size = rank, size
        self.phase = "starting"
        self.health: Callable[[], None] = lambda: None
        self.failure: Failure | None = None
        self.count: Callable[[], int] = lambda: 0
        self.hear: Callable[[Any], None] = lambda _: None
        self._to_tell: deque[Any] = deque(maxlen=_TOLD_A_BEAT)
        self._told = 0
        self._requests: queue.SimpleQueue[tuple[Callable[[], Any], queue.SimpleQueue]] = (
            queue.SimpleQueue()
        )
        self._silence: dict[int, float] = {}
        self._heard: dict[int, bytes] = {}
        self._missing: set[int] = set()
        self._own: Failure | None = None
        self._lost: dict[int, Failure] = {}
        self._has_ended = False
        self._contact = time.monotonic()
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="wsm-line", daemon=True)
        self._thread.start()

    def meet(self, tell: Callable[[list[int]], None]) -> None:
        """On rank 0: wait until every rank has given a sign of life.

        Args:
            tell: called meanwhile, with the ranks that are missing.
        """
        self._missing = set(range(1, self.size)) if self.rank == 0 else set()
        pause = 0.005
        while self._missing:
            here = partial(self._store.check, [f"beat/{rank}" for rank in self._missing])
            if self._ask(here):
                self._missing = set()
                return
            self.check()
            self._missing -= {rank for rank, sign in tuple(self._heard.items()) if sign}
            tell(sorted(self._missing))
            time.sleep(pause)
            pause = min(1.5 * pause, 0.1)

    def check(self) -> None:
        """Raise where the job has failed on another rank, or the others are out of reach."""
        if self.failure is not None:
            raise self.failure.error()
        if time.monotonic() - self._contact > timeouts.lost_after + 5 * timeouts.beat:
            raise LostError(f"{self._who(0)} does not answer: its node or its network is gone")

    def put(self, key: str, value: Any) -> None:
        """Make a picklable value known under a key that is used once."""
        data = pickle.dumps(value)
        parts = range(0, len(data), _PART_BYTES)
        for i, start in enumerate(parts):
            self._set(f"{key}#{i}", data[start : start + _PART_BYTES])
        self._set(key, str(len(parts)).encode())

    def take(self, key: str) -> Any:
        """Wait for a value and return it; raises as soon as the job has failed."""
        pause = 0.005
        while not self._ask(lambda: self._store.check([key])):
            self.check()
            time.sleep(pause)
            pause = min(1.5 * pause, 0.1)
        count = int(self._ask(lambda: self._store.get(key)))
        data = b"".join(self._part(f"{key}#{i}") for i in range(count))
        with gc_paused():
            return pickle.loads(data)

    def forget(self, key: str) -> None:
        """Drop a value that every rank has taken."""
        count = int(self._ask(lambda: self._store.get(key)))
        for name in (key, *(f"{key}#{i}" for i in range(count))):
            self._ask(partial(self._store.delete_key, name))

    def tell(self, value: Any) -> None:
        """Have rank 0 hear a small picklable value with a next beat; too many are left out."""
        self._to_tell.append(value)

    def counted(self) -> int:
        """The other ranks' counts together, by their last beat. On rank 0."""
        return sum(Sign.read(sign).counted for sign in tuple(self._heard.values()) if sign)

    def exchange(self) -> None:
        """Beat at once."""
        self._ask(self._beat)

    def fail(self, error: BaseException, phase: str) -> Exception | None:
        """Tell the other ranks that this one has failed, and how it did. Again, it says no more.

        Rank 0 comes back only when all others have stopped too, or after a few seconds.

        Returns:
            the failure of another rank where that came first, and may have led to this one.
        """
        if not self._has_ended:
            self._has_ended = True
            if not self._follows(error):
                self._own = self._own or Failure.of(error, self.rank, phase)
            with contextlib.suppress(MergeError):  # the others are gone
                self._ask(self._speak)
                if self._own is not None:
                    self._ask(partial(self._declare, self._own))
                self._ask(partial(self._store.set, f"ended/{self.rank}", b"1"))
                if self.rank == 0:
                    self._wait_for("ended", timeouts.stop_beats * timeouts.beat)
        first = self.failure
        return first.error() if first is not None and first.rank != self.rank else None

    def failures(self) -> list[Failure]:
        """Of every rank that has failed, as far as is known here; what came first, first."""
        found = {one.rank: one for one in tuple(self._lost.values())}
        if self._own is not None:
            found[self.rank] = self._own
        with contextlib.suppress(MergeError):  # the others are gone
            found |= self._ask(self._read_failures)
        first = self.failure
        if first is not None:
            found[first.rank] = first
        return sorted(found.values(), key=lambda one: (one is not first, one.rank))

    def report(self) -> None:
        """Log why the job has failed, after :meth:`fail`: rank 0 does for all.

        Where rank 0 cannot, or takes too long, another rank does; all do where no store is left
        to settle which.
        """
        if self.rank == 0:
            failures = self.failures()
            with contextlib.suppress(MergeError):
                self._ask(partial(self._store.set, "reported", b"1"))
        elif self._is_reported():
            logger.info("rank %d ends: see rank 0's log for why the job has failed", self.rank)
            return
        else:
            failures = self.failures()
        for text in reports(failures):
            logger.error("%s", text)

    def leave(self) -> None:
        """Leave together: the rank that holds the store goes last, so that all can read it."""
        with contextlib.suppress(MergeError):  # the others are gone
            self._ask(partial(self._store.set, f"left/{self.rank}", b"1"))
            if self.rank == 0:
                self._wait_for(
                    "left",
                    timeouts.lost_after
                    if self.failure is None
                    else timeouts.stop_beats * timeouts.beat,
                )
        self._leaving.set()
        self._requests.put((lambda: None, queue.SimpleQueue()))  # wakes the thread
        self._thread.join(timeouts.beat)

    def _wait_for(self, word: str, patience: float) -> None:
        """Until every other rank that has come, and is not lost, has said a word."""
        until = time.monotonic() + patience
        for rank in set(range(1, self.size)) - self._missing:
            check = partial(self._store.check, [f"{word}/{rank}"])
            while not self._is_lost(rank) and not self._ask(check) and time.monotonic() < until:
                time.sleep(0.02)

    def _is_lost(self, rank: int) -> bool:
        first = self.failure
        return rank in self._lost or (first is not None and first.is_lost and first.rank == rank)

    def _follows(self, error: BaseException) -> bool:
        """Whether an error is only what another rank's failure, or this one's, is raised as."""
        return self.failure is not None and str(error) == self.failure.text

    def _read_failures(self) -> dict[int, Failure]:
        keys = {rank: f"failure/{rank}" for rank in range(self.size)}
        said = {rank: key for rank, key in keys.items() if self._store.check([key])}
        return {rank: Failure.read(self._store.get(key)) for rank, key in said.items()}

    def _is_reported(self) -> bool:
        """Whether rank 0 reports for all, or another rank does in its place."""
        until = time.monotonic() + timeouts.report_beats * timeouts.beat
        try:
            while time.monotonic() < until and not self._is_lost(0):
                if self._ask(lambda: self._store.check(["reported"])):
                    return True
                time.sleep(0.05)
            return self._ask(lambda: self._store.add("reporters", 1)) > 1
        except MergeError:  # the store is gone, with rank 0
            return False

    def _set(self, key: str, data: bytes) -> None:
        self.check()
        self._ask(partial(self._store.set, key, data))

    def _part(self, key: str) -> bytes:
        return self._ask(lambda: self._store.get(key))

    def _ask(self, request: Callable[[], Any]) -> Any:
        """Have the thread do something with the store; never waits for a dead store."""
        reply: queue.SimpleQueue = queue.SimpleQueue()
        self._requests.put((request, reply))
        until = time.monotonic() + timeouts.lost_after + 5 * timeouts.beat
        while time.monotonic() < until and self._thread.is_alive():
            with contextlib.suppress(queue.Empty):
                return reply.get(timeout=0.2)
        with contextlib.suppress(queue.Empty):  # answered, and then the thread ended
            return reply.get_nowait()
        self.failure = self._gone()
        raise self.failure.error()

    def _serve(self) -> None:
        due = 0.0
        try:
            while not self._leaving.is_set():
                if time.monotonic() >= due:
                    self._beat()
                    due = time.monotonic() + timeouts.beat
                self._answer(max(0.0, due - time.monotonic()))
        except RuntimeError as error:  # the store's: its process has ended
            logger.debug("rank %d: %s", self.rank, error)
            self.failure = self.failure or self._gone()

    def _answer(self, timeout: float) -> None:
        try:
            request, reply = self._requests.get(timeout=timeout)
        except queue.Empty:
            return
        reply.put(request())
        self._contact = time.monotonic()

    def _beat(self) -> None:
        self._speak()
        if self.failure is None and self._store.check([_FAILED]):
            self.failure = Failure.read(self._store.get(_FAILED))
        if self.failure is None:
            try:
                self.health()
            except MergeError as error:
                self._declare(self._own or Failure.of(error, self.rank, self.phase))
        # Rank 0 looks after all, all look after rank 0.
        for rank in range(1, self.size) if self.rank == 0 else (0,):
            self._listen(rank)
        self._contact = time.monotonic()

    def _speak(self) -> None:
        """Tell what is to be told, then give a sign of life, which says how much was told."""
        while self._to_tell:
            value = pickle.dumps(self._to_tell.popleft())
            self._store.set(f"told/{self.rank}/{self._told}", value)
            self._told += 1
        sign = Sign(socket.gethostname(), os.getpid(), self._told, self.count(), time.monotonic())
        self._store.set(f"beat/{self.rank}", sign.write())

    def _hear_out(self, rank: int, before: bytes, sign: bytes) -> None:
        first = Sign.read(before).told if before else 0
        for k in range(first, Sign.read(sign).told):
            self.hear(pickle.loads(self._store.get(f"told/{rank}/{k}")))
            self._store.delete_key(f"told/{rank}/{k}")

    def _listen(self, rank: int) -> None:
        """Count the beats in which a rank was not heard: a pause of all ranks counts as one."""
        key = f"beat/{rank}"
        sign = self._store.get(key) if self._store.check([key]) else b""
        before = self._heard.get(rank, b"")
        if self.rank == 0 and sign != before:
            self._hear_out(rank, before, sign)
        if sign != before or self._store.check([f"left/{rank}"]):
            self._silence[rank], self._heard[rank] = 0.0, sign
            return
        self._silence[rank] = self._silence.get(rank, 0.0) + timeouts.beat
        if self._silence[rank] >= (timeouts.lost_after if sign else timeouts.start_within):
            self._declare(self._lost.setdefault(rank, self._silent(rank)))

    def _declare(self, failure: Failure) -> None:
        if failure.rank == self.rank:
            self._own = failure
            self._store.set(f"failure/{self.rank}", failure.write())
        if self._store.add("failures", 1) == 1:
            self._store.set(_FAILED, failure.write())
        else:
            failure = Failure.read(self._store.get(_FAILED))  # waits until it is there
        self.failure = self.failure or failure

    def _silent(self, rank: int) -> Failure:
        if rank not in self._heard:
            message = f"rank {rank} did not start within {timeouts.start_within:.0f} s"
        else:
            message = (
                f"{self._who(rank)} is lost: no sign of life for {timeouts.lost_after:.0f} s "
                "(killed, out of memory, or its node is gone)"
            )
        return Failure.lost(rank, message, self.phase)

    def _gone(self) -> Failure:
        if self.failure is not None:
            return self.failure
        message = f"{self._who(0)} is lost, and with it the store that the job shares"
        return Failure.lost(0, message, self.phase)

    def _who(self, rank: int) -> str:
        if not (sign := self._heard.get(rank, b"")):
            return f"rank {rank}"
        seen = Sign.read(sign)
        return f"rank {rank} ({seen.host} pid {seen.pid})"
