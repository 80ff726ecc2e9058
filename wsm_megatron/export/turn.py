"""The last step of an export in the same pass: matrices that are stored transposed.

No tile of such a matrix is a run of bytes in its file. The elements are first written to its place
in the order of the checkpoint; once all ranks are done, each matrix is read, turned, and written
over itself. A file is one rank's: then no other writes beside what it has read.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from wsm_megatron.checkpoint.side_files import Files
from wsm_megatron.config import ExecutionOptions
from wsm_megatron.errors import MergeError
from wsm_megatron.execution.memory_budget import default_memory
from wsm_megatron.execution.rank import default_threads
from wsm_megatron.export.rank import turned
from wsm_megatron.export.shard_file import ShardFile
from wsm_megatron.export.spread import Place
from wsm_megatron.process.worker_threads import run_workers
from wsm_megatron.storage.buffer import Buffer
from wsm_megatron.storage.retry import watched

Turned = Mapping[Path, tuple[int, Sequence[Place]]]
"""By file: its size, and the places whose elements are to be turned."""


def turn(
    files: Turned, execution: ExecutionOptions, check: Callable[[], None]
) -> dict[Path, Files]:
    """Turn the places of some files, durably; what was written of each, by folder, as of
    :class:`.Closed`.

    Raises:
        MergeError: a file cannot be read or written.
    """
    written: dict[Path, Files] = {}
    for path, (size, places) in files.items():
        written.setdefault(path.parent, {})[path.name] = _turn_file(
            path, size, places, execution, check
        )
    return written


def _turn_file(
    path: Path,
    size: int,
    places: Sequence[Place],
    execution: ExecutionOptions,
    check: Callable[[], None],
) -> tuple[int, int]:
    file, stop = ShardFile(path, size, made=True), threading.Event()
    try:
        with watched(lambda: f"{path}: opening"), path.open("rb", buffering=0) as stream:
            work = partial(_turn_place, file, stream.fileno())
            run_workers(places, work, _threads(places, execution), stop, check)
    except OSError as error:
        file.abandon()
        raise MergeError(f"{path}: cannot read: {error.strerror}") from error
    except BaseException:
        file.abandon()
        raise
    return file.close()


def _turn_place(file: ShardFile, descriptor: int, place: Place) -> None:
    elements = Buffer.empty(place.piece.region.numel, place.dtype)
    done = 0
    while done < place.nbytes:
        with watched(lambda: f"{file.path}: reading at byte {place.offset}"):
            count = os.preadv(descriptor, [elements.data[done:]], place.offset + done)
        if count == 0:
            raise MergeError(f"{file.path} is shorter than it was written")
        done += count
    file.write(place.offset, Buffer(turned(elements.elements, place.piece)).data)


def _threads(places: Sequence[Place], execution: ExecutionOptions) -> int:
    """As many as their matrices, read and turned, leave memory for."""
    memory = execution.memory or default_memory()
    largest = 2 * max(place.nbytes for place in places)
    return max(1, min(execution.threads or default_threads(), memory // max(largest, 1)))
