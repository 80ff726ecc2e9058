"""Where a merge goes: what a rank opens, fills chunk by chunk, and closes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

from wsm_megatron.checkpoint.region import Region
from wsm_megatron.checkpoint.side_files import Files
from wsm_megatron.checkpoint.staging_dir import journals
from wsm_megatron.checkpoint.writer import CheckpointFile, ChunkWriter, Placed, file_name
from wsm_megatron.planning.job import places
from wsm_megatron.planning.tasks import Output, Task
from wsm_megatron.storage.buffer import Buffer
from wsm_megatron.storage.journal import SUFFIX as JOURNAL_SUFFIX
from wsm_megatron.storage.visibility import wait_for_directory


class ChunkSink(Protocol):
    """Takes one output of a task, tile by tile."""

    def append(self, elements: Buffer, region: Region) -> None:
        """Take the next elements: those of ``region``, a part of the task's, row-major."""

    def finish(self) -> None:
        """All of them are in."""


class Closed(NamedTuple):
    """What a rank has written of a merge, durably.

    Attributes:
        files: of the checkpoint, whole. shared: of files that several ranks write, the bytes that
            are this rank's, and its share of their CRC-32.
    """

    files: Files
    shared: Files


class Target(Protocol):
    """One merge, as a rank writes it. Safe to share between threads."""

    @property
    def bytes_written(self) -> int: ...

    def write_object(self, key: str, data: bytes) -> None:
        """Take a byte entry."""

    def chunks(self, task: Task) -> Sequence[ChunkSink]:
        """A sink for every output of a task."""
        ...

    def has(self, task: Task) -> bool:
        """Whether an earlier merge, which died, has written all that a task writes here."""
        ...

    def take_over(self, task: Task) -> None:
        """A task that this has will not be done again."""

    def close(self) -> Closed:
        """Make everything durable."""
        ...

    def abandon(self) -> None:
        """Close after a failure."""


class Destination(Protocol):
    """Where a merge goes, as every rank is told.

    Attributes:
        directory: that rank 0 has made, not yet published.
        files: how many each rank has open in it.
        takes_side_files: it holds what lies beside a checkpoint's tensors.
    """

    @property
    def directory(self) -> Path: ...
    @property
    def files(self) -> int: ...
    @property
    def takes_side_files(self) -> bool: ...

    def open(self, rank: int, placed: Sequence[Placed], check: Callable[[], None]) -> Target:
        """Open a rank's part, where its outputs are placed so in a checkpoint's file."""
        ...


@dataclass(frozen=True)
class CheckpointDirectory:
    """A checkpoint: a file of each rank, with a journal."""

    directory: Path
    files: int = 2
    takes_side_files: bool = True

    def open(
        self, rank: int, placed: Sequence[Placed], check: Callable[[], None]
    ) -> CheckpointTarget:
        wait_for_directory(journals(self.directory), check)
        wait_for_directory(self.directory, check)
        name = file_name(rank)
        journal = journals(self.directory) / (name + JOURNAL_SUFFIX)
        size = placed[-1].end if placed else 0
        file = CheckpointFile(self.directory / name, journal, size)
        return CheckpointTarget(file, places(placed))


@dataclass(frozen=True)
class CheckpointTarget:
    """This rank's file of a checkpoint, and the places in it, of objects too."""

    file: CheckpointFile
    places: dict[tuple[str, Region | None], Placed] = field(repr=False)

    @property
    def bytes_written(self) -> int:
        return self.file.bytes_written

    def write_object(self, key: str, data: bytes) -> None:
        self.file.write_bytes(self.places[key, None], data)

    def chunks(self, task: Task) -> list[ChunkSink]:
        return [_Chunk(self.file.chunk(self.place(task, one))) for one in task.recipe.outputs]

    def has(self, task: Task) -> bool:
        return all(self.file.has(self.place(task, output)) for output in task.recipe.outputs)

    def take_over(self, task: Task) -> None:
        pass  # its file has it

    def close(self) -> Closed:
        return Closed({self.file.path.name: self.file.close()}, {})

    def abandon(self) -> None:
        self.file.abandon()

    def place(self, task: Task, output: Output) -> Placed:
        """Where a task's output lies."""
        return self.places[output.key, task.part(output.key, task.region)]


@dataclass(frozen=True)
class _Chunk:
    """Elements in row-major order need no geometry."""

    writer: ChunkWriter

    def append(self, elements: Buffer, region: Region) -> None:
        self.writer.append(elements)

    def finish(self) -> None:
        self.writer.finish()
