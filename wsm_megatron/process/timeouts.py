"""How long a job waits for what: every patience of the package, in one place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields

from wsm_megatron.errors import UsageError

VARIABLE = "WSM_TIMEOUTS"
"""Environment variable: ``lost_after=60,stalled_after=900``."""


@dataclass
class Timeouts:
    """Seconds, where nothing else is said.

    Attributes:
        beat: between a rank's heartbeats.
        lost_after: without a heartbeat, after which a rank counts as lost.
        start_within: every rank must have started.
        stop_beats: beats within which every rank is to stop after a failure.
        report_beats: beats within which rank 0 is to have said why; else another rank does.
        say_missing_after: until a rank says which ranks it waits for; say_missing_every: and again.
        stalled_after: a call (a read, a write, a sync) that has not returned counts as hanging.
        first_pause: before the first retry of a read; every further pause is twice as long.
        visible_within: what one node has written, another must see. An NFS client believes what it
            knows of a directory for up to 60 (``acdirmax``).
        look_every: between two looks at sources that may change.
        sync_every: after which the next finished chunk starts a sync.
        freshen_every: between two touches of a lock; stale_after: without one its holder is dead.
        say_waiting_every: between two messages of a merge that waits for another.
        progress_every: between two ``progress`` events; log_every: between two lines of a log file.
        flush_within: an event log has for its last lines.
        worker_grace: a worker thread has, after a failure, to return from a call to the system.
        exit_grace: a merge has to end by itself once storage hangs.
    """

    beat: float = 1.0
    lost_after: float = 15.0
    start_within: float = 600.0
    stop_beats: int = 5
    report_beats: int = 15
    say_missing_after: float = 5.0
    say_missing_every: float = 60.0
    stalled_after: float = 300.0
    first_pause: float = 0.25
    visible_within: float = 90.0
    look_every: float = 15.0
    sync_every: float = 30.0
    freshen_every: float = 5.0
    stale_after: float = 30.0
    say_waiting_every: float = 30.0
    progress_every: float = 5.0
    log_every: float = 30.0
    flush_within: float = 5.0
    worker_grace: float = 5.0
    exit_grace: float = 10.0

    def read(self, environment: Mapping[str, str]) -> None:
        """Take what :data:`VARIABLE` says.

        Raises:
            UsageError: a name is not known, or a value is no positive number.
        """
        for item in filter(None, environment.get(VARIABLE, "").split(",")):
            name, _, text = item.partition("=")
            known = [one.name for one in fields(self)]
            if name.strip() not in known:
                raise UsageError(f"{VARIABLE}: there is no {name}; there are {', '.join(known)}")
            try:
                value = float(text)
            except ValueError:
                value = 0.0
            if not 0 < value < float("inf"):
                raise UsageError(f"{VARIABLE}: {item}: not a positive number of seconds")
            setattr(self, name.strip(), type(getattr(self, name.strip()))(value))

    @contextmanager
    def changed(self, **values: float) -> Iterator[None]:
        """Other values while the block runs."""
        before = {name: getattr(self, name) for name in values}
        self._set(values)
        try:
            yield
        finally:
            self._set(before)

    def _set(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            assert hasattr(self, name), name
            setattr(self, name, value)


timeouts = Timeouts()
"""This process's own."""
