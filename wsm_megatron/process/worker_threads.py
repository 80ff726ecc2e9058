"""Threads that work through a list, watched by the thread that hired them."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import TypeVar

from wsm_megatron.process.timeouts import timeouts

T = TypeVar("T")

_LOOK = 0.2
"""Seconds between two looks at the threads, and at what else may have gone wrong."""


def run_workers(
    items: Iterable[T],
    work: Callable[[T], None],
    threads: int,
    stop: threading.Event,
    check: Callable[[], None],
) -> None:
    """Call ``work`` for every item, in order, on several threads; return when all are done.

    The first failure, of an item or of ``check``, sets ``stop`` and is raised. The threads are
    daemons: one that hangs in a call to dead storage keeps neither this call nor the process.

    Args:
        stop: for ``work`` to look at, so that it ends soon after a failure elsewhere.
        check: called a few times a second in the calling thread.
    """
    waiting = deque(items)
    failures: list[BaseException] = []

    def worker() -> None:
        while not stop.is_set():
            try:
                item = waiting.popleft()
            except IndexError:
                return
            try:
                work(item)
            except BaseException as error:
                failures.append(error)
                stop.set()

    crew = [threading.Thread(target=worker, daemon=True) for _ in range(threads)]
    for thread in crew:
        thread.start()
    try:
        for thread in crew:
            while thread.is_alive() and not stop.is_set():
                thread.join(_LOOK)
                check()
    finally:
        stop.set()
        for thread in crew:
            thread.join(timeouts.worker_grace / len(crew))
    if failures:
        raise failures[0]


def in_background(compute: Callable[[], T], check: Callable[[], None]) -> T:
    """``compute()`` in a thread of its own; what it returns or raises.

    For long work that only reads: a failure of ``check``, or a signal, is raised at once, and the
    thread is left to itself.

    Args:
        check: called a few times a second in the calling thread.
    """
    outcomes: queue.SimpleQueue[tuple[list[T], BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            outcomes.put(([compute()], None))
        except BaseException as error:
            outcomes.put(([], error))

    threading.Thread(target=run, daemon=True).start()
    while True:
        with contextlib.suppress(queue.Empty):
            result, failure = outcomes.get(timeout=_LOOK)
            break
        check()
    if failure is not None:
        raise failure
    return result[0]
