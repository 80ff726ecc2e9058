"""What a sweep will move and how long that takes, from rates measured here, before it starts."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from wsm_megatron.access.protocol import Estimate
from wsm_megatron.execution.rank import default_threads
from wsm_megatron.export.merged import MergedExports
from wsm_megatron.planning.job import Job
from wsm_megatron.process.worker_threads import run_workers
from wsm_megatron.storage.retry import check_storage, watched

_PIECE = 4 * 2**20
_MOST_READ, _MOST_WRITTEN = 256 * 2**20, 64 * 2**20
_SHARE = 20
"""At most a twentieth of the work is done for its estimate."""


@dataclass(frozen=True)
class SweepEstimate:
    """Bytes and seconds of a sweep.

    Attributes:
        merges: that are made. sources: that they are of.
        read: bytes, in batches an upper bound: of each the sources are read.
        stored: bytes on disk at once. free: bytes on that file system.
        read_rate: bytes a second, measured on this rank, as the files are now (in the page cache or
            not). write_rate: the same, with syncing; None where too little is written to say.
    """

    merges: int
    sources: int
    read: int
    written: int
    stored: int
    free: int
    read_rate: float | None
    write_rate: float | None

    @property
    def seconds(self) -> float | None:
        """On one rank; None where too little is moved to measure."""
        if self.read_rate is None or self.write_rate is None:
            return None
        return self.read / self.read_rate + self.written / self.write_rate

    @classmethod
    def of(
        cls,
        job: Job,
        moved: Estimate,
        save: Path,
        batch: int | None = None,
        keep: int = 0,
        exports: MergedExports | None = None,
    ) -> SweepEstimate:
        """Measures rates by reading and writing some MiB; nothing that is written stays.

        Args:
            batch: merges that are made at a time; ``keep``: the best, which lie beside them.
            exports: that are made too, or instead.
        """
        count = len(job.outputs)
        written, stored, batches = moved.written, sum(job.stored_bytes()), 1
        if exports is not None:
            exported = sum(plan.nbytes for _, plan in exports.planned())
            written, stored = (0, 0) if exports.only else (written, stored)
            written, stored = written + exported, stored + exported
        if batch is not None:
            batches = -(-count // batch)
            stored = stored * min(count, batch + keep) // count
        place = next(path for path in (save.absolute(), *save.absolute().parents) if path.is_dir())
        with watched(lambda: f"{place}: asking for its free space"):
            free = shutil.disk_usage(place).free
        threads = job.execution.threads or default_threads()
        return cls(
            merges=count,
            sources=len(job.sources),
            read=moved.read * batches,
            written=written,
            stored=stored,
            free=free,
            read_rate=read_rate(job, moved.read, threads),
            write_rate=_write_rate(place, min(_MOST_WRITTEN, written // _SHARE)),
        )


def read_rate(job: Job, work: int, threads: int) -> float | None:
    """Bytes a second at which this rank reads the sources now, measured; None for little work.

    Args:
        work: bytes that the job reads, of which a part is read for this.
    """
    files = [source.path / name for source in job.sources for name in source.layout.files]
    seen = [file for file in files if file.is_file()]  # of another node's, this rank sees none
    places = [
        (file, start) for file in seen for start in range(0, file.stat().st_size, 16 * _PIECE)
    ]
    count = min(_MOST_READ, work // _SHARE) // _PIECE
    if count < 1 or not places:
        return None
    read = 0
    lock = threading.Lock()

    def read_piece(place: tuple[Path, int]) -> None:
        nonlocal read
        file, start = place
        with watched(lambda: f"{file}: reading"), file.open("rb", buffering=0) as stream:
            got = len(os.pread(stream.fileno(), _PIECE, start))
        with lock:
            read += got

    step = max(1, len(places) // count)
    started = time.perf_counter()
    pieces = islice(places[::step], count)
    run_workers(pieces, read_piece, threads, threading.Event(), check_storage)
    return read / max(time.perf_counter() - started, 1e-9)


def _write_rate(place: Path, nbytes: int) -> float | None:
    if nbytes < _PIECE:
        return None
    piece = os.urandom(_PIECE)
    started = time.perf_counter()
    try:
        with (
            watched(lambda: f"{place}: writing"),
            tempfile.TemporaryFile(dir=place, buffering=0) as stream,
        ):
            for _ in range(nbytes // _PIECE):
                stream.write(piece)
            os.fsync(stream.fileno())
    except OSError:
        return None  # whether it can be written to, the merge finds out
    return nbytes // _PIECE * _PIECE / (time.perf_counter() - started)
