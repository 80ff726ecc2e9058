"""Progress of rank 0 on standard error: a bar where somebody watches, few lines in a log file."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from wsm_megatron.execution.context import Progress
from wsm_megatron.process.streams import say
from wsm_megatron.process.timeouts import timeouts

_LINE = "{desc}: {percentage:.0f}% of {total_fmt}{unit}, {rate_fmt}, {remaining} left"


@contextmanager
def progress_bar(rank: int, total: int, doing: str = "merging") -> Iterator[Progress]:
    """Show ``total`` bytes going by, with the rate and the time left, on rank 0."""
    if rank != 0:
        yield lambda _: None
    elif sys.stderr.isatty():
        with tqdm(total=total, unit="B", unit_scale=True, desc=doing) as bar:

            def update(nbytes: int) -> None:
                bar.update(nbytes)

            yield update
    else:
        yield _Lines(total, doing).update


class _Lines:
    """Whole lines: a bar writes over itself, and what collects the output of ranks waits for ends.

    Silent for the first ``log_every``.
    """

    def __init__(self, total: int, doing: str):
        self._total, self._done, self._doing = total, 0, doing
        self._lock = threading.Lock()
        self._started = time.monotonic()
        self._due = self._started + timeouts.log_every

    def update(self, nbytes: int) -> None:
        with self._lock:
            self._done += nbytes
            now = time.monotonic()
            if now < self._due:
                return
            self._due = now + timeouts.log_every
            line = tqdm.format_meter(
                self._done,
                self._total,
                now - self._started,
                prefix=self._doing,
                unit="B",
                unit_scale=True,
                bar_format=_LINE,
            )
        say(line)
