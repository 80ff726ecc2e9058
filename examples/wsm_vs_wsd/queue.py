"""Arms wait for what they need, are done once, by one worker, and leave a JSON file."""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from examples.wsm_vs_wsd.plan import Arm

_WAIT = 0.5


class Queue:
    """The arms of a plan in a folder; any number of processes may work on it.

    ``arms/NAME.json`` is a finished arm's result. A worker holds a lock on ``locks/NAME`` while it
    is at an arm; the system lets go of it when the worker dies, so nothing needs to be cleaned up.
    """

    def __init__(self, folder: Path, arms: Sequence[Arm]):
        self.folder = folder
        self.arms = list(arms)
        for name in ("arms", "locks", "state"):
            (folder / name).mkdir(parents=True, exist_ok=True)

    def result(self, name: str) -> Path:
        return self.folder / "arms" / f"{name}.json"

    def state(self, name: str) -> Path:
        """What an arm leaves for others: checkpoints and paths."""
        return self.folder / "state" / name

    def done(self) -> list[Arm]:
        return [arm for arm in self.arms if self.result(arm.name).exists()]

    def finish(self, arm: Arm, result: dict[str, Any]) -> None:
        """Whole or not at all."""
        path = self.result(arm.name)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(result, indent=1) + "\n")
        partial.replace(path)

    def take(self, deadline: float = float("inf")) -> Iterator[Arm]:
        """Arms for this worker, the most urgent first, until all are done or the deadline
        (``time.time()``) is over; waits while the others are at what the rest needs."""
        while (open_arms := self._open()) and time.time() < deadline:
            for arm in open_arms:
                if not all(self.result(need).exists() for need in arm.needs):
                    continue
                with self._claim(arm) as claimed:
                    if claimed and not self.result(arm.name).exists():
                        yield arm
                        break
            else:
                time.sleep(_WAIT)

    def _open(self) -> list[Arm]:
        return [arm for arm in self.arms if not self.result(arm.name).exists()]

    @contextmanager
    def _claim(self, arm: Arm) -> Iterator[bool]:
        with (self.folder / "locks" / arm.name).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True
