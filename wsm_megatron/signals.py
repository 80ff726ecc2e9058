"""The signals that end a job: Slurm's and ``kill``'s SIGTERM, Ctrl-C's SIGINT."""

from __future__ import annotations

import signal
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
