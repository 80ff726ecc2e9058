"""The signals that end a job: Slurm's and ``kill``'s SIGTERM, Ctrl-C's SIGINT."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

ENDING = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def ending_signals(handler: Callable[[int, object], None]) -> Iterator[None]:
    """Have ``handler`` called for them, with the signal's number, while the block runs."""
    before = [signal.signal(one, handler) for one in ENDING]
    try:
        yield
    finally:
        for one, earlier in zip(ENDING, before, strict=True):
            signal.signal(one, earlier)


@contextmanager
def ending_later() -> Iterator[None]:
    """Let such a signal wait until the block is done: for few calls that belong together.

    Python runs handlers in the main thread alone; in any other there is nothing to do.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    try:
        with ending_signals(lambda number, _: came.append(number)):
            yield
    finally:
        if came:
            signal.raise_signal(came[0])
