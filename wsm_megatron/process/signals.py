"""The signals that end a job: Slurm's and ``kill``'s SIGTERM, Ctrl-C's SIGINT."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from wsm_megatron.errors import StoppedError

ENDING = (signal.SIGTERM, signal.SIGINT)


class Stop:
    """A handler: the first signal ends what the main thread does, as an error does.

    Where that error is swallowed, because it came up in a finalizer or within logging, the next
    :meth:`check` raises it again.
    """

    def __init__(self) -> None:
        self._number: int | None = None
        self.outcome = "nothing was published"

    def __call__(self, number: int, _: object) -> None:
        for one in ENDING:
            signal.signal(one, signal.SIG_IGN)
        self._number = number
        self.check()

    def check(self) -> None:
        """Raises ``StoppedError`` once a signal has come."""
        if self._number is not None:
            name = signal.Signals(self._number).name
            raise StoppedError(f"stopped by {name}; {self.outcome}", self._number)


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
def ending_later(outcome: str | None = None) -> Iterator[None]:
    """Let such a signal wait until the block is done: for few calls that belong together. Where the
    block fails, its error ends the work.

    Python runs handlers in the main thread alone; in any other there is nothing to do.

    Args:
        outcome: of the work once the block is done, for what :class:`Stop` says from then on.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    with ending_signals(lambda number, _: came.append(number)):
        yield
    handler = signal.getsignal(signal.SIGTERM)
    if outcome is not None and isinstance(handler, Stop):
        handler.outcome = outcome
    if came:
        signal.raise_signal(came[0])
