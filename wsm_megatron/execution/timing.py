"""Where a rank's time went: seconds in each phase, and the report that says so."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

PHASES = (
    "planning",
    "waiting",
    "resuming",
    "reading",
    "reducing",
    "writing",
    "syncing",
    "publishing",
)
"""``waiting``: for another rank, and for sums to get there or come from it. ``resuming``: checking
what an earlier merge has finished. ``reading`` and ``writing`` include the CRC-32 of what is read
and written, and ``writing`` the journal's syncs on the way; ``syncing`` is what remains at the end.
Rank 0 plans and publishes."""


class Phases:
    """Adds up seconds. Safe to share between threads: each has its own, and two clock readings.

    Used as ``with phases("reading"): ...``; phases do not nest.

    Args:
        threads: of other threads than the one that made this, the seconds are divided by so many.
    """

    def __init__(self, threads: int = 1) -> None:
        self._threads = threads
        self._local = threading.local()
        self._own = self._local.seconds = dict[str, float]()
        self._workers: list[dict[str, float]] = []
        self._crews: list[Phases] = []

    def for_workers(self, threads: int) -> Phases:
        """Phases of so many worker threads; their mean is added to these."""
        self._crews.append(Phases(threads))
        return self._crews[-1]

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        assert phase in PHASES
        started = time.perf_counter()
        try:
            yield
        finally:
            seconds = self._mine()
            seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - started

    def seconds(self) -> dict[str, float]:
        """Seconds of each phase that there was."""
        crews = [crew.seconds() for crew in self._crews]
        found = {}
        for phase in PHASES:
            workers = sum(one.get(phase, 0.0) for one in tuple(self._workers)) / self._threads
            crewed = sum(one.get(phase, 0.0) for one in crews)
            if total := self._own.get(phase, 0.0) + workers + crewed:
                found[phase] = total
        return found

    def _mine(self) -> dict[str, float]:
        if not hasattr(self._local, "seconds"):
            self._local.seconds = {}
            self._workers.append(self._local.seconds)
        return self._local.seconds


@dataclass(frozen=True)
class RankReport:
    """What one rank did.

    Attributes:
        device: that it summed on.
        bytes_read: of tensors and objects; as bytes_written.
        seconds: of its share, from the first read until its files were on disk.
        phases: seconds by phase (:data:`PHASES`), of the worker threads their mean.
    """

    rank: int
    host: str
    device: str
    threads: int
    bytes_read: int
    bytes_written: int
    seconds: float
    phases: dict[str, float] = field(default_factory=dict)

    @property
    def bytes_per_second(self) -> float:
        """Read and written, while it worked on its share."""
        return (self.bytes_read + self.bytes_written) / max(self.seconds, 1e-9)

    def as_data(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {**asdict(self), "bytes_per_second": self.bytes_per_second}

    def with_seconds(self, phase: str, seconds: float) -> RankReport:
        """With more seconds in a phase."""
        more = {**self.phases, phase: self.phases.get(phase, 0.0) + seconds}
        ordered = {name: more[name] for name in PHASES if name in more}
        return RankReport(**{**vars(self), "phases": ordered})
