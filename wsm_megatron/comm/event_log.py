"""``--log-json``: what a merge does, for programs to follow: one JSON object a line."""

from __future__ import annotations

import json
import logging
import os
import queue
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

from wsm_megatron.comm.communicator import Ranks
from wsm_megatron.comm.messages import Failure
from wsm_megatron.errors import MergeError, UsageError, exit_code
from wsm_megatron.process.timeouts import timeouts

logger = logging.getLogger(__name__)
_library = logging.getLogger("wsm_megatron")

_RATE_OVER = 12
"""Progress events over which the rate is taken: a minute."""


class EventLog:
    """A file of events, appended to. Once it is open it lets nothing fail, and nothing wait.

    Its lines are written by a thread of its own, so that storage which hangs under the log does not
    hold up the merge. What cannot be written is warned about once.

    Raises:
        UsageError: the file cannot be opened for writing.
    """

    def __init__(self, path: Path):
        self._path, self._started = path, time.monotonic()
        self._todo: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._broken = False
        self.progress: Callable[[], dict[str, Any]] | None = None
        try:
            cut_short = path.is_file() and not _ends_a_line(path)
            self._stream = path.open("ab", buffering=0)
        except OSError as error:
            raise UsageError(f"--log-json {path}: cannot write: {error.strerror}") from error
        if cut_short:  # by the end of an earlier job
            self._todo.put(partial(self._append, b"\n"))
        self._thread = threading.Thread(target=self._run, name="wsm-events", daemon=True)
        self._thread.start()

    def write(self, event: str, **fields: Any) -> None:
        """Have an event written, with the time now."""
        self._todo.put(partial(self._append, self._heartbeat(event, fields)))

    def flush(self, within: float | None = None) -> None:
        """Wait until what was told is written; not for ever."""
        written = threading.Event()
        self._todo.put(written.set)
        written.wait(timeouts.flush_within if within is None else within)

    def close(self) -> None:
        self._todo.put(None)
        self._thread.join(timeouts.flush_within)

    def _run(self) -> None:
        due = time.monotonic() + timeouts.progress_every
        while True:
            try:
                step = self._todo.get(timeout=max(0.0, due - time.monotonic()))
            except queue.Empty:
                due = time.monotonic() + timeouts.progress_every
                if (progress := self.progress) is not None:
                    self._append(self._heartbeat("progress", progress()))
                continue
            if step is None:
                break
            step()
        self._stream.close()

    def _heartbeat(self, event: str, fields: dict[str, Any]) -> bytes:
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        seconds = round(time.monotonic() - self._started, 3)
        data = {"event": event, "time": now.replace("+00:00", "Z"), "seconds": seconds, **fields}
        return json.dumps(data, default=str).encode() + b"\n"

    def _append(self, line: bytes) -> None:
        left = memoryview(b"" if self._broken else line)
        try:
            while left:
                left = left[self._stream.write(left) :]
        except OSError as error:
            self._broken = True
            logger.warning(
                "--log-json %s: cannot write: %s; the merge continues without it",
                self._path,
                error.strerror,
            )


class Meter:
    """Bytes, rate and time left, from a count that grows to ``total``."""

    def __init__(self, total: int, done: Callable[[], int]):
        self._total, self._done = total, done
        self._seen = deque([(time.monotonic(), done())], maxlen=_RATE_OVER)

    def read(self) -> dict[str, Any]:
        now, done = time.monotonic(), self._done()
        then, before = self._seen[0]
        self._seen.append((now, done))
        rate = (done - before) / max(now - then, 1e-9)
        return {
            "bytes_done": done,
            "bytes_total": self._total,
            "bytes_per_second": round(rate),
            "seconds_left": round((self._total - done) / rate, 1) if rate > 0 else None,
        }


class Events:
    """Tells the job's log, where there is one, what happens. Any rank may; rank 0 writes."""

    def __init__(self, ranks: Ranks, log: EventLog | None, wanted: bool):
        self._ranks, self.log, self._wanted = ranks, log, wanted

    def tell(self, event: str, **fields: Any) -> None:
        """An event of the whole job; what other ranks than 0 tell here is left out."""
        if self.log is not None:
            self.log.write(event, **fields)

    @contextmanager
    def progress(self, total: int) -> Iterator[None]:
        """While the block runs, tell every few seconds how far all ranks are, and at its end."""
        meter = Meter(total, self._ranks.counted)
        if self.log is not None:
            self.log.progress = meter.read
        try:
            yield
        finally:
            if self.log is not None:
                self.log.progress = None
        self.exchange()
        self.tell("progress", **meter.read())

    def exchange(self) -> None:
        """Let rank 0 hear now what ranks that called this before had to tell."""
        if self._wanted:
            self._ranks.exchange()


@contextmanager
def job_events(path: Path | None, ranks: Ranks, version: str, options: Any) -> Iterator[Events]:
    """The events of one job, from ``started`` to ``failed``, which it tells itself. Collective.

    Warnings that the library logs on any rank are events too.

    Args:
        path: rank 0 appends to it; None: nothing is told.

    Raises:
        UsageError: the file cannot be written.
    """
    if path is None:
        yield Events(ranks, None, wanted=False)
        return
    events = Events(ranks, None, wanted=True)
    handler = _Warnings(events, ranks)
    try:
        with ranks.together("opening the event log"):
            if ranks.rank == 0:
                events.log = EventLog(path)
        _library.addHandler(handler)
        hosts = ranks.all_gather(socket.gethostname())
        events.tell("started", version=version, hosts=hosts, **_job(ranks), options=options)
        yield events
    except BaseException as error:
        if ranks.rank == 0:  # which holds the store: nothing to wait for
            failures = ranks.failed(error)
            with suppress(MergeError):
                ranks.exchange()
            events.tell("failed", **_failure(error, failures))
        raise
    finally:
        _library.removeHandler(handler)
        if events.log is not None:
            events.log.close()


def _job(ranks: Ranks) -> dict[str, Any]:
    slurm = {"job": os.environ.get("SLURM_JOB_ID"), "task": os.environ.get("SLURM_ARRAY_TASK_ID")}
    return {"ranks": ranks.size, "slurm": slurm}


def _failure(error: BaseException, failures: list[Failure]) -> dict[str, Any]:
    first = failures[0]
    return {
        "rank": first.rank,
        "phase": first.phase,
        "message": str(error) or type(error).__name__,
        "exit_code": exit_code(error),
        "failures": [one.as_data() for one in failures],
    }


class _Warnings(logging.Handler):
    """Makes events of what the library warns about, on any rank.

    A record's ``event`` is the event's name, ``warning`` where it has none; its ``fields`` go too.
    """

    def __init__(self, events: Events, ranks: Ranks):
        super().__init__(logging.WARNING)
        self._events, self._ranks = events, ranks
        ranks.hear(lambda told: events.tell(told[0], **told[1]))

    def emit(self, record: logging.LogRecord) -> None:
        fields = {
            "rank": self._ranks.rank,
            "phase": self._ranks.phase,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        self._ranks.tell((getattr(record, "event", "warning"), fields))

    def flush(self) -> None:
        if self._events.log is not None:
            self._events.log.flush(1.0)


def _ends_a_line(path: Path) -> bool:
    with path.open("rb") as stream:
        if stream.seek(0, os.SEEK_END) == 0:
            return True
        stream.seek(-1, os.SEEK_END)
        return stream.read(1) == b"\n"
