"""How far the arms are, and how long the rest will take."""

from __future__ import annotations

import time

from examples.wsm_vs_wsd.plan import Arm
from examples.wsm_vs_wsd.queue import Queue


class Progress:
    """Counts the steps of arms that anybody finished since this one began."""

    def __init__(self, queue: Queue):
        self._queue = queue
        self._began = time.monotonic()
        self._before = self._steps()

    def _steps(self) -> float:
        return sum(arm.steps for arm in self._queue.done())

    def show(self, arm: Arm) -> None:
        """A line to stdout."""
        done, whole = self._steps(), sum(arm.steps for arm in self._queue.arms)
        spent = time.monotonic() - self._began
        left = spent * (whole - done) / max(done - self._before, 1.0)
        count, arms = len(self._queue.done()), len(self._queue.arms)
        print(
            f"{count:4d} of {arms} arms, {100 * done / whole:3.0f} %   {arm.name:<24}"
            f"{spent / 60:6.1f} min, about {left / 60:.1f} min left",
            flush=True,
        )
